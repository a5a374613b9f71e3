"""Training beside the feeder: rows come while they are consumed, the same ones, or not at all and visibly."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from job.data import rows as reading
from job.data.feed import NICENESS, Job, feeding, training_rows
from job.data.hub import DATASETS, Dataset
from job.data.lock import alone, is_being_made
from job.data.prepare import Prepared
from job.data.rows import Rows
from job.errors import DataError
from job.reporter import Reporter
from job.store.sealed import is_sealed

SHARD = "shard_{:05d}.parquet".format


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and "begun" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def begun(hub, tmp_path, helpers, monkeypatch) -> Prepared:
    """The dataset is as long as it really is (a process of its own knows no other), though the hub has only its first
    shards."""
    monkeypatch.setitem(DATASETS, "climbmix", Dataset("karpathy/climbmix-400b-shuffle", 6543))
    hub.serve(SHARD(6542), hub.files[SHARD(5)])
    return helpers.small_prepare(tmp_path / "out", helpers.of_the_hub(tokenizer_chars=20_000), rows=1000, whole=False)


@pytest.fixture
def job(tmp_path, helpers) -> Job:
    return Job(tmp_path / "out", helpers.of_the_hub(tokenizer_chars=20_000), 32, 1, 1000)


def test_begun_is_what_training_starts_with(begun, hub):
    assert not begun.is_whole and {path.name for path in begun.path.iterdir()} == {
        "split",
        "tokenizer",
        "val",
        "rows",
        "begun",
    }
    assert [path.parent.name for path in begun.row_files] == ["00000"] and begun.train_rows == 1000
    assert begun.held_out_documents() and len(begun.val) and begun.tokenizer.vocab_size == 400
    again = Prepared.open(begun.path)
    assert (again.id, again.facts) == (begun.id, begun.facts) and begun.id == begun.path.name
    assert set(hub.fetched()) == {SHARD(0), SHARD(6542)}


def test_rows_wait_visibly_for_what_is_being_made(begun, job, tmp_path, helpers):
    """The whole set is made in a thread while rows are taken; what is taken is what the finished set holds."""
    recorder = helpers.Recorder()
    rows = Rows(begun, 1, reporter=recorder)
    first = len(rows)
    thread = threading.Thread(target=lambda: helpers.small_prepare(job.out, job.data, rows=job.rows))
    taken = [rows.take(start, 100) for start in range(0, first - 100, 100)]
    thread.start()
    taken.append(rows.take(len(taken) * 100, 1000 - len(taken) * 100))
    thread.join()
    whole = Prepared.open(begun.path)
    assert whole.is_whole and whole.id == begun.id and whole.train_rows >= 1000
    assert np.array_equal(np.concatenate(taken), Rows(whole, 1).take(0, 1000))
    assert {shown[0] for shown in recorder.shown} == {"waiting for rows"} and recorder.shown[0][1:] == (
        first,
        1000,
        "rows",
    )
    assert [kind for kind, _ in recorder.events] == ["train.waited"] and recorder.events[0][1]["seconds"] > 0
    assert sum(map(len, rows.chunks(10**6))) == len(rows) == whole.train_rows
    expected = helpers.small_prepare(tmp_path / "at once", job.data, rows=1000)
    assert contents(expected.path) == contents(begun.path)


def test_rows_that_nobody_makes_are_an_error(begun, monkeypatch):
    monkeypatch.setattr(reading, "PATIENCE_SECONDS", 0.5)
    rows = Rows(begun, 1)
    with pytest.raises(DataError, match=r"row \d+ is not below .* and nobody is making it; run the same command again"):
        rows.take(0, 1000)
    with alone(begun.path, Reporter()):
        assert is_being_made(begun.path)
        rows = Rows(begun, 1, check=failing_after(5))
        with pytest.raises(ZeroDivisionError):
            rows.take(0, 1000)
    assert not is_being_made(begun.path)


def failing_after(count: int):
    def check():
        nonlocal count
        count -= 1
        if not count:
            raise ZeroDivisionError

    return check


def test_two_that_prepare_the_same_take_turns(begun, job, helpers):
    recorder = helpers.Recorder()
    with alone(begun.path, recorder):
        thread = threading.Thread(target=lambda: helpers.small_prepare(job.out, job.data, rows=1, reporter=recorder))
        thread.start()
        time.sleep(0.5)
        assert not is_sealed(begun.path / "set")
    thread.join()
    assert is_sealed(begun.path / "set") and any("waiting for the process" in shown[0] for shown in recorder.shown)


def test_a_shorter_run_that_was_whole_is_begun_again_for_a_longer_one(hub, tmp_path, helpers):
    data = helpers.of_the_hub(tokenizer_chars=20_000)
    short = helpers.small_prepare(tmp_path, data, rows=10)
    assert short.is_whole and helpers.small_prepare(tmp_path, data, rows=10, whole=False).is_whole
    longer = helpers.small_prepare(tmp_path, data, rows=1000, whole=False)
    assert not longer.is_whole and longer.id == short.id and longer.train_rows == 1000
    assert helpers.small_prepare(tmp_path, data, rows=1000).train_rows >= 1000


# ---- the feeder in a process of its own


def test_a_feeder_process(begun, job, hub, helpers):
    recorder = helpers.Recorder()
    with (
        training_rows(begun, job, recorder, feeds=True) as rows,
        training_rows(begun, job, recorder, feeds=False) as others,
    ):
        taken = rows.take(0, 1000)
        assert np.array_equal(others.take(0, 1000), taken)
    whole = Prepared.open(begun.path)
    assert whole.is_whole and np.array_equal(taken, Rows(whole, 1).take(0, 1000))
    kinds = [kind for kind, _ in recorder.events]
    assert kinds.count("prepare.done") == 1 and kinds.count("prepare.rows") == len(whole.facts["files"]) - 1
    with feeding(whole, job, recorder) as feeder:
        assert feeder is None


def _note_niceness(prepared, reporter):
    (prepared.path / "niceness").write_text(str(os.nice(0)))


def test_the_feeder_leaves_the_cores_to_training(begun, job, hub, helpers):
    """What it starts has its niceness: packers, and the counter of leaks afterwards."""
    with feeding(begun, dataclasses.replace(job, afterwards=_note_niceness), helpers.Recorder()):
        pass
    assert int((begun.path / "niceness").read_text()) == min(19, os.nice(0) + NICENESS)


def test_a_feeders_failure_is_raised_where_training_waits(begun, job, hub, helpers):
    del hub.files[SHARD(1)]
    with (
        pytest.raises(DataError, match=f"{SHARD(1)} of .* cannot be fetched: HTTP 404"),
        feeding(begun, job, helpers.Recorder()) as feeder,
    ):
        Rows(begun, 1, check=feeder.check).take(0, 1000)


def test_a_feeder_that_is_killed_is_noticed_and_goes_on_the_next_time(begun, job, hub, helpers):
    with (
        pytest.raises(RuntimeError, match="the feeder ended with code -9"),
        feeding(begun, job, helpers.Recorder()) as feeder,
    ):
        os.kill(feeder._process.pid, signal.SIGKILL)
        Rows(begun, 1, check=feeder.check).take(0, 1000)
    with feeding(begun, job, helpers.Recorder()):
        pass
    assert Prepared.open(begun.path).is_whole


def test_training_that_ends_early_ends_the_feeder(begun, job, hub, helpers):
    with pytest.raises(KeyboardInterrupt), feeding(begun, job, helpers.Recorder()) as feeder:
        raise KeyboardInterrupt
    assert not feeder._process.is_alive() and not is_being_made(begun.path)
