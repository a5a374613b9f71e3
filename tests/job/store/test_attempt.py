"""Attempts and events: one winner per number, readable after a crash in mid-line, each step once in the clocks."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.errors import UsageError
from job.recipe.leaderboard import UNTIMED_STEPS
from job.store.attempt import Attempt, fold, newest_attempt, read_events
from job.store.documents import hashed


def _claim(run: Path, queue: multiprocessing.Queue) -> None:
    queue.put(Attempt.claim(run).number)


def test_racing_claims_each_win_another_number(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    claimants = [context.Process(target=_claim, args=(tmp_path, queue)) for _ in range(4)]
    for claimant in claimants:
        claimant.start()
    numbers = sorted(queue.get(timeout=60) for _ in claimants)
    for claimant in claimants:
        claimant.join()
    assert numbers == [1, 2, 3, 4]


def test_an_older_attempt_learns_who_took_over(tmp_path: Path) -> None:
    old = Attempt.claim(tmp_path)
    old.check_newest()
    new = Attempt.claim(tmp_path)
    new.check_newest()
    assert newest_attempt(tmp_path) == 2
    with pytest.raises(UsageError, match="attempt 2 took over"):
        old.check_newest()


def _attempt(run: Path, end: bool, queue: multiprocessing.Queue) -> None:
    attempt = Attempt.claim(run)
    if end:
        attempt.emit("attempt.ended", exit_code=0, reason="done")
    queue.put((attempt.number, os.getpid()))
    time.sleep(600)


@pytest.mark.parametrize("state", ["alive", "ended", "killed", "of another machine", "damaged"])
def test_an_attempt_knows_of_a_rival_on_this_machine(tmp_path: Path, state: str) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_attempt, args=(tmp_path, state == "ended", queue), daemon=True)
    process.start()
    number, pid = queue.get(timeout=60)
    claim = tmp_path / "attempts" / str(number)
    if state == "killed":
        process.kill()
        process.join()
    if state == "of another machine":
        claim.write_text(json.dumps(hashed(json.loads(claim.read_bytes()) | {"host": "elsewhere"})))
    if state == "damaged":
        claim.write_bytes(b"{")
    told = f"attempt {number} of this run goes on in process {pid}: it will stop, and this one takes over"
    assert Attempt.claim(tmp_path).rival() == (told if state == "alive" else "")
    assert Attempt.claim(tmp_path).rival() == "", "this process made the one before"
    process.kill()


@pytest.mark.parametrize("cut", range(2, 40, 7))
def test_events_are_readable_after_a_crash_in_mid_line(tmp_path: Path, cut: int) -> None:
    attempt = Attempt.claim(tmp_path)
    attempt.emit("train.step", step=0, rows=8, loss=1.0, ms=5.0, text="größer")
    attempt.emit("train.step", step=1, rows=16, loss=0.9, ms=5.0)
    attempt.close()
    file = tmp_path / "events" / "1.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    later = Attempt.claim(tmp_path)
    later.emit("stage.started", stage="pretrain")
    assert [e["kind"] for e in read_events(tmp_path)] == ["train.step", "stage.started"]
    assert [e["attempt"] for e in read_events(tmp_path)] == [1, 2]


def test_clocks_count_a_redone_step_once_and_leave_out_the_first_eleven(tmp_path: Path) -> None:
    first = Attempt.claim(tmp_path)
    for step in range(20):
        first.emit("train.step", step=step, rows=step, loss=1.0, ms=100.0)
    second = Attempt.claim(tmp_path)
    for step in range(15, 25):
        second.emit("train.step", step=step, rows=step, loss=1.0, ms=50.0)
    record = fold(tmp_path)
    assert record.training_seconds == pytest.approx(((15 - UNTIMED_STEPS) * 100 + 10 * 50) / 1000)
    assert [life.number for life in record.attempts] == [1, 2]
    assert record.steps[15]["attempt"] == 2


def test_stages_and_endings(tmp_path: Path) -> None:
    attempt = Attempt.claim(tmp_path)
    attempt.emit("stage.started", stage="prepare")
    attempt.emit("stage.done", stage="prepare", seconds=1.0)
    attempt.emit("stage.started", stage="pretrain")
    attempt.emit("attempt.ended", exit_code=75, reason="stopped")
    record = fold(tmp_path)
    assert [(span.stage, span.end is None) for span in record.stages] == [("prepare", False), ("pretrain", True)]
    assert (record.attempts[0].exit_code, record.attempts[0].reason) == (75, "stopped")
    assert set(record.stage_seconds()) == {"prepare", "pretrain"}


def test_each_line_is_one_json_object_with_time_attempt_and_sequence(tmp_path: Path) -> None:
    attempt = Attempt.claim(tmp_path)
    attempt.emit("a")
    attempt.emit("b", x=1)
    lines = [json.loads(line) for line in (tmp_path / "events" / "1.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["seq"], e["attempt"]) for e in lines] == [("a", 0, 1), ("b", 1, 1)]
    assert lines[1]["x"] == 1
    assert lines[0]["t"] <= lines[1]["t"]


def test_a_clock_that_is_set_back_changes_dates_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = []
    for name, dates in (("right", (1000.0, 1000.0, 2000.0)), ("set", (9000.0, 500.0, 30.0))):
        for number, seconds in enumerate((0.0, 7.0), 1):
            monkeypatch.setattr(time, "monotonic", lambda now=seconds: now)
            monkeypatch.setattr(time, "time", lambda now=dates[0]: now)
            attempt = Attempt.claim(tmp_path / name)
            attempt.emit("stage.started", stage="prepare")
            monkeypatch.setattr(time, "monotonic", lambda now=seconds: now + 5.0)
            monkeypatch.setattr(time, "time", lambda now=dates[number]: now)
            attempt.emit("stage.done", stage="prepare")
        records.append(fold(tmp_path / name))
    assert [record.node_seconds for record in records] == [10.0, 10.0]
    assert [record.stage_seconds() for record in records] == [{"prepare": 10.0}] * 2
    assert all(a.end <= b.start for record in records for a, b in itertools.pairwise(record.attempts))


def test_what_is_done_to_a_run_that_has_its_score_takes_no_time_of_its(tmp_path: Path) -> None:
    for _ in range(3):
        attempt = Attempt.claim(tmp_path)
        attempt.emit("stage.started", stage="evaluate")
        attempt.emit("eval.done", name="core", metric=0.1)
        attempt.emit("stage.done", stage="evaluate")
    record = fold(tmp_path)
    assert [life.again for life in record.attempts] == [False, True, True]
    first = record.attempts[0]
    assert record.node_seconds == first.end - first.start
    assert record.stage_seconds() == {"evaluate": record.stages[0].end - first.start}


def test_a_line_that_was_changed_or_comes_twice_is_passed_over_and_counted(tmp_path: Path) -> None:
    attempt = Attempt.claim(tmp_path)
    for step in range(3):
        attempt.emit("train.step", step=step, rows=step, loss=1.25, ms=5.0)
    file = tmp_path / "events" / "1.jsonl"
    first, second, third = file.read_text().splitlines()
    file.write_text("\n".join([first, second.replace("1.25", "1.35"), third, third, "[]", "{", ""]))
    record = fold(tmp_path)
    assert sorted(record.steps) == [0, 2] and len(record.unusable) == 4


def test_after_a_full_disk_the_next_event_is_readable(tmp_path: Path) -> None:
    """RLIMIT_FSIZE cuts a line short as a full disk does; what is written once there is space again stands on a line of
    its own."""
    script = """
import resource, signal, sys
from pathlib import Path
from job.store.attempt import Attempt
from job.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
attempt = Attempt.claim(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
for text in ("x" * 500, "y" * 500):
    try:
        attempt.emit("long", text=text)
    except StorageError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
attempt.emit("after")
attempt.close()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    said = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True).stdout
    assert said.count("the disk is full: writing ") == 2
    assert [e["kind"] for e in read_events(tmp_path)] == ["after"]
