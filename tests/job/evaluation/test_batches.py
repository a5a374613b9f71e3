from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from job.evaluation import batches
from job.evaluation.prompts import Item

SIZES = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 600), st.integers(2, 40)), min_size=1, max_size=40)


def an_item(line: int, options: int, shared: int, suffix: int) -> Item:
    """`options` rows that share BOS and `shared` tokens and then differ."""
    rows = [np.concatenate([np.arange(shared + 1), 1000 * (r + 1) + np.arange(suffix + r)]) for r in range(options)]
    return Item.of_rows(line, 0, rows, [shared + 1] * options)


@given(st.integers(1, 100_000))
def test_padded_lengths_are_few_and_near(tokens):
    padded = batches.padded_length(tokens)
    assert padded >= tokens and (padded <= 16 or padded < tokens * 1.13)
    assert batches.padded_length(padded) == padded
    assert len({batches.padded_length(n) for n in range(1, 4097)}) <= 65


@given(st.integers(1, 100_000))
def test_a_fine_grid_wastes_less_than_eight_tokens(tokens):
    assert (
        0 <= batches.padded_length(tokens, fine=True) - tokens < 8 and batches.padded_length(tokens, fine=True) % 8 == 0
    )


@given(SIZES, st.integers(1, 5000), st.booleans(), st.booleans())
def test_batches_hold_every_item_once_within_the_budget(sizes, budget, share_prefix, fine):
    items = [an_item(i, *size) for i, size in enumerate(sizes)]
    planned = batches.plan_batches(items, budget, share_prefix, fine)
    assert sorted(i for batch in planned for i in batch.items) == list(range(len(items)))
    for batch in planned:
        assert batch.cost <= budget or len(batch.items) == 1
        shapes = [(batches.shared_shape if batch.prefix else batches.plain_shape)(items[i]) for i in batch.items]
        assert batch.rows == sum(rows for rows, _, _ in shapes)
        assert batch.prefix == batches.padded_length(max(prefix for _, prefix, _ in shapes), fine)
        assert batch.suffixes == batches.padded_length(max(suffixes for _, _, suffixes in shapes), fine)
    assert share_prefix or not any(batch.prefix for batch in planned)


@given(SIZES, st.integers(1, 8))
def test_ranks_share_all_batches_and_none_has_more_than_one_batch_too_much(sizes, ranks):
    planned = batches.plan_batches([an_item(i, *size) for i, size in enumerate(sizes)], 800)
    shares = batches.share(planned, ranks)
    assert sorted(b.items for share in shares for b in share) == sorted(b.items for b in planned)
    loads = [sum(b.cost for b in share) for share in shares]
    assert max(loads) - min(loads) <= max(b.cost for b in planned)


def test_a_prefix_is_shared_where_it_saves_a_quarter_of_the_tokens():
    long, short, single = an_item(0, 4, 100, 5), an_item(1, 2, 2, 20), an_item(2, 1, 100, 5)
    assert batches.shape_of(long, share_prefix=True) == batches.shared_shape(long) and batches.shared_shape(long)[
        :2
    ] == (1, 100)
    assert batches.shape_of(long, share_prefix=False) == batches.plain_shape(long)
    assert batches.shape_of(short, share_prefix=True) == batches.plain_shape(short)
    assert batches.shape_of(single, share_prefix=True) == batches.plain_shape(single)


def test_plain_rows_hold_each_options_scored_targets_and_nothing_else():
    item = Item.of_rows(1, 0, [np.array([9, 1, 2, 3]), np.array([9, 5, 6])], [2, 3])
    ids, positions, targets, shared = batches.tensors_of([item], batches.Batch((0,), 2, 0, 5))
    assert shared is None
    assert ids.tolist() == [[9, 1, 2, 0, 0], [9, 5, 0, 0, 0]]
    assert (positions.tolist(), targets.tolist()) == ([1, 2], [2, 3])


def test_a_shared_row_holds_the_prefix_once_and_knows_every_tokens_position():
    item = Item.of_rows(1, 0, [np.array([9, 8, 7, 1, 2]), np.array([9, 8, 7, 3]), np.array([9, 8, 7])], [3, 3, 3])
    ids, positions, targets, shared = batches.tensors_of([item], batches.Batch((0,), 1, 4, 5))
    assert ids.tolist() == [[9, 8, 0, 0, 7, 1, 7, 0, 0]]
    assert (positions.tolist(), targets.tolist()) == ([4, 5, 6], [1, 2, 3])
    assert shared.prefix == 4
    assert shared.suffix.tolist() == [[0, 0, -1, -1, 1, 1, 2, -1, -1]]
    assert shared.position[0, [0, 1, 4, 5, 6]].tolist() == [0, 1, 2, 3, 2]
    assert shared.previous[0, [1, 4, 5, 6]].tolist() == [0, 1, 4, 1]


@pytest.mark.parametrize("generation", ["head", "feb"])
def test_a_shared_prefix_gives_each_suffix_the_hidden_states_of_a_row_of_its_own(generation):
    from model.config import GPTConfig
    from model.gpt import GPT

    overrides = {"width": 32, "head_dim": 16, "window_tile": 8}
    model = GPT(GPTConfig.for_depth(4, vocab_size=300, seq_len=64, generation=generation, **overrides)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    rng = np.random.default_rng(3)
    items = []
    for line, shared in enumerate((90, 40, 7, 1)):
        prefix = rng.integers(1, 300, shared)
        rows = [np.concatenate([prefix, rng.integers(1, 300, n)]) for n in (5, 30, 2)]
        items.append(Item.of_rows(line, 0, rows, [shared] * 3))
    shapes = [batches.shared_shape(item) for item in items]
    batch = batches.Batch(
        (0, 1, 2, 3), 4, *(batches.padded_length(max(column)) for column in list(zip(*shapes, strict=True))[1:])
    )
    ids, positions, targets, shared = batches.tensors_of(items, batch)
    hidden = model.hidden(ids, shared)
    assert hidden.isfinite().all()
    for b, item in enumerate(items):
        at = batch.prefix
        for row, suffix in zip(item.rows, item.suffixes, strict=True):
            alone = model.hidden(torch.from_numpy(row[None, :-1].astype(np.int64)))[0]
            torch.testing.assert_close(hidden[b, at : at + len(suffix) - 1], alone[len(item.prefix) :])
            torch.testing.assert_close(hidden[b, : len(item.prefix)], alone[: len(item.prefix)])
            at += len(suffix) - 1
    assert len(positions) == len(targets) == sum(sum(item.scored) for item in items)
    torch.testing.assert_close(model.hidden(ids, shared, positions), hidden.flatten(0, 1)[positions])
