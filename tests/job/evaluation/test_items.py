from __future__ import annotations

import numpy as np
import pytest

from job.data.tokenizer import Tokenizer
from job.errors import DataError, UsageError
from job.evaluation import items as sealed_items
from job.evaluation.bundle import open_bundle
from job.evaluation.items import TaskItems, save_items, seal_items
from job.evaluation.prompts import Item, items_of
from job.reporter import Reporter


def same(a: Item, b: Item) -> bool:
    tokens = all(np.array_equal(x, y) for x, y in zip([a.prefix, *a.suffixes], [b.prefix, *b.suffixes], strict=True))
    return tokens and (a.line, a.gold, a.starts) == (b.line, b.gold, b.starts)


def sealed(bundle, tokenizer, folder, cap=None, tokenizer_id="t", workers=1):
    return seal_items(
        bundle, tokenizer, folder, tokenizer_id=tokenizer_id, cap=cap, workers=workers, reporter=Reporter()
    )


def test_items_come_back_as_they_were_made(core_bundle, tokenizer, tmp_path):
    found = sealed(core_bundle, tokenizer, tmp_path, cap=11)
    for task in core_bundle.tasks:
        made = list(items_of(task, tokenizer, 11))
        assert len(found[task.label]) == len(made) == 11
        assert all(same(a, b) for a, b in zip(found[task.label], made, strict=True))


def test_ids_above_16_bits_and_items_of_one_token_are_kept(tmp_path):
    made = [
        Item.of_rows(7, 1, [np.array([0, 70_000, 3]), np.array([0, 70_000])], [2, 2]),
        Item.of_rows(1, 0, [np.array([0, 5, 6])], [1]),
    ]
    save_items(made, tmp_path)
    assert all(same(a, b) for a, b in zip(TaskItems(tmp_path), made, strict=True))
    assert np.load(tmp_path / "tokens.npy").dtype == np.int32


def test_what_is_sealed_is_not_made_again_unless_its_inputs_changed(make_bundle, tokenizer, tmp_path, monkeypatch):
    bundle = open_bundle(make_bundle())
    made = []
    original = sealed_items.items_of
    monkeypatch.setattr(sealed_items, "items_of", lambda task, *rest: made.append(task.label) or original(task, *rest))
    for _ in range(2):
        sealed(bundle, tokenizer, tmp_path / "items")
    assert made == ["pick", "next", "who"], "the largest first"
    sealed(bundle, tokenizer, tmp_path / "items", cap=5)
    assert len(made) == 6
    sealed(bundle, tokenizer, tmp_path / "items", cap=5, tokenizer_id="u")
    assert len(made) == 9


def test_bad_items_and_caps_leave_nothing_half_written(make_bundle, tokenizer, tmp_path):
    bundle = open_bundle(make_bundle(who='{"context_options": ["a", "a"], "continuation": "b", "gold": 0}\n'))
    with pytest.raises(DataError, match=r"eval_data/sub/who\.jsonl, line 1"):
        sealed(bundle, tokenizer, tmp_path / "items")
    assert {path.name for path in (tmp_path / "items").iterdir()} == {"pick", "next"}
    with pytest.raises(UsageError):
        sealed(bundle, tokenizer, tmp_path / "none", cap=2)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_processes_make_the_same_items_and_raise_the_same_errors(make_bundle, tmp_path):
    tokenizer = Tokenizer([bytes([byte]) for byte in range(256)])
    bundle = open_bundle(make_bundle())
    alone, many = (sealed(bundle, tokenizer, tmp_path / str(workers), workers=workers) for workers in (1, 2))
    for label in alone:
        assert all(same(a, b) for a, b in zip(alone[label], many[label], strict=True))
    bad = open_bundle(make_bundle(who='{"context_options": ["a", "a"], "continuation": "b", "gold": 0}\n'))
    with pytest.raises(DataError, match=r"who\.jsonl, line 1"):
        sealed(bad, tokenizer, tmp_path / "bad", workers=2)
