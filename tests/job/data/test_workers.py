"""Tasks in processes: results, errors and deaths."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import is_alive, wait_for
from job.data.workers import run_tasks
from job.errors import ChildDied, DataError, InterruptedRun


@dataclasses.dataclass(frozen=True)
class Square:
    name: str
    number: int

    def run(self, advance):
        try:
            advance(self.number)
            if self.number == 13:
                raise DataError("thirteen is bad; take another number")
            if self.number == 99:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.number == 77:
                raise ZeroDivisionError
            if self.number == 55:
                os.kill(os.getpid(), signal.SIGTERM)
            if self.number == 1000:
                time.sleep(100)
            return self.number**2, os.getpid()
        finally:
            if self.number == 1000:
                Path(self.name).write_text("cleaned up")


def squares(*numbers):
    return [Square(str(number), number) for number in numbers]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_result_comes_once_with_its_index(workers):
    shown: list[int] = []
    results = dict(run_tasks(squares(3, 4, 5), workers, shown.append))
    assert {index: value for index, (value, _) in results.items()} == {0: 9, 1: 16, 2: 25} and shown == sorted(shown)
    assert shown[-1] == 12
    pids = {pid for _, pid in results.values()}
    assert pids == {os.getpid()} if workers == 1 else os.getpid() not in pids and len(pids) <= 2


@pytest.mark.parametrize("workers", [1, 2])
def test_an_expected_failure_arrives_as_it_was_raised(workers):
    with pytest.raises(DataError, match="thirteen is bad; take another number"):
        list(run_tasks(squares(1, 13), workers, lambda _: None))


def test_a_process_that_was_killed_is_one_sentence():
    with pytest.raises(ChildDied, match="a process that packs was ended by SIGKILL"):
        list(run_tasks(squares(1, 99), 2, lambda _: None))


def test_a_bug_is_not_a_sentence():
    with pytest.raises(ZeroDivisionError):
        list(run_tasks(squares(1, 77), 2, lambda _: None))


def test_a_process_that_was_told_to_stop_can_be_resumed():
    with pytest.raises(InterruptedRun, match="that packs was told to stop; run the same command again"):
        list(run_tasks(squares(1, 55), 2, lambda _: None))


def test_the_others_clean_up_when_the_work_is_given_up(tmp_path):
    def show(done):
        if done >= 1000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_tasks([Square(str(tmp_path / "mark"), 1000), *squares(2)], 2, show))
    assert (tmp_path / "mark").read_text() == "cleaned up"


ORPHANS = """
import os, time
from job.data import workers

workers.UNWIND_SECONDS = 0.5

class Result:
    def __reduce__(self):
        print(os.getpid(), flush=True)
        time.sleep(100)

class Task:
    def run(self, advance):
        return Result()

if __name__ == "__main__":
    list(workers.run_tasks([Task(), Task()], 2, print))
"""


def test_without_a_parent_one_ends_even_while_the_pool_passes_its_result_on(tmp_path):
    """The pool catches what the signal raises there."""
    (tmp_path / "orphans.py").write_text(ORPHANS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, str(tmp_path / "orphans.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    wait_for(lambda: not any(map(is_alive, workers)), 30)


def test_nothing_to_do():
    assert list(run_tasks([], 2, lambda _: None)) == []
