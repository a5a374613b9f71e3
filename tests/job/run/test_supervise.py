"""What the supervisor tells a node's first rank, and when it does not wait for it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from job.console import Console
from job.errors import InterruptedRun
from job.reporter import Reporter
from job.run.processes import GRACE, LocalRank
from job.run.supervise import Interrupts, supervise

RANK = """
import json, os, sys, time

pipe = os.fdopen(int(os.environ["SPEEDRUN_EVENTS_FD"]), "w")

def send(**message):
    pipe.write(json.dumps(message) + "\\n")
    pipe.flush()

if "training" in sys.argv:
    send(training=3, steps_to_stop=8)
if "slow" in sys.argv:
    send(kind="train.step", ms=8500)
send(kind="up")
send(kind="told", **json.loads(sys.stdin.readline()))
time.sleep(60 if "deaf" in sys.argv else 4 if "slow" in sys.argv else 0)
"""


class Heard(Reporter):
    def __init__(self, interrupts: Interrupts, signal: bool) -> None:
        self.told: list[dict[str, Any]] = []
        self._interrupts, self._signal = interrupts, signal

    def emit(self, kind: str, **fields: Any) -> None:
        if kind == "told":
            self.told.append(fields)
        if kind == "up" and self._signal:
            self._interrupts.count, self._interrupts.name = 1, "SIGTERM"


class Due:
    """A clock of checkpoints: with `once`, one is due as soon as training has begun."""

    def __init__(self, once: bool) -> None:
        self.once, self.is_due = once, False

    seconds = 12.0

    def check(self) -> None: ...

    def due(self) -> bool:
        return self.is_due

    def restart_clock(self) -> None:
        self.is_due = self.once and not self.is_due


@pytest.fixture
def rank(tmp_path: Path, request: pytest.FixtureRequest) -> LocalRank:
    (tmp_path / "a_rank.py").write_text(RANK)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    return LocalRank("rank 0", request.param, environment, tmp_path / "log", program=("-m", "a_rank"))


def tell(rank: LocalRank, *, signal: bool) -> list[dict[str, Any]]:
    interrupts = Interrupts()
    heard = Heard(interrupts, signal)
    supervise("pretrain", [rank], reporter=heard, console=Console(-1), interrupts=interrupts, manager=Due(not signal))
    return heard.told


@pytest.mark.parametrize("rank", [["training"]], indirect=True)
@pytest.mark.parametrize(("signal", "told"), [(True, "stop"), (False, "checkpoint")])
def test_the_first_rank_is_told_in_one_line(rank: LocalRank, signal: bool, told: str) -> None:
    assert tell(rank, signal=signal) == [{"do": told}]


@pytest.mark.parametrize("rank", [["deaf"]], indirect=True)
def test_before_the_first_step_there_is_nothing_to_save_and_a_signal_ends_it_at_once(rank: LocalRank) -> None:
    began = time.monotonic()
    with pytest.raises(InterruptedRun, match="pretrain was interrupted; what is sealed is kept"):
        tell(rank, signal=True)
    assert time.monotonic() - began < GRACE and rank.process.wait(5) == -9


@pytest.mark.parametrize("rank", [["training", "slow"]], indirect=True)
def test_a_stop_is_waited_for_as_long_as_steps_and_checkpoint_take(
    rank: LocalRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight steps of 8.5 s and 12 s of writing, run6 on one GPU: far longer than GRACE, which is what a CPU gets."""
    monkeypatch.setattr("job.run.supervise.GRACE", 1.0)
    assert tell(rank, signal=True) == [{"do": "stop"}]
    assert rank.process.wait(5) == 0, "it was not killed"


@pytest.mark.parametrize("rank", [["training", "slow"]], indirect=True)
def test_where_a_checkpoint_does_not_fit_none_is_begun(rank: LocalRank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEEDRUN_STOP_SECONDS", "30")
    with pytest.raises(InterruptedRun, match="a checkpoint would take about 80 s of the 30 s that there are"):
        tell(rank, signal=True)
    assert rank.process.wait(5) == -9
