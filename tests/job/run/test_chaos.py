"""Signals at every moment, and ranks that stop, loop, die or hang after an error in every stage: the right exit code in
time, and nothing lost."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from helpers import events, wait_for_event, weights
from job.store.attempt import fold

pytestmark = pytest.mark.slow
GRACE = 20.0
"""seconds from a signal to the end, as the table of exit codes has it"""
MOMENTS = (
    ("stage.started", {"stage": "prepare"}),
    ("prepare.tokenizer", {}),
    ("stage.started", {"stage": "pretrain"}),
    ("train.start", {}),
    ("train.step", {}),
    ("checkpoint.sealed", {}),
    ("upload.done", {}),
    ("stage.started", {"stage": "evaluate"}),
    ("eval.task", {}),
    ("stage.started", {"stage": "report"}),
    ("stage.done", {"stage": "report"}),
)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(scope="module")
def undisturbed(speedrun: Any, finished: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Finished runs of one rank and of two, which share what was prepared."""
    out = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(finished.out / "prepared", out / "prepared")
    speedrun(speedrun.tiny("run", out, "--ranks", "2"))
    return {1: finished.out, 2: out}


@pytest.mark.parametrize(("ranks", "moments"), [(1, MOMENTS), (2, MOMENTS[2:-2])])
def test_a_signal_at_any_moment_is_75_in_time_and_the_same_command_goes_on(
    undisturbed: dict[int, Path], tmp_path: Path, speedrun: Any, ranks: int, moments: tuple
) -> None:
    """One run is signalled at each moment in turn (of two ranks, in the stages that have them); those that come when
    all is sealed may be answered with 0."""
    if ranks == 2:
        shutil.copytree(undisturbed[2] / "prepared", tmp_path / "out" / "prepared")
    words = speedrun.tiny("run", tmp_path / "out", "--ranks", str(ranks), "--bucket", str(tmp_path / "bucket"))
    for attempt, (kind, fields) in enumerate(moments, 1):
        process = speedrun.start(words)
        wait_for_event(tmp_path / "out", process, kind, attempt=attempt, **fields)
        process.send_signal(SIGNALS[attempt % len(SIGNALS)])
        began = time.monotonic()
        _, said = process.communicate(timeout=90)
        assert "Traceback" not in said, said
        assert process.returncode == 75 or (fields == {"stage": "report"} and process.returncode == 0), said
        assert time.monotonic() - began < GRACE, (kind, said)
        if process.returncode == 0:
            break
    speedrun(words)
    assert weights(tmp_path / "out") == weights(undisturbed[ranks])
    mine, other = (fold(out / "runs" / "t") for out in (tmp_path / "out", undisturbed[ranks]))
    assert {s: e["loss"] for s, e in mine.steps.items()} == {s: e["loss"] for s, e in other.steps.items()}
    assert mine.bpb["bpb"] == other.bpb["bpb"] and mine.score["metric"] == other.score["metric"]


FAULT = """
import os, signal, sys, time
words = open("/proc/self/cmdline", "rb").read().decode().split("\\0")
stage, kind, rank = os.environ["FAULT"].split()
if "job.run.rank" in words and stage in words and os.environ.get("RANK") == rank:
    import atexit
    import job.reporter
    from job.errors import DataError
    from job.reporter import RankReporter

    def failing(method):
        def called(self, *given, **named):
            called.times = getattr(called, "times", 0) + 1
            method(self, *given, **named)
            if called.times != 3:
                return
            if kind == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            if kind == "loops":
                while True:
                    pass
            if kind == "dies":
                os.kill(os.getpid(), signal.SIGSEGV)
            atexit.register(time.sleep, 600)
            raise DataError("bad rows, says a test")
        return called

    if stage == "prepare":
        RankReporter.progress = failing(RankReporter.progress)
    else:
        RankReporter.beat = failing(RankReporter.beat)
"""
SILENCE = 6
"""seconds, three times as many in prepare and in evaluation on a CPU"""


@pytest.mark.parametrize("kind", ["stops", "loops", "dies", "fails"])
@pytest.mark.parametrize("stage", ["prepare", "pretrain", "evaluate"])
def test_a_rank_that_is_lost_in_any_stage_ends_the_run_with_the_right_code(
    undisturbed: dict[int, Path], tmp_path: Path, speedrun: Any, stage: str, kind: str
) -> None:
    out, site = tmp_path / "out", tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(FAULT)
    if stage != "prepare":
        shutil.copytree(undisturbed[2], out)
        for folder in ("eval", "report", *(["checkpoints"] if stage == "pretrain" else [])):
            shutil.rmtree(out / "runs" / "t" / folder)
    rank = 0 if stage == "prepare" else 1
    path = f"{site}:{speedrun.environment()['PYTHONPATH']}"
    faulty = dataclasses.replace(speedrun, variables={"FAULT": f"{stage} {kind} {rank}", "PYTHONPATH": path})
    words = speedrun.tiny("run", out, "--ranks", "2", "-o", f"train.silence_seconds={SILENCE}")
    process = faulty.start(words)
    wait_for_event(out, process, "stage.started", stage=stage, attempt=1 if stage == "prepare" else 2)
    began = time.monotonic()
    _, said = process.communicate(timeout=180)
    last = said.splitlines()[-1]
    assert process.returncode == (11 if kind == "fails" else 75), said
    expected = {
        "stops": f"speedrun: rank {rank} of {stage} fell silent (it last said: ",
        "loops": f"speedrun: rank {rank} of {stage} fell silent (at: ",
        "dies": f"speedrun: rank {rank} of {stage} was killed by SIGSEGV",
        "fails": "speedrun: bad rows, says a test",
    }[kind]
    assert last.startswith(expected), last
    start = 30  # of processes, on a busy machine
    assert time.monotonic() - began < start + (1 if stage == "pretrain" else 3) * SILENCE + 10 + 15 * (kind == "fails")
    ended = events(out, "attempt.ended")[-1]
    assert ended["reason"] in last and ("died" in ended) == (kind != "fails")
    speedrun(speedrun.tiny("run" if stage == "evaluate" else "pretrain", out, "--ranks", "2"))
    assert weights(out) == weights(undisturbed[2])
