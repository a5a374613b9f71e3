"""The packer against a linear reference, and what it promises."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data.pack import PackCounts, pack, permutation, write_rows
from job.recipe.config import resolve
from job.train.validation import validation_rows

BOS = 60_000

lengths = st.lists(st.integers(0, 40), max_size=60)
long_lengths = st.lists(st.integers(0, 400), max_size=20)
settings_of_pack = {
    "row_tokens": st.integers(2, 33),
    "split_long": st.booleans(),
    "buffer_documents": st.integers(1, 12),
}


def numbered(lengths) -> list[np.ndarray]:
    """Documents whose ids are all different, so that each can be found again."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(start, end, dtype=np.uint16) for start, end in itertools.pairwise(ends)]


def linear_pack(documents, *, row_tokens, split_long, buffer_documents):
    """The rule as it is stated, by looking at every document in the buffer each time."""
    waiting, rows, row = list(documents), [], []
    buffer: list[tuple[int, list[int]]] = []  # (when it came, ids with BOS)
    came = 0
    while True:
        while waiting and len(buffer) < buffer_documents:
            buffer.append((came, [BOS, *waiting.pop(0).tolist()]))
            came += 1
        if not buffer:
            return rows
        space = row_tokens - len(row)
        fitting = [entry for entry in buffer if len(entry[1]) <= space]
        if fitting:
            best = max(fitting, key=lambda entry: (len(entry[1]), -entry[0]))
            row += best[1]
        else:
            best = min(buffer, key=lambda entry: (len(entry[1]), -entry[0]))
            row += best[1][:space]
            if split_long:
                buffer.append((came, [BOS, *best[1][space:]]))
                came += 1
        buffer.remove(best)
        if len(row) == row_tokens:
            rows.append(row)
            row = []


@given(lengths | long_lengths, *settings_of_pack.values())
def test_same_rows_as_the_linear_reference(lengths, row_tokens, split_long, buffer_documents):
    options = {"row_tokens": row_tokens, "split_long": split_long, "buffer_documents": buffer_documents}
    rows = pack(numbered(lengths), bos=BOS, counts=PackCounts(), **options)
    assert [row.tolist() for row in rows] == linear_pack(numbered(lengths), **options)


@given(lengths | long_lengths, *settings_of_pack.values())
def test_rows_are_full_and_nothing_is_lost_unsaid(lengths, row_tokens, split_long, buffer_documents):
    documents, counts = numbered(lengths), PackCounts()
    rows = list(
        pack(
            documents,
            row_tokens=row_tokens,
            bos=BOS,
            split_long=split_long,
            counts=counts,
            buffer_documents=buffer_documents,
        )
    )
    assert all(row.shape == (row_tokens,) and row.dtype == np.uint16 and row[0] == BOS for row in rows)
    assert (
        counts.documents == len(documents) and counts.tokens == sum(lengths) + len(lengths) and counts.rows == len(rows)
    )
    assert counts.tokens + counts.split_bos == counts.rows * row_tokens + counts.cropped_tokens
    assert split_long or counts.split_bos == 0
    assert not split_long or counts.cropped_tokens < row_tokens  # only the row that could not be filled
    ids = [token for row in rows for token in row.tolist() if token != BOS]
    assert len(ids) == len(set(ids))  # no token twice


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(31, 50))
def test_a_document_is_whole_or_cropped_at_a_rows_end(lengths, row_tokens):
    documents = numbered(lengths)
    pieces: dict[int, list[list[int]]] = {int(document[0]): [] for document in documents}
    ends: dict[int, bool] = {}
    for row in pack(
        documents, row_tokens=row_tokens, bos=BOS, split_long=False, counts=PackCounts(), buffer_documents=10
    ):
        starts = np.flatnonzero(row == BOS)
        for part in np.split(row, starts[1:]):
            if len(part) > 1:
                pieces[int(part[1])].append(part[1:].tolist())
                ends[int(part[1])] = part[-1] == row[-1]
    for document in documents:
        found = pieces[int(document[0])]
        assert len(found) <= 1
        if found and found[0] != document.tolist():
            assert found[0] == document[: len(found[0])].tolist() and ends[int(document[0])]


def test_a_long_document_comes_back_in_order_with_bos_of_its_own():
    counts = PackCounts()
    rows = list(pack([np.arange(10, dtype=np.uint16)], row_tokens=4, bos=BOS, split_long=True, counts=counts))
    assert [row.tolist() for row in rows] == [[BOS, 0, 1, 2], [BOS, 3, 4, 5], [BOS, 6, 7, 8]]
    assert counts.cropped_tokens == 2 and counts.split_bos == 3  # BOS and 9 are left


def test_many_tiny_documents_and_one_huge_one_stream():
    """Bounded: the source is never read further than the buffer, and a huge document is cut by views, not copies."""
    ahead = 0

    def tiny():
        nonlocal ahead
        for _ in range(20_000):
            ahead += 1
            yield np.zeros(3, np.uint16)

    counts = PackCounts()
    for row in pack(tiny(), row_tokens=257, bos=BOS, split_long=False, counts=counts):
        assert len(row) == 257 and ahead - counts.rows * 65 <= 1000
    assert counts.documents == 20_000 and counts.rows == 307 and counts.cropped_tokens == 80_000 - 307 * 257
    huge = np.zeros(2_000_000, np.uint16)
    counts = PackCounts()
    assert sum(1 for _ in pack([huge], row_tokens=17, bos=BOS, split_long=True, counts=counts)) == 125_000


@pytest.mark.parametrize("count", [0, 1, 5, 9000])
def test_written_rows_are_a_seeded_permutation(tmp_path, count):
    rows = np.arange(count * 3, dtype=np.uint16).reshape(count, 3)
    files = [tmp_path / name for name in ("a.npy", "b.npy", "c.npy")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        assert write_rows(file, iter(rows), 3, (seed,)) == count
    stored = np.load(files[0])
    assert stored.dtype == np.uint16 and stored.shape == (count, 3)
    assert sorted(map(tuple, stored.tolist())) == sorted(map(tuple, rows.tolist()))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert count < 5 or files[0].read_bytes() != files[2].read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.npy", "b.npy", "c.npy"}


def test_validation_takes_a_sample_and_published_runs_the_packer_s_first_rows(tmp_path, corpus, helpers):
    data = helpers.config(corpus, seed=7)
    made = helpers.small_prepare(tmp_path, data)
    ids = [np.array(made.tokenizer.encode(text), np.uint16) for text in made.held_out_documents()]
    packed = np.stack(list(pack(ids, row_tokens=33, bos=made.tokenizer.bos_id, split_long=True, counts=PackCounts())))
    tokens = len(packed) // 3 * 32
    recipe = dataclasses.replace(
        resolve("smoke", overrides=["model.seq_len=32", f"train.val_tokens={tokens}"]), data=data
    )
    first, sample = (validation_rows(made, recipe, packed=which) for which in (True, False))
    assert first.tolist() == packed[: len(packed) // 3].tolist()
    where = [packed.tolist().index(row) / len(packed) for row in sample.tolist()]
    assert len(where) == len(first) and abs(np.mean(where) - 0.5) < 0.1 and max(where) > 0.9


def test_permutation_is_fixed_for_ever():
    """Prepared sets are shared between machines and years: this order must not change without a new FORMAT."""
    assert permutation(8, 42, "rows").tolist() == [0, 7, 2, 4, 5, 1, 6, 3]
    assert sorted(permutation(1000, 42, "x").tolist()) == list(range(1000))
    assert permutation(1000, 42, "x").tolist() != permutation(1000, 42, "y").tolist()
