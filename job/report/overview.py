"""Runs at a glance: each in a row (`speedrun list`), one on a screen (`speedrun status`).

Here a run's result is built from its record; in a bucket it is what was put there with the page, a minute ago at most
while the run goes on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from job.errors import DataError
from job.recipe.config import from_document
from job.report import words
from job.report.postmortem import postmortem
from job.report.progress import figures, progress_sentence, warnings
from job.report.receipt import receipt
from job.report.result import build_result, present, result_of
from job.store.attempt import fold
from job.store.documents import read_document, recipe_of
from job.store.fence import run_key
from job.store.stores import Store

GONE = 900.0
"""seconds without an event after which an attempt is not taken to be alive: a compilation takes less"""
SHAPE = {"run_id": str, "state": str, "steps": int, "planned_steps": int}
AT_ONCE = 8
WARNINGS = 5


def rows_here(out: Path, now: float) -> list[dict[str, Any]]:
    """`row` of every run below the folder `out`, the newest first."""
    runs = [path.parent for path in (out / "runs").glob("*/recipe.json")]
    return _in_order(_row_of(run.name, functools.partial(build_result, run), now) for run in runs)


def rows_there(store: Store, run_ids: set[str], now: float) -> list[dict[str, Any]]:
    """`row` of each of the runs that the store has, the newest first."""

    def result(run_id: str) -> dict[str, Any] | None:
        key = f"{run_key(run_id)}/report/result.json"
        data = store.get(key)
        return None if data is None else read_document(data, f"{store.url}/{key}", "write the report again", SHAPE)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return _in_order(pool.map(lambda run_id: _row_of(run_id, lambda: result(run_id), now), run_ids))


def _in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (-(row["seen"] or 0.0), row["run_id"]))


def _row_of(run_id: str, result: Callable[[], dict[str, Any] | None], now: float) -> dict[str, Any]:
    """`row` of what `result()` gives; of a run that cannot be read, why."""
    try:
        return row(run_id, result() or {}, now)
    except DataError as error:
        return row(run_id, {}, now) | {"state": "damaged", "last_word": str(error)}


def row(run_id: str, result: Mapping[str, Any], now: float) -> dict[str, Any]:
    """What a list shows of a run, as plain JSON values; of an empty `result`, that it is begun. `now`: Unix seconds."""
    keys = ("preset", "steps", "planned_steps", "val_bpb", "core", "smoke_score", "usd")
    found: dict[str, Any] = {key: result.get(key) for key in keys}
    for name in ("core", "smoke_score"):
        if score := found[name]:
            found[name] = {key: score[key] for key in ("metric", "se", "cap")}
    newest = result.get("newest_attempt") or {}
    state, last_word = _state(result, newest, now)
    return {"run_id": run_id, "state": state, **found, "seen": newest.get("seen"), "last_word": last_word}


def _state(result: Mapping[str, Any], newest: Mapping[str, Any], now: float) -> tuple[str, str]:
    """The state in a word or three, and the last word: how the newest attempt ended, and when."""
    if not newest:
        return (result["state"] if result.get("attempts") else "begun"), ""
    code, silent = newest["exit_code"], now - newest["seen"]
    ended = words.moment(newest["seen"])
    if code:
        ended += f", exit {code}: {newest['reason']}"
    if result["state"] != "incomplete":
        return result["state"], ended
    if code is None:
        return ("running" if silent < GONE else "no end seen"), f"seen {words.duration(max(0.0, silent))} ago"
    return ("stopped" if code else "done in part"), ended


def cells(row: Mapping[str, Any]) -> list[str]:
    """The row as a person reads it, under HEAD."""
    name, score = ("CORE", row["core"]) if row["core"] else ("smoke", row["smoke_score"])
    points = f"{name} {words.number(score['metric'], 4)}" if score else words.NONE
    if score and score["cap"] and row["core"]:
        points += f" of {score['cap']} items"
    counts = [words.count(row[key]) for key in ("steps", "planned_steps")]
    steps = " of ".join(counts) if row["planned_steps"] else words.NONE
    usd = words.NONE if row["usd"] is None else f"{row['usd']:.2f}"
    return [row["run_id"], row["state"], steps, words.number(row["val_bpb"]), points, usd, row["last_word"]]


HEAD = ["run", "state", "steps", "bpb", "score", "$", "last word"]


def screen(run: Path, url: str | None, now: float) -> tuple[dict[str, Any], list[str]]:
    """The result of `run`, and what one screen says of it; `url` is that of the bucket which it was copied from."""
    recipe, record, bill = recipe_of(run), present(fold(run)), receipt(run)
    result = result_of(run, recipe, record, bill)
    place = f"{url}/{run_key(run.name)}" if url else str(run)
    said = [*words.summary_lines(result, f"{place}/report/report.html"), ""]
    state, newest = row(run.name, result, now)["state"], result["newest_attempt"]
    said.append(state + (f": attempt {newest['number']}, seen {words.moment(newest['seen'])}" if newest else ""))
    if progress := progress_sentence(figures(from_document(recipe), record)):
        said.append(progress)
    said += warnings(record)[:WARNINGS]
    if newest and state not in ("complete", "running"):
        after = postmortem(run, newest["number"], record.attempts[-1].first.get("argv", []), url)
        if safe := after["safe"]["checkpoint"]:
            said.append(f"The checkpoint of step {words.count(safe['step'])} is safe: {safe['bucket'] or safe['disk']}")
        said += ["Go on with:", f"  {after['command']}"]
    return result, said
