"""Processes that stand still: who is named, and when not; processes that said an error and do not end."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from job.console import Console
from job.errors import DataError
from job.reporter import RankReporter, Reporter
from job.run import silence
from job.run.fruitless import RankDied
from job.run.processes import LocalRank
from job.run.supervise import Interrupts, supervise

RANK = """
import json, os, signal, sys, threading, time
from pathlib import Path
from job.reporter import RankReporter
from job.train.context import StopSignal
import faulthandler

faulthandler.register(signal.SIGUSR1, all_threads=True)
reporter = RankReporter(os.fdopen(int(os.environ["SPEEDRUN_EVENTS_FD"]), "w"))
reporter.BEAT_SECONDS = 0.1
reporter.send_beats()
StopSignal(reporter.send_beat).listen()
for word in sys.argv[1:]:
    match word.split("="):
        case ["works", seconds]:
            for number in range(int(10 * float(seconds))):
                reporter.beat(f"step {number}")
                time.sleep(0.1)
        case ["compiles", seconds]:
            reporter.beat("compiling", long=True)
            time.sleep(float(seconds))
        case ["waits"]:
            reporter.beat("the exchange of step 5", waits=True)
            time.sleep(60)
        case ["loops"]:
            reporter.beat("step 5")
            while True:
                pass
        case ["stops"]:
            reporter.beat("step 5", waits=True)
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)
        case ["breaks"]:
            reporter.send({"broken": "its weights before step 40 differ", "who": "rank 7", "device": True})
            raise RuntimeError
        case ["whole"]:
            reporter.send({"whole": "a5"})
        case ["fails"]:
            reporter.send({"error": [11, "bad rows"]})
            time.sleep(60)
"""


A_RANK = ("-m", "a_rank")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "ANSWER", 1.0)


def run_ranks(folder: Path, *programs: str, seconds: float = 1.0, **given: object) -> None:
    (folder / "a_rank.py").write_text(RANK)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    ranks = [
        LocalRank(f"rank {number}", program.split(), environment, folder / f"{number}.log", program=A_RANK)
        for number, program in enumerate(programs)
    ]
    interrupts = Interrupts()
    supervise(
        "pretrain", ranks, reporter=Reporter(), console=Console(-1), interrupts=interrupts, silence=seconds, **given
    )


@pytest.mark.parametrize(
    ("programs", "named"),
    [
        (("works=0.5 waits", "works=0.5 stops"), r"rank 1 of pretrain fell silent \(it last said: step 5\)"),
        (("works=0.5 loops", "works=0.5 waits"), r"rank 0 of pretrain fell silent \(at: step 5\)"),
        (("waits", "waits"), r"rank 0 and rank 1 of pretrain fell silent \(at: the exchange of step 5\)"),
        (("loops",), r"rank 0 of pretrain fell silent"),
    ],
)
def test_the_rank_that_did_not_arrive_is_named(tmp_path: Path, programs: tuple[str, ...], named: str) -> None:
    with pytest.raises(
        RankDied, match=named + r".*, and no rank got on for 1 s \(train.silence_seconds=1\); the stacks are in"
    ) as died:
        run_ranks(tmp_path, *programs)
    assert died.value.death.signal == "silence"
    for number in range(len(programs)):
        assert re.search(r'a_rank.py", line \d+ in <module>', (tmp_path / f"{number}.log").read_text())


def test_while_one_gets_on_none_is_silent(tmp_path: Path) -> None:
    run_ranks(tmp_path, "works=3", "works=0.1")


def test_what_is_known_to_take_long_may(tmp_path: Path) -> None:
    run_ranks(tmp_path, "compiles=2 works=0.2")
    with pytest.raises(RankDied, match=r"at: compiling"):
        run_ranks(tmp_path, "compiles=60", seconds=0.5)


def test_on_several_nodes_another_one_may_know_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "ELSEWHERE", 30.0)
    asked = threading.Event()

    def another_node_says() -> None:
        if asked.is_set():
            raise DataError("node 1 says which")

    threading.Timer(4.0, asked.set).start()
    with pytest.raises(DataError):
        run_ranks(tmp_path, "waits", meanwhile=another_node_says, alone=False)


def test_an_error_that_was_said_wins_over_a_process_that_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.run.supervise.GRACE", 3.0)
    with pytest.raises(DataError, match="bad rows"):
        run_ranks(tmp_path, "fails", "waits", seconds=1)


def test_a_device_that_is_broken_is_named_by_whoever_knows(tmp_path: Path) -> None:
    with pytest.raises(RankDied, match=r"the device of rank 7 failed in pretrain \(its weights before step 40") as died:
        run_ranks(tmp_path, "breaks", "works=5", seconds=60)
    assert died.value.death.device


def test_what_takes_long_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(silence, "STILL_EVERY", 0.5)
    (tmp_path / "a_rank.py").write_text(RANK)
    rank = LocalRank("rank 0", ["compiles=2"], os.environ | {"PYTHONPATH": str(tmp_path)}, tmp_path / "log", A_RANK)
    supervise("pretrain", [rank], reporter=Reporter(), console=Console(), interrupts=Interrupts(), silence=9)
    assert "pretrain: compiling, nothing new for 1 s" in capsys.readouterr().err


def test_a_killed_process_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    (tmp_path / "a_rank.py").write_text("import time; time.sleep(60)")
    rank = LocalRank("rank 0", [], os.environ | {"PYTHONPATH": str(tmp_path)}, tmp_path / "log", A_RANK)
    began = time.monotonic()
    rank.kill()
    assert rank.poll() == -signal.SIGKILL and time.monotonic() - began < 10


def test_the_stage_does_not_wait_for_what_may_be_left(tmp_path: Path) -> None:
    began = time.monotonic()
    run_ranks(tmp_path, "works=0.5", "whole works=60", seconds=60)
    assert time.monotonic() - began < 30


def test_a_beat_costs_microseconds_of_the_thread_that_trains() -> None:
    """Two a step; what is allowed is a millisecond of a step."""
    with open(os.devnull, "w") as nowhere:
        reporter = RankReporter(nowhere)
        began = time.thread_time()
        for step in range(1000):
            reporter.beat(f"step {step}")
            reporter.beat(f"the exchange of step {step}", waits=True)
        assert time.thread_time() - began < 1.0
