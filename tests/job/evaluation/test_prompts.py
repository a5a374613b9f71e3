from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.errors import DataError, ExitCode, UsageError
from job.evaluation import prompts
from job.evaluation.bundle import Task, open_bundle

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=2, max_size=4)


@given(ROWS)
def test_the_common_prefix_is_common_and_cannot_be_longer(rows):
    n = prompts.common_prefix(rows)
    assert len({tuple(row[:n]) for row in rows}) == 1
    assert n == min(map(len, rows)) or len({row[n] for row in rows}) > 1


@given(ROWS)
def test_the_common_suffix_is_the_prefix_read_backwards(rows):
    n = prompts.common_prefix([row[::-1] for row in rows])
    assert len({tuple(row[len(row) - n :]) for row in rows}) == 1
    assert n == min(map(len, rows)) or len({row[-1 - n] for row in rows}) > 1


@given(st.integers(2, 400), st.data())
def test_shots_are_those_of_a_sample_over_the_written_out_others(count, data):
    place = data.draw(st.integers(0, count - 1))
    shots = data.draw(st.integers(0, min(count - 1, 12)))
    others = [j for j in range(count) if j != place]
    assert prompts.draw_shots(place, count, shots) == (
        random.Random(1234 + place).sample(others, shots) if shots else []
    )


def test_the_order_is_a_seeded_shuffle_and_then_a_cut():
    assert prompts.order(10, None) != list(range(10)) and sorted(prompts.order(10, None)) == list(range(10))
    assert prompts.order(10, 4) == prompts.order(10, None)[:4]
    shuffled = [f"example {i}" for i in range(10)]
    random.Random(1337).shuffle(shuffled)
    assert [f"example {i}" for i in prompts.order(10, None)] == shuffled


def a_task(kind: str, examples: list[dict], shots: int = 0, delimiter: str = " ") -> Task:
    return Task("t", kind, shots, delimiter, 0.0, "eval_data/t.jsonl", tuple(examples), "b.zip")


def test_prompts_are_spelled_as_the_reference_spells_them():
    mc = a_task("multiple_choice", [], delimiter="\nAnswer: ")
    shot = {"query": "Is it? \n", "choices": ["no", "yes "], "gold": 1}
    item = {"query": "Was it?", "choices": ["x", "y"], "gold": 0}
    assert prompts.render(mc, item, [shot]) == [
        "Is it? \n\nAnswer: yes \n\nWas it?\nAnswer: x",
        "Is it? \n\nAnswer: yes \n\nWas it?\nAnswer: y",
    ]
    schema = a_task("schema", [])
    item = {"context_options": ["A then A", "A then B"], "continuation": "fell.", "gold": 1}
    assert prompts.render(schema, item, [item]) == [
        "A then B fell.\n\nA then A fell.",
        "A then B fell.\n\nA then B fell.",
    ]
    lm = a_task("language_modeling", [])
    item = {"context": " Q? Answer: ", "continuation": "42"}
    assert prompts.render(lm, item, [item]) == ["Q? Answer: 42\n\nQ? Answer:", "Q? Answer: 42\n\nQ? Answer: 42"]


def test_prompts_spans_and_draws_equal_the_reference_on_the_real_bundle(core_bundle, reference, tokenizer):
    for task in core_bundle.tasks:
        cap = 13
        items = list(prompts.items_of(task, tokenizer, cap))
        pool = reference.pool_of(list(task.examples), cap)
        assert len(items) == cap
        for i, item in enumerate(items):
            rows, starts = reference.rows_of(
                task.kind, pool, i, task.shots, task.delimiter, tokenizer.encode, tokenizer.bos_id
            )
            assert [row.tolist() for row in item.rows] == rows
            assert list(item.starts) == starts
            assert task.examples[item.line - 1] == pool[i] and item.gold == pool[i].get("gold", 0)


def test_the_same_text_is_drawn_whatever_the_chunk(make_bundle, tokenizer, monkeypatch):
    task = open_bundle(make_bundle()).tasks[0]
    whole = list(prompts.items_of(task, tokenizer, None))
    monkeypatch.setattr(prompts, "ENCODE_CHUNK", 2)
    for a, b in zip(whole, prompts.items_of(task, tokenizer, None), strict=True):
        assert (a.line, a.gold, a.starts) == (b.line, b.gold, b.starts)
        assert all(np.array_equal(x, y) for x, y in zip(a.rows, b.rows, strict=True))


def test_a_cap_not_above_the_shots_is_refused(make_bundle):
    bundle = open_bundle(make_bundle())
    for cap in (1, 2):
        with pytest.raises(UsageError, match=r"the 2 shots of pick; use more than 2") as caught:
            prompts.check_cap(bundle, cap)
        assert caught.value.exit_code == ExitCode.USAGE
    prompts.check_cap(bundle, 3)
    prompts.check_cap(bundle, None)


def test_too_few_lines_for_the_shots(tokenizer):
    task = a_task("language_modeling", [{"context": "a", "continuation": "b"}] * 3, shots=3)
    with pytest.raises(DataError, match=r"eval_data/t.jsonl has 3 lines, too few for the 3 shots"):
        list(prompts.items_of(task, tokenizer, None))


class Merging:
    """Knows no token for `nothing`, and merges "a b" into one token."""

    bos_id = 0

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[ord(c) for c in text.replace("nothing", "").rstrip().replace("a b", "#")] for text in texts]


@pytest.mark.parametrize(
    ("kind", "example", "words"),
    [
        (
            "language_modeling",
            {"context": "x", "continuation": "nothing"},
            "line 1: the continuation tokenises to nothing",
        ),
        (
            "language_modeling",
            {"context": "a", "continuation": "bc"},
            "line 1: with its continuation the prompt tokenises to other tokens",
        ),
        (
            "multiple_choice",
            {"query": "x", "choices": ["nothing", "nothing"], "gold": 0},
            "line 1: the options cannot be told apart",
        ),
        (
            "multiple_choice",
            {"query": "x", "choices": ["y", "y"], "gold": 0},
            "line 1: the options cannot be told apart",
        ),
        (
            "schema",
            {"context_options": ["y", "y"], "continuation": "z", "gold": 0},
            "line 1: the options cannot be told apart",
        ),
    ],
)
def test_what_cannot_be_scored_is_named_by_line(kind, example, words):
    with pytest.raises(DataError, match=r"b\.zip: eval_data/t\.jsonl, " + words):
        list(prompts.items_of(a_task(kind, [example]), Merging(), None))


def test_a_tokenizer_without_bos_is_refused(make_bundle, tokenizer):
    task = open_bundle(make_bundle()).tasks[1]
    other = type(tokenizer)()
    other.bos_id = None
    with pytest.raises(DataError, match="no BOS token"):
        list(prompts.items_of(task, other, None))


def test_long_rows_keep_their_end_and_an_item_that_loses_scored_tokens_is_an_error():
    task = a_task("language_modeling", [{}] * 3)
    rows, starts = [np.arange(10), np.arange(20, 24)], [7, 2]
    for enough in (None, 10):
        same, at = prompts.crop(task, 2, rows, starts, enough)
        assert [row.tolist() for row in same] == [row.tolist() for row in rows] and at == starts
    cut, at = prompts.crop(task, 2, rows, starts, 4)
    assert [row.tolist() for row in cut] == [[6, 7, 8, 9], [20, 21, 22, 23]] and at == [1, 2]
    with pytest.raises(DataError, match=r"eval_data/t.jsonl, line 3 is longer than the model can score"):
        prompts.crop(task, 2, rows, starts, 3)


@given(ROWS, st.data())
def test_an_item_shares_a_prefix_short_of_what_predicts_the_first_scored_token(rows, data):
    rows = [np.array(row) for row in rows]
    starts = [data.draw(st.integers(1, len(row))) for row in rows]
    item = prompts.Item.of_rows(1, 0, rows, starts)
    assert [row.tolist() for row in item.rows] == [row.tolist() for row in rows]
    assert item.longest == max(map(len, rows)) and item.scored == [
        len(row) - start for row, start in zip(rows, starts, strict=True)
    ]
    assert all(len(item.prefix) < start for start in starts)
