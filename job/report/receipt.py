"""The receipt: the rows of the quote, what each took and cost over all attempts, and why it was another amount.

The billed time of each attempt (job/store/bill.py) is divided among the rows without remainder. Dollars are decimal:
each row is rounded to a cent so that the rows add up to the rounded total exactly (the cents that rounding down left go
to the rows that lost most). It is our clock times your price, not your invoice: clouds round, and bill disks and
traffic besides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from job.plan import money
from job.recipe.leaderboard import UNTIMED_STEPS
from job.store.attempt import Record, fold, read_events
from job.store.bill import Billed, billed

AGAIN, AROUND = "steps done again", "validation, checkpoints"
ROWS = (
    money.BOOT,
    money.START,
    money.TEXT,
    money.COMPILE,
    money.UNTIMED,
    money.TRAINING,
    AGAIN,
    AROUND,
    money.SCORE,
    money.REPORT,
    money.IDLE,
)
PLANNED = {money.VALIDATION: AROUND, money.CHECKPOINTS: AROUND}
"""stages of the quote that are not told apart afterwards"""
STAGES = {"prepare": money.TEXT, "evaluate": money.SCORE}
"""the others but training are the report's row"""
NOTE = "our clock times your price, not your invoice"
CENT = Decimal("0.01")


@dataclasses.dataclass
class Row:
    """Seconds and exact dollars of one row, and what the quote said of it in minutes."""

    name: str
    seconds: float = 0.0
    usd: Decimal = Decimal(0)
    planned: tuple[float, float] | None = None


def receipt(run: Path) -> dict[str, Any] | None:
    """The document `receipt.json`; None while no attempt of the run has a price."""
    record = fold(run)
    bills = billed(record)
    if not any(bill.hour for bill in bills):
        return None
    rows = {name: Row(name) for name in ROWS}
    steps: dict[int, list[dict[str, Any]]] = {}
    quote: dict[str, Any] = {}
    for event in read_events(run):
        if event["kind"] == "train.step":
            steps.setdefault(event["attempt"], []).append(event)
        if event["kind"] == "quote" and not quote:
            quote = event
    for bill in bills:
        for name, seconds in _divided(bill, record, steps.get(bill.life.number, [])).items():
            rows[name].seconds += seconds
            rows[name].usd += bill.usd(seconds)
    for stage in quote.get("stages", []):
        row = rows[PLANNED.get(stage["name"], stage["name"])]
        low, high = row.planned or (0.0, 0.0)
        row.planned = low + stage["low"], high + stage["high"]
    return _document(list(rows.values()), bills, quote)


def _divided(bill: Billed, record: Record, steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The seconds of one attempt by row; what is between the stages is the start's, what follows them the upload's."""
    number, life = bill.life.number, bill.life
    found = dict.fromkeys(ROWS, 0.0) | {money.BOOT: bill.before, money.IDLE: bill.after}
    last_end = life.start
    for span in record.stages:
        if span.attempt != number:
            continue
        end = life.end if span.end is None else span.end
        last_end = max(last_end, end)
        if span.stage != "pretrain":
            found[STAGES.get(span.stage, money.REPORT)] += end - span.start
            continue
        before = end - span.start
        if steps:
            before = min(before, max(0.0, life.at(steps[0]) - steps[0]["ms"] / 1000 - span.start))
        found[money.COMPILE] += before
        room, taken = end - span.start - before, sum(event["ms"] for event in steps) / 1000
        found[AROUND] += max(0.0, room - taken)
        for event in steps:
            counts = record.steps.get(event["step"], {}).get("attempt") == number
            name = AGAIN if not counts else money.UNTIMED if event["step"] < UNTIMED_STEPS else money.TRAINING
            found[name] += event["ms"] / 1000 * min(1.0, room / taken)
    if any(span.attempt == number for span in record.stages):
        found[money.REPORT] += life.end - last_end
    found[money.START] = bill.seconds - sum(seconds for name, seconds in found.items() if name != money.START)
    return found


def _document(rows: Sequence[Row], bills: Sequence[Billed], quote: dict[str, Any]) -> dict[str, Any]:
    hour = Decimal(str((quote.get("price") or {}).get("hour", 0)))
    cents = in_cents([row.usd for row in rows])
    total = sum(cents, Decimal(0))
    lines = []
    for row, usd in zip(rows, cents, strict=True):
        middle = None if row.planned is None else Decimal(str(sum(row.planned) / 2)) / 60 * hour
        lines.append(
            {
                "row": row.name,
                "planned_minutes": None if row.planned is None else [round(minutes, 2) for minutes in row.planned],
                "planned_usd": None if middle is None else str(middle.quantize(CENT, ROUND_HALF_UP)),
                "minutes": round(row.seconds / 60, 2),
                "usd": str(usd),
                "why": _why(row, bills),
            }
        )
    attempts = [
        {
            "attempt": bill.life.number,
            "minutes": round(bill.seconds / 60, 2),
            "hour": bill.hour,
            "price": (bill.life.first.get("price") or {}).get("source"),
            "boot_is_known": bill.known,
        }
        for bill in bills
    ]
    seconds = sum(bill.seconds for bill in bills)
    return {"schema": 1, "rows": lines, "seconds": round(seconds, 3), "usd": str(total), "attempts": attempts} | {
        "note": NOTE
    }


def _why(row: Row, bills: Sequence[Billed]) -> str:
    """What explains the amount, where it is not the plan's."""
    if row.name == money.BOOT:
        guessed = sum(not bill.known and bill.before > 0 for bill in bills)
        attempts = f"{len(bills)} attempt{'s' * (len(bills) > 1)}"
        return f"{guessed} of {len(bills)} boots are assumed" if guessed else attempts
    if row.name == AGAIN:
        return "after a stop training goes on from the last checkpoint" if row.seconds else ""
    if row.planned is None or not row.seconds:
        return ""
    low, high = (60 * minutes for minutes in row.planned)
    if row.seconds > high:
        return f"{row.seconds / high - 1:.0%} above the most that was planned" if high else "not planned"
    return "" if row.seconds >= low else f"{1 - row.seconds / low:.0%} below the least that was planned"


def in_cents(amounts: Sequence[Decimal]) -> list[Decimal]:
    """`amounts`, each rounded to a cent, so that they add up to their rounded sum."""
    down = [amount.quantize(CENT, ROUND_DOWN) for amount in amounts]
    missing = int((sum(amounts, Decimal(0)).quantize(CENT, ROUND_HALF_UP) - sum(down, Decimal(0))) / CENT)
    most_lost = sorted(range(len(amounts)), key=lambda i: down[i] - amounts[i])[:missing]
    return [amount + CENT if i in most_lost else amount for i, amount in enumerate(down)]
