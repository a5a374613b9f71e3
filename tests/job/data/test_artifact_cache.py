"""Parts of a prepared set that a store has are pulled and not made; what it lacks or has wrong is made, and the bytes
are the same."""

from __future__ import annotations

import hashlib
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from job.data.prepare import Prepared
from job.data.rows import Rows
from job.errors import DataError, StorageError
from job.evaluation.bundle import open_bundle
from job.evaluation.items import seal_items
from job.evaluation.leaks import seal_leaks
from job.evaluation.smoke_bundle import write_smoke_bundle
from job.recipe.config import resolve
from job.run import prepare as stage
from job.store.artifact_cache import Artifact, ArtifactCache
from job.store.sealed import MANIFEST, sealing
from job.store.stores import FolderStore, push_sealed

SHARD = "shard_{:05d}.parquet".format
ROWS = 1000


UNUSED = "rows/00003"
"""of the first set: packed because more rows were expected of the files before"""


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and UNUSED not in str(path) and path.name[0] != ".")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def push_all(store: FolderStore, out: Path, prepared: Prepared) -> None:
    for manifest in prepared.path.rglob(MANIFEST):
        push_sealed(store, manifest.parent.relative_to(out).as_posix(), manifest.parent)


def pulled(recorder) -> list[str]:
    return [fields.get("shard", "tokenizer") for _, fields in recorder.events if fields.get("pulled")]


def warnings(recorder) -> list[str]:
    return [fields["text"] for kind, fields in recorder.events if kind == "warning"]


@pytest.fixture
def data(helpers):
    return helpers.of_the_hub(tokenizer_chars=20_000)


def make_first(hub, folder: Path, helpers, data) -> Prepared:
    store = FolderStore(folder / "store")
    prepared = helpers.small_prepare(folder / "first", data, rows=ROWS, store=store)
    push_all(store, folder / "first", prepared)
    assert len(prepared.metadata["files"]) == 3
    hub.requests.clear()
    return prepared


@pytest.fixture
def first(hub, tmp_path, helpers, data) -> Prepared:
    """A set made on one machine, with a store that has all of it."""
    return make_first(hub, tmp_path, helpers, data)


@pytest.fixture
def store(first, tmp_path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def test_a_set_that_the_store_has_is_pulled_and_the_hub_is_not_asked(first, store, hub, tmp_path, helpers, data):
    recorder = helpers.Recorder()
    second = helpers.small_prepare(tmp_path / "second", data, rows=ROWS, store=store, reporter=recorder)
    assert hub.requests == [] and contents(second.path) == contents(first.path)
    assert pulled(recorder) == ["tokenizer", "held-out", *map(SHARD, range(3))]
    assert {shown[0] for shown in recorder.shown} == {"pull"} and recorder.shown[-1][1] == recorder.shown[-1][2] > 0


def test_a_shorter_run_pulls_only_its_rows_and_a_longer_one_makes_the_rest(first, store, hub, tmp_path, helpers, data):
    begun = helpers.small_prepare(tmp_path / "short", data, rows=1, whole=False, store=store)
    assert hub.requests == [] and [path.parent.name for path in begun.row_files] == ["00000"]
    recorder = helpers.Recorder()
    longer = helpers.small_prepare(tmp_path / "long", data, rows=0, store=store, reporter=recorder)
    there = len(
        list((first.path / "rows").iterdir())
    )  # 3, or 4 where the first files' rows let too few be expected of the next
    assert there < 5 and sorted(hub.fetched()) == [SHARD(shard) for shard in range(there, 5)]
    assert longer.id == first.id and len(pulled(recorder)) == 2 + there
    assert np.array_equal(Rows(longer, 1).take(0, first.train_rows), Rows(first, 1).take(0, first.train_rows))


def test_what_is_missing_or_damaged_there_is_made_here(first, store, hub, tmp_path, helpers, data):
    stored = store.root / "prepared" / first.id
    shutil.rmtree(stored / "rows" / "00001")
    file = stored / "rows" / "00002" / "rows.npy"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    recorder = helpers.Recorder()
    second = helpers.small_prepare(tmp_path / "second", data, rows=ROWS, store=store, reporter=recorder)
    assert contents(second.path) == contents(first.path) and set(hub.fetched()) == {SHARD(1), SHARD(2)}
    assert [text.endswith(f"prepared/{first.id}/rows/00002 is made here instead") for text in warnings(recorder)] == [
        True
    ]


def test_what_is_damaged_here_is_pulled_again(first, store, hub, tmp_path, helpers, data, monkeypatch):
    before = contents(first.path)
    file = first.path / "rows" / "00001" / "rows.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    monkeypatch.setattr("platform.node", lambda: "another machine")
    recorder = helpers.Recorder()
    again = helpers.small_prepare(tmp_path / "first", data, rows=ROWS, store=store, reporter=recorder)
    assert hub.requests == [] and pulled(recorder) == [SHARD(1)] and len(warnings(recorder)) == 1
    assert {name: hash for name, hash in contents(again.path).items() if not name.startswith((".", "rows/."))} == {
        name: hash for name, hash in before.items() if not name.startswith(".")
    }


def test_a_part_of_other_inputs_is_not_taken(first, store, tmp_path, helpers, data):
    stored = store.root / "prepared" / first.id / "rows"
    shutil.rmtree(stored / "00000")
    shutil.copytree(stored / "00001", stored / "00000")
    recorder = helpers.Recorder()
    second = helpers.small_prepare(tmp_path / "second", data, rows=ROWS, store=store, reporter=recorder)
    assert contents(second.path) == contents(first.path)
    assert ["was made from something else" in text for text in warnings(recorder)] == [True]


def test_a_set_is_pulled_by_its_id_and_nothing_is_made(first, store, hub, tmp_path, helpers):
    recorder, root = helpers.Recorder(), tmp_path / "second" / "prepared" / first.id
    second = stage.pull(root, store, recorder)
    wanted = {name: hash for name, hash in contents(first.path).items() if not name.startswith("split/")}
    assert hub.requests == [] and contents(second.path) == wanted
    assert [(kind, fields["id"]) for kind, fields in recorder.events] == [("prepare.done", first.id)]
    shutil.rmtree(root)
    rows = store.root / "prepared" / first.id / "rows"
    shutil.rmtree(rows / "00000")
    shutil.copytree(rows / "00001", rows / "00000")
    with pytest.raises(DataError, match="00000 belongs elsewhere"):
        stage.pull(root, store, recorder)
    shutil.copytree(root.parent / first.id, other := root.with_name("0" * 16))
    with pytest.raises(DataError, match="set belongs elsewhere"):
        stage.pull(other, store, recorder)
    shutil.rmtree(rows / "00000")
    shutil.rmtree(root)
    with pytest.raises(DataError, match="rows/00000 is not there or was never sealed"):
        stage.pull(root, store, recorder)
    assert hub.requests == []


def test_a_store_that_cannot_be_listed_is_a_warning(hub, tmp_path, helpers, data):
    class Broken(FolderStore):
        def list(self, prefix):
            raise StorageError("the bucket does not answer")

    recorder = helpers.Recorder()
    prepared = helpers.small_prepare(
        tmp_path / "out", data, rows=10, store=Broken(tmp_path / "store"), reporter=recorder
    )
    assert prepared.is_whole
    assert warnings(recorder) == ["the bucket does not answer; what is prepared there cannot be listed"]


def test_no_thread_changes_the_listing_while_it_is_summed_up(tmp_path, helpers, monkeypatch):
    class Listing(dict):
        def __delitem__(self, key):
            assert threading.current_thread() is threading.main_thread()
            super().__delitem__(key)

    store, root, recorder = FolderStore(tmp_path / "store"), tmp_path / "out" / "prepared" / "p", helpers.Recorder()
    for name, made_from in (("whole", "whole"), ("other", "foreign")):
        with sealing(tmp_path / name, kind="part", made_from={"name": made_from}) as folder:
            (folder.path / "data").write_text(name)
        push_sealed(store, f"prepared/p/{name}", tmp_path / name)
    listed = Listing(store.list("prepared/p"))
    monkeypatch.setattr(store, "list", lambda prefix: listed)
    artifacts = [Artifact(root / name, "part", {"name": name}) for name in ("whole", "other")]
    cache = ArtifactCache(store, root, recorder)
    assert [sealed.path.name for sealed, _ in cache.pull(artifacts)] == ["whole"]
    assert len(warnings(recorder)) == 1 and not cache.has(artifacts[1])


def test_every_machine_with_the_store_uses_its_commit(first, store, hub, tmp_path, helpers, data, monkeypatch):
    monkeypatch.setattr("job.data.hub.Hub._main", lambda self: b"never asked")
    shutil.rmtree(store.root / "prepared")
    again = helpers.small_prepare(tmp_path / "second", data, rows=10, store=store)
    assert again.id == first.id and (tmp_path / "second/text/climbmix/commit.json").read_bytes() == store.get(
        "text/climbmix/commit.json"
    )


def test_the_rest_of_a_begun_set_is_pulled(hub, tmp_path, helpers, data):
    first, out, store = make_first(hub, tmp_path, helpers, data), tmp_path / "second", FolderStore(tmp_path / "store")
    begun = helpers.small_prepare(out, data, rows=first.train_rows, whole=False, store=store)
    recorder = helpers.Recorder()
    whole = helpers.small_prepare(out, data, rows=first.train_rows, store=store, reporter=recorder)
    rows = Rows(first, 1).take(0, first.train_rows)
    assert np.array_equal(Rows(begun, 1).take(0, first.train_rows), rows) and hub.requests == []
    assert pulled(recorder) == [SHARD(1), SHARD(2)] and contents(whole.path / "set") == contents(first.path / "set")


def test_items_are_pulled(prepared, tmp_path, prose, helpers):
    (tmp_path / "bundle").mkdir()
    write_smoke_bundle(prose[:40], tmp_path / "bundle", seed=1)
    bundle, store = open_bundle(tmp_path / "bundle"), FolderStore(tmp_path / "store")
    roots = [tmp_path / name / "prepared" / prepared.id for name in ("first", "second")]

    def seal(root: Path, recorder):
        folder = root / "items" / bundle.id
        options = {
            "tokenizer_id": prepared.id,
            "cap": None,
            "reporter": recorder,
            "cache": ArtifactCache(store, root, recorder),
        }
        return seal_items(bundle, prepared.tokenizer, folder, **options)

    seal(roots[0], helpers.Recorder())
    for manifest in roots[0].rglob(MANIFEST):
        push_sealed(store, manifest.parent.relative_to(tmp_path / "first").as_posix(), manifest.parent)
    recorder = helpers.Recorder()
    seal(roots[1], recorder)
    assert contents(roots[1]) == contents(roots[0]) and {shown[0] for shown in recorder.shown} == {"pull"}


def test_leaks_are_pulled_with_the_rows_or_left_out(first, store, hub, tmp_path, prose, helpers, data):
    (tmp_path / "bundle").mkdir()
    write_smoke_bundle(prose[:40], tmp_path / "bundle", seed=1)
    bundle, recorder = open_bundle(tmp_path / "bundle"), helpers.Recorder()
    second = helpers.small_prepare(tmp_path / "second", data, rows=ROWS, store=store)
    cache = ArtifactCache(store, second.path, recorder)
    assert seal_leaks(second, tmp_path / "second", data, bundle, recorder, 1, cache) is None
    assert warnings(recorder) == ["leaks were not counted: the rows were pulled, and their text is not here"]
    counted = seal_leaks(first, tmp_path / "first", data, bundle, helpers.Recorder(), 1)
    push_all(store, tmp_path / "first", first)
    taken = seal_leaks(
        second, tmp_path / "second", data, bundle, recorder, 1, ArtifactCache(store, second.path, recorder)
    )
    assert taken.facts == counted.facts and recorder.events[-1] == (
        "prepare.leaks",
        {"bundle": bundle.id, **counted.facts},
    )


def test_the_stage_counts_leaks_of_a_set_that_is_whole_and_of_core_alone(prepared, tmp_path, helpers, monkeypatch):
    asked = []
    monkeypatch.setattr(stage, "eval_bundle", lambda *_: asked.append("bundle"))
    monkeypatch.setattr(stage, "seal_leaks", lambda *given: asked.append(given[5] > 0))
    cases = (("", True, []), ("core.zip", True, ["bundle", True]), ("core.zip", False, ["bundle", False]))
    for bundle, from_text, expected in cases:
        asked.clear()
        recipe = resolve("smoke", {"eval.core_bundle": ("--core-bundle", bundle)})
        stage.count_leaks(tmp_path, recipe, prepared, helpers.Recorder(), from_text=from_text)
        assert asked == expected
