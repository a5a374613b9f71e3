"""Training documents that share 13 words with an item of the evaluation: against the plain definition, and planted."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.evaluation import leaks
from job.evaluation.bundle import open_bundle
from job.evaluation.leaks import WORDS, Finder, index_of, item_texts, seal_leaks, word_runs
from job.evaluation.smoke_bundle import write_smoke_bundle

CORE = Path(__file__).parents[4] / "shared" / "data" / "core" / "core_bundle.tar.zst"
TEXT = st.lists(
    st.sampled_from(["a", "the", "Of", "é", "x1", "internationalizations-of-something", ",", "\n", " ", ". "]),
    max_size=60,
).map(" ".join)


def plain_runs(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9\u0080-\U0010ffff]+", re.sub(r"[A-Z]", lambda match: match[0].lower(), text))
    return [tuple(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1)]


@given(st.lists(TEXT, max_size=6))
def test_runs_are_those_of_the_definition(texts):
    hashes, text = word_runs(texts)
    expected = [(run, index) for index, each in enumerate(texts) for run in plain_runs(each)]
    assert text.tolist() == [index for _, index in expected]
    by_run: dict[tuple[str, ...], int] = {}
    for (run, _), value in zip(expected, hashes.tolist(), strict=True):
        assert by_run.setdefault(run, value) == value
    assert len(set(by_run.values())) == len(by_run)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, prose):
    folder = tmp_path_factory.mktemp("bundle")
    write_smoke_bundle(prose[:40], folder, seed=1)
    return open_bundle(folder)


def test_planted_items_are_found_and_nothing_else(bundle, prose):
    runs, tasks, without = index_of(bundle)
    planted = [next((text for text in item_texts(task) if plain_runs(text)), None) for task in bundle.tasks]
    assert sum(text is None for text in planted) == sum(
        count == len(list(item_texts(task))) for count, task in zip(without, bundle.tasks, strict=True)
    )
    of_items = [{run for text in item_texts(task) for run in plain_runs(text)} for task in bundle.tasks]
    documents = [f"Before: {text.upper()} - after" for text in planted if text] + prose[60:160] + ["", "one two"]
    expected = [[bool(runs & set(plain_runs(document))) for runs in of_items] for document in documents]
    finder = Finder(runs, tasks, len(bundle.tasks))
    for start in range(0, len(documents), 50):
        finder.look(documents[start : start + 50])
    assert finder.by_task.tolist() == np.sum(expected, axis=0).tolist() and finder.any == np.any(expected, axis=1).sum()
    assert finder.documents == len(documents) and finder.any >= sum(map(bool, planted))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_manifest_counts_training_documents_by_task(bundle, prose, tmp_path, helpers, one_file_shards, workers):
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(2):
        helpers.write_jsonl(folder / f"{index}.jsonl", prose[index:120:2])
    data, recorder = helpers.config(folder), helpers.Recorder()
    prepared = helpers.small_prepare(tmp_path, data)
    assert seal_leaks(prepared, tmp_path, data, bundle, recorder, 0) is None and recorder.events == []
    sealed = seal_leaks(prepared, tmp_path, data, bundle, recorder, workers)
    assert sealed.facts["documents"] == prepared.metadata["documents"] and set(sealed.facts["by_task"]) == {
        t.label for t in bundle.tasks
    }
    of_items = {run for task in bundle.tasks for text in item_texts(task) for run in plain_runs(text)}
    held_out = set(prepared.held_out_documents())
    shared = sum(bool(of_items & set(plain_runs(text))) for text in prose[:120] if text not in held_out)
    assert sealed.facts["shared"] == shared > 0 and max(sealed.facts["by_task"].values()) <= shared
    assert recorder.events == [("prepare.leaks", {"bundle": bundle.id, **sealed.facts})]
    assert [path.name for path in sealed.path.iterdir()] == ["manifest.json"]
    assert seal_leaks(prepared, tmp_path, data, bundle, recorder, 0).id == sealed.id and len(recorder.events) == 2


def test_of_a_named_dataset(bundle, hub, tmp_path, helpers):
    data = helpers.of_the_hub()
    prepared = helpers.small_prepare(tmp_path, data, rows=400)
    sealed = seal_leaks(prepared, tmp_path, data, bundle, helpers.Recorder(), 1)
    assert sealed.facts["documents"] == prepared.metadata["documents"] and sealed.made_from["files"] == len(
        prepared.metadata["files"]
    )


@pytest.mark.slow
@pytest.mark.skipif(not CORE.is_file(), reason="the CORE bundle is not beside this repository")
def test_items_of_core_are_found_in_core():
    bundle = open_bundle(CORE)
    runs, tasks, without = index_of(bundle)
    finder = Finder(runs, tasks, len(bundle.tasks))
    for index, task in enumerate(bundle.tasks):
        texts = list(item_texts(task))[:300]
        before = finder.by_task[index]
        finder.look(texts)
        assert finder.by_task[index] - before == sum(bool(plain_runs(text)) for text in texts), task.label
    assert len(without) == 22 and leaks.MOST_TASKS >= 22
