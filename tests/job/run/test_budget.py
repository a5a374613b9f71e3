"""The cap over whole simulated runs: random speeds, prices, preemptions; a clock of our own, the real Budget, bill and
receipt. And one real run that is stopped by its cap and given more."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.errors import BudgetReached, ExitCode, SpeedrunError, UsageError
from job.machine.host import Machine
from job.plan import money
from job.plan.cap import Cap, Quote
from job.plan.prices import Price
from job.recipe.config import resolve
from job.report.receipt import receipt
from job.reporter import Reporter
from job.run import budget
from job.run.budget import Budget
from job.run.supervise import Interrupts
from job.store.attempt import fold
from job.store.bill import billed

CHECKPOINT = 20.0
"""seconds of a checkpoint, in the simulation"""
RUN_6 = Quote.of(resolve("run6"), Machine(8, "NVIDIA H100 80GB HBM3", (9, 0)), 1)
STEPS = 600
"""of a simulated run: each stands for several, so that a test has fewer events"""


def coarse(quote: Quote) -> Quote:
    return dataclasses.replace(quote, steps=STEPS)


class Simulated(Reporter):
    """A run's events in a file, on a clock that only the simulation moves."""

    def __init__(self, run: Path) -> None:
        self.run, self.now, self.attempt = run, 1e9, 0
        (run / "events").mkdir(parents=True)

    def monotonic(self) -> float:
        return self.now

    def emit(self, kind: str, **fields: Any) -> None:
        event = {"t": self.now, "attempt": self.attempt, "seq": self.seq, "kind": kind, **fields}
        self.seq += 1
        with open(self.run / "events" / f"{self.attempt}.jsonl", "a") as file:
            file.write(json.dumps(event) + "\n")

    def start(self, cap: Cap, up_s: float) -> None:
        self.attempt, self.seq = self.attempt + 1, 0
        self.now += 60 + up_s
        boot = {"id": str(self.attempt), "up_s": up_s}
        price = cap.price and dataclasses.asdict(cap.price)
        self.emit("attempt.started", boot=boot, rented=True, price=price)

    def end(self, code: int) -> int:
        self.emit("attempt.ended", exit_code=code, reason="")
        return code


@dataclasses.dataclass(frozen=True)
class World:
    """What happens to a run: all of it unknown to the budget. Seconds."""

    hour: float
    step: float
    boot: float = 500.0
    evaluation: float = 200.0
    preempted: tuple[int, ...] = ()
    """steps before which the machine vanishes, once each"""


def simulate(run: Path, usd: float, world: World, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of the last attempt."""
    sim, cap, quote = Simulated(run), Cap(usd, None, Price(world.hour, "--price")), coarse(RUN_6)
    monkeypatch.setattr(budget.time, "monotonic", sim.monotonic)
    preemptions, done = list(world.preempted), 0
    while True:
        sim.start(cap, world.boot)
        wishes = Interrupts()
        try:
            watch = Budget(cap, quote, fold(run), wishes, sim, trained=False)
        except SpeedrunError as error:
            return sim.end(int(error.exit_code))
        sim.emit("stage.started", stage="pretrain")
        sim.now += 240
        vanished = False
        for step in range(done, STEPS):
            if preemptions and preemptions[0] <= step:
                preemptions.pop(0)
                vanished = True
                break
            sim.now += world.step
            watch.emit("train.step", step=step, rows=8 * (step + 1), ms=1000 * world.step)
            if wishes.count:
                break
            if step % 60 == 59:
                done = step + 1
                sim.emit("checkpoint.sealed", step=done, rows=8 * done, folder=str(done), bytes=1, stall=0.2, seconds=9)
        if vanished:
            continue
        sim.now += CHECKPOINT
        if wishes.count:
            return sim.end(int(ExitCode.BUDGET))
        sim.emit("stage.done", stage="pretrain")
        sim.emit("stage.started", stage="evaluate")
        for _ in range(20):
            sim.now += world.evaluation / 20
            watch.check()
            if wishes.count:
                return sim.end(int(ExitCode.BUDGET))
        sim.emit("stage.done", stage="evaluate")
        for stage in ("report", "export"):
            sim.emit("stage.started", stage=stage)
            sim.now += 10
            sim.emit("stage.done", stage=stage)
        return sim.end(0)


WORLDS = st.builds(
    World,
    hour=st.floats(8, 60),
    step=st.floats(6, 20),  # 9.9 is the quote's
    boot=st.floats(60, 1500),
    evaluation=st.floats(30, 900),
    preempted=st.lists(st.integers(1, STEPS - 1), max_size=3).map(lambda steps: tuple(sorted(steps))),
)


@settings(max_examples=25, deadline=None)
@given(world=WORLDS, usd=st.floats(5, 200))
def test_no_run_passes_its_cap_by_more_than_a_checkpoint(world: World, usd: float) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        run = Path(folder) / "r"
        code = simulate(run, usd, world, monkeypatch)
        bills = billed(fold(run))
        spent = sum(float(bill.usd(bill.seconds)) for bill in bills)
        unavoidable = (CHECKPOINT + world.step) / 3600 * world.hour
        refused = code in (ExitCode.USAGE, ExitCode.BUDGET) and not any(
            event["kind"] == "stage.started" for event in _events(run, len(bills))
        )
        if refused:  # a boot is paid before anybody can say no
            spent -= float(bills[-1].usd(bills[-1].seconds))
        assert spent <= usd + unavoidable, (code, world)
        paper = receipt(run)
        assert sum(Decimal(row["usd"]) for row in paper["rows"]) == Decimal(paper["usd"])
        exact = sum(bill.usd(bill.seconds) for bill in bills)
        assert abs(Decimal(paper["usd"]) - exact) <= Decimal("0.005")
        assert sum(row["minutes"] for row in paper["rows"]) == pytest.approx(paper["seconds"] / 60, abs=0.06)
        assert min(row["minutes"] for row in paper["rows"]) >= 0


def _events(run: Path, attempt: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events" / f"{attempt}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("hour", [24.0, 31.92, 36.0])
@pytest.mark.parametrize("slower", [0.9, 1.0, 1.05, 1.2, 1.5, 2.0])
def test_run_6_is_scored_or_stops_within_60_steps(
    hour: float, slower: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = next(stage for stage in RUN_6.stages if stage.name == money.TRAINING)
    step = 60 * planned.high / STEPS * slower
    code = simulate(tmp_path / "r", 80.0, World(hour, step), monkeypatch)
    record = fold(tmp_path / "r")
    assert code == ExitCode.DONE or (code == ExitCode.BUDGET and len(record.steps) < 60), (code, len(record.steps))
    assert slower > 1.0 or code == ExitCode.DONE
    if code == ExitCode.BUDGET:
        sim = Simulated.__new__(Simulated)
        sim.run, sim.attempt, sim.now = tmp_path / "r", 1, 2e9
        monkeypatch.setattr(budget.time, "monotonic", sim.monotonic)
        sim.start(Cap(80.0, None, Price(hour, "--price")), 600)
        with pytest.raises(BudgetReached, match="--max-usd 5 is nearly reached"):
            Budget(Cap(5.0, None, Price(hour, "")), coarse(RUN_6), fold(sim.run), Interrupts(), sim, trained=False)


def test_in_the_last_quarter_only_the_reserve_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sim, quote, wishes = Simulated(tmp_path / "r"), coarse(RUN_6), Interrupts()
    monkeypatch.setattr(budget.time, "monotonic", sim.monotonic)
    cap = Cap(None, quote.left(0) / 3600 + 0.3, None)
    sim.start(cap, 500)
    watch = Budget(cap, quote, fold(tmp_path / "r"), wishes, sim, trained=False)
    allowed = watch._allowed
    for step in range(STEPS):
        sim.now += 9.9 if step < 0.76 * STEPS else 40.0
        watch.emit("train.step", step=step, rows=8, ms=9900 if step < 0.76 * STEPS else 40_000)
        if wishes.count:
            break
    left = allowed - (sim.now - watch._began)
    assert step > 0.8 * STEPS and quote.reserve - 40 <= left <= quote.reserve


def test_a_quote_above_the_cap_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sim = Simulated(tmp_path / "r")
    monkeypatch.setattr(budget.time, "monotonic", sim.monotonic)
    cap = Cap(30.0, None, Price(23.6, "--price"))
    sim.start(cap, 500)
    with pytest.raises(UsageError) as refused:
        Budget(cap, RUN_6, fold(tmp_path / "r"), Interrupts(), sim, trained=False)
    left = f"${quote_left(RUN_6):.2f}"
    assert str(refused.value) == (
        f"--max-usd 30 does not pay for this run, which is quoted at {left} more at $23.60 an hour (--price) where"
        " $26.72 are left: give more, or see `speedrun plan` for what takes less"
    )


def quote_left(quote: Quote) -> float:
    """Dollars at $23.60 an hour of everything but the boot, which was paid already."""
    return sum(23.6 / 60 * (stage.low + stage.high) / 2 for stage in quote.stages if stage.name != money.BOOT)


@pytest.mark.slow
def test_a_run_that_its_cap_stopped_goes_on_when_it_is_given_more(tmp_path: Path, speedrun) -> None:
    words = ("-o", "train.steps=200", "-o", "train.checkpoint_every=0")
    whole, capped = tmp_path / "whole", tmp_path / "capped"
    speedrun(speedrun.tiny("pretrain", whole, *words))
    shutil.copytree(whole / "prepared", capped / "prepared")
    hours = f"{(Quote.of(resolve('smoke'), Machine(), 1).reserve + 6) / 3600:.5f}"
    stopped = speedrun(speedrun.tiny("run", capped, *words, "--max-hours", hours), code=20)
    why = r"(is reached|would be passed by the [\d,]+ steps that are left)"
    finish = r"0\.0\d hours are spent, and finishing takes about \d+ minutes more \(0\.0\d hours\)"
    kept = r"what is sealed is kept, and the same command with --max-hours 0\.\d goes on from there"
    sentence = rf"^speedrun: --max-hours {float(hours):g} {why}: {finish}; {kept}$"
    assert re.search(sentence, stopped.stderr, re.MULTILINE), stopped.stderr
    speedrun(speedrun.tiny("run", capped, *words, "--max-hours", "5", "--price", "24", "--export"))
    assert _weights(capped) == _weights(whole)
    result, paper = (json.loads((capped / "runs/t/report" / f"{n}.json").read_text()) for n in ("result", "receipt"))
    assert sum(Decimal(row["usd"]) for row in paper["rows"]) == Decimal(paper["usd"]) == Decimal(str(result["usd"]))
    assert result["clocks"]["billed_s"] >= result["clocks"]["node_s"] - 1
    for page in ("report.html", "report.md"):
        text = (capped / "runs/t/report" / page).read_text()
        assert f"${paper['usd']} for" in text and "our clock times your price, not your invoice" in text


def _weights(out: Path) -> bytes:
    newest = max((out / "runs" / "t" / "checkpoints").iterdir())
    return b"".join(file.read_bytes() for file in sorted(newest.glob("weights-*")))
