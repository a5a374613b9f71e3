from __future__ import annotations

import collections
import random
from pathlib import Path

import pytest

from job.errors import DataError
from job.evaluation.bundle import open_bundle
from job.evaluation.prompts import items_of
from job.evaluation.smoke_bundle import ITEMS, write_smoke_bundle

REPO = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [file.read_text(encoding="utf-8") for file in sorted((REPO / "job").glob("*.py"))]


def written(documents: list[str], folder: Path, seed: int = 1) -> Path:
    folder.mkdir()
    write_smoke_bundle(documents, folder, seed)
    return folder


@pytest.fixture(scope="module")
def folder(documents, tmp_path_factory) -> Path:
    return written(documents, tmp_path_factory.mktemp("smoke") / "bundle")


def test_it_has_22_tasks_of_all_three_kinds_in_the_bundles_format(folder, tokenizer):
    bundle = open_bundle(folder)
    kinds = collections.Counter(task.kind for task in bundle.tasks)
    assert sum(kinds.values()) == 22 and min(kinds[k] for k in ("multiple_choice", "schema", "language_modeling")) >= 5
    assert bundle.metric_name == "smoke_score" and not bundle.is_core
    for task in bundle.tasks:
        assert len(task.examples) == ITEMS
        assert len(list(items_of(task, tokenizer, 24))) == 24
        options = task.examples[0].get("choices") or task.examples[0].get("context_options")
        assert task.baseline == (1 / len(options) if options else 0)


def test_right_options_are_in_the_text_and_gold_gives_nothing_away(folder, documents):
    for task in open_bundle(folder).tasks:
        places = collections.Counter()
        for example in task.examples:
            if task.kind == "multiple_choice":
                whole = f"{example['query']} {example['choices'][example['gold']]}"
                assert len(set(example["choices"])) == len(example["choices"])
            elif task.kind == "schema":
                whole = f"{example['context_options'][example['gold']]} {example['continuation']}"
            else:
                whole = f"{example['context'].split(' ' + example['continuation'] + ' ')[-1]} {example['continuation']}"
            places[example.get("gold")] += 1
            if task.label != "repeat":
                assert any(whole in document for document in documents), (task.label, whole)
        assert len(places) == 1 or max(places.values()) < ITEMS - 4


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(folder, documents, tmp_path):
    first = open_bundle(folder).id
    assert open_bundle(written(documents, tmp_path / "again")).id == first
    assert open_bundle(written(documents, tmp_path / "other", seed=2)).id != first


def test_prose_one_document_and_little_text_will_do(tmp_path):
    rng = random.Random(0)
    words = [
        "the",
        "sea",
        "is",
        "a",
        "wide",
        "road",
        "and",
        "of",
        "it",
        "we",
        "know",
        "little;",
        "Then",
        "came",
        "night.",
    ]
    prose = " ".join(rng.choice(words) for _ in range(900))
    assert len(open_bundle(written([prose], tmp_path / "one")).tasks) == 22
    assert len(open_bundle(written(["", "x", prose[:2000], prose[2000:]], tmp_path / "two")).tasks) == 22


@pytest.mark.parametrize(
    "documents", [[], ["too short"], ["one two three four five six seven eight nine ten eleven twelve"]]
)
def test_too_little_text_is_said(documents, tmp_path):
    with pytest.raises(DataError, match=r"smoke task .*give more text"):
        written(documents, tmp_path / "bundle")
