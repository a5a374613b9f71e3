"""Training while the rest of its rows is prepared: they come while they are consumed, the same ones, or not at all and
visibly."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from job.console import Console
from job.data import rows as reading
from job.data.hub import DATASETS, Dataset
from job.data.lock import alone, is_being_made
from job.data.prepare import Prepared
from job.data.rows import Rows
from job.errors import DataError, InterruptedRun, StorageError
from job.recipe.config import resolve
from job.reporter import Reporter
from job.run import background as stage
from job.run.fruitless import RankDied
from job.run.launch import recipe_document
from job.run.nodes import LaunchSpec, NodeContext
from job.run.processes import GRACE, LocalRank
from job.run.supervise import Interrupts, supervise
from job.store import VARIABLE
from job.store.sealed import MANIFEST, is_sealed
from job.store.stores import FolderStore, push_sealed

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
def make_rest(begun, tmp_path, helpers):
    """Starts and supervises the process that makes the rest of `begun`; `meanwhile(process)` is called now and then."""
    keys = {"model.seq_len": "32", "train.total_batch_size": "32", "train.steps": "1000", "eval.core_bundle": ""}
    recipe = resolve("smoke", {key: ("-o", value) for key, value in keys.items()})
    recipe = dataclasses.replace(recipe, data=helpers.of_the_hub(tokenizer_chars=20_000))
    run = tmp_path / "out" / "runs" / "r"
    run.mkdir(parents=True)
    (run / "recipe.json").write_text(json.dumps(recipe_document(recipe, "r")))

    def make(recorder, meanwhile=lambda process: None) -> LocalRank:
        node = NodeContext(tmp_path / "out", run)
        process = node.start_background([str(node.out), str(run / "recipe.json"), str(run), "1", "", begun.id], 1)
        supervise(
            "pretrain",
            [process],
            reporter=recorder,
            console=Console(),
            interrupts=Interrupts(),
            meanwhile=lambda: meanwhile(process),
        )
        return process

    return make


@pytest.fixture
def again(tmp_path, helpers):
    """Prepares the same set in this process."""
    return lambda **options: helpers.small_prepare(
        tmp_path / "out", helpers.of_the_hub(tokenizer_chars=20_000), **options
    )


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
    assert (again.id, again.metadata) == (begun.id, begun.metadata) and begun.id == begun.path.name
    assert set(hub.fetched()) == {SHARD(0), SHARD(6542)}


def test_a_set_beside_which_no_lock_may_be_written_is_one_sentence(tmp_path, monkeypatch):
    def refuse(file, mode):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr("job.data.lock.open", refuse, raising=False)
    for ask in (lambda root: alone(root, Reporter()).__enter__(), is_being_made):
        with pytest.raises(
            StorageError, match=r"set\.lock cannot be written \(Permission denied\); give user \d+ write"
        ):
            ask(tmp_path / "set")


def test_rows_wait_visibly_for_what_is_being_made(begun, again, tmp_path, helpers):
    """The whole set is made in a thread while rows are taken; what is taken is what the finished set holds."""
    recorder = helpers.Recorder()
    rows = Rows(begun, 1, reporter=recorder)
    first = len(rows)
    thread = threading.Thread(target=lambda: again(rows=1000))
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
    data = helpers.of_the_hub(tokenizer_chars=20_000)
    expected = helpers.small_prepare(tmp_path / "at once", data, rows=1000)
    assert contents(expected.path) == contents(begun.path)


def test_rows_that_nobody_makes_are_an_error(begun, monkeypatch):
    monkeypatch.setattr(reading, "PATIENCE_SECONDS", 0.5)
    rows = Rows(begun, 1)
    with pytest.raises(DataError, match=r"row \d+ is not below .* and nobody is making it; run the same command again"):
        rows.take(0, 1000)
    with alone(begun.path, Reporter()):
        assert is_being_made(begun.path)
    assert not is_being_made(begun.path)


def test_two_that_prepare_the_same_take_turns(begun, again, helpers):
    recorder = helpers.Recorder()
    with alone(begun.path, recorder):
        thread = threading.Thread(target=lambda: again(rows=1, reporter=recorder))
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


# ---- in a process of its own


def test_the_rest_is_made_beside_training(begun, make_rest, hub, helpers):
    recorder = helpers.Recorder()
    taken: list[np.ndarray] = []
    training = threading.Thread(target=lambda: taken.append(Rows(begun, 1).take(0, 1000)))
    training.start()
    make_rest(recorder)
    training.join()
    whole = Prepared.open(begun.path)
    assert whole.is_whole and np.array_equal(taken[0], Rows(whole, 1).take(0, 1000))
    kinds = [kind for kind, _ in recorder.events]
    assert kinds.count("prepare.done") == 1 and kinds.count("prepare.rows") == len(whole.metadata["files"]) - 1


def test_it_leaves_the_cores_to_training(begun, make_rest, helpers):
    """It and what it starts are nice."""
    found = []

    def look(process) -> None:
        with contextlib.suppress(ProcessLookupError):
            found.append(os.getpriority(os.PRIO_PROCESS, process.process.pid))

    make_rest(helpers.Recorder(), look)
    assert max(found) == min(19, os.nice(0) + stage.NICENESS)


def test_its_failure_ends_the_stage_as_it_was_raised(begun, make_rest, hub, helpers):
    del hub.files[SHARD(1)]
    with pytest.raises(DataError, match=f"{SHARD(1)} of .* cannot be fetched: HTTP 404"):
        make_rest(helpers.Recorder())


def test_one_that_is_killed_is_noticed_and_the_next_goes_on(begun, make_rest, helpers):
    def kill(process) -> None:
        process.signal(signal.SIGKILL)

    with pytest.raises(RankDied, match="the process that prepares rows of pretrain was killed by SIGKILL"):
        make_rest(helpers.Recorder(), kill)
    make_rest(helpers.Recorder())
    assert Prepared.open(begun.path).is_whole


def test_a_stage_that_ends_early_ends_it(begun, make_rest, helpers):
    started = []

    def interrupt(process) -> None:
        started.append(process)
        raise InterruptedRun("stopped")

    with pytest.raises(InterruptedRun):
        make_rest(helpers.Recorder(), interrupt)
    assert started[0].poll() == -signal.SIGKILL and not is_being_made(begun.path)


def test_it_ends_with_the_supervisor(begun, make_rest, hub, helpers):
    """A killed supervisor's end of stdin closes."""
    hub.gate = lambda name: time.sleep(5)

    def close(process) -> None:
        process.process.stdin.close()

    with pytest.raises(RankDied):
        make_rest(helpers.Recorder(), close)
    assert not is_being_made(begun.path)


def test_when_its_workers_are_told_to_stop_training_has_the_time_to_save(monkeypatch):
    def told_to_stop(*_, **__):
        raise InterruptedRun("a process that packs was told to stop")

    slept = []
    monkeypatch.setattr(stage, "prepare_rows", told_to_stop)
    monkeypatch.setattr(stage.os, "nice", lambda _: 0)
    monkeypatch.setattr(stage.time, "sleep", slept.append)
    with pytest.raises(InterruptedRun):
        stage.main(None)
    assert slept == [GRACE]


def test_it_is_one_more_process_of_training_where_rows_are_missing(begun, again, tmp_path, monkeypatch):
    monkeypatch.setattr("job.run.nodes.start_ranks", lambda *_, **__: ["rank 0"])
    monkeypatch.setattr(NodeContext, "start_background", lambda *_: "background")
    node = NodeContext(tmp_path / "out", tmp_path / "out" / "runs" / "r")
    assert node.start(LaunchSpec("pretrain", 1, begun.id)) == ["rank 0", "background"]
    assert node.start(LaunchSpec("evaluate", 1, begun.id)) == ["rank 0"]
    again(rows=1000)
    assert node.start(LaunchSpec("pretrain", 1, begun.id)) == ["rank 0"]


def test_it_pulls_from_the_store_that_its_environment_names(begun, make_rest, hub, tmp_path, helpers, monkeypatch):
    data, store = helpers.of_the_hub(tokenizer_chars=20_000), FolderStore(tmp_path / "store")
    first = helpers.small_prepare(tmp_path / "first", data, rows=1000)
    for manifest in first.path.rglob(MANIFEST):
        push_sealed(store, manifest.parent.relative_to(tmp_path / "first").as_posix(), manifest.parent)
    hub.requests.clear()
    monkeypatch.setenv(VARIABLE, str(store.root))
    recorder = helpers.Recorder()
    make_rest(recorder)
    assert hub.requests == [] and Prepared.open(begun.path, verify=True).is_whole
    files = range(1, len(first.metadata["files"]))
    assert [fields["shard"] for _, fields in recorder.events if fields.get("pulled")] == [*map(SHARD, files)]
