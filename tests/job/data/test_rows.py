"""Which row comes when: a permutation per epoch, and the same however it is asked for."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data.rows import Rows


class Stored:
    """The part of Prepared that Rows reads."""

    is_whole = True

    def __init__(self, folder, sizes, seq_len=3):
        self.seq_len, self.row_files, first = seq_len, [], 0
        for index, size in enumerate(sizes):
            file = folder / f"{index}.npy"
            np.save(file, np.arange(first, first + size * (seq_len + 1)).astype(np.uint16).reshape(size, seq_len + 1))
            self.row_files.append(file)
            first += size * (seq_len + 1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Rows:
    return Rows(Stored(tmp_path_factory.mktemp("rows"), [7, 1, 12, 5]), seed=3)


def test_epoch_0_is_the_files_as_stored(rows):
    assert len(rows) == 25
    assert rows.take(0, 25).ravel().tolist() == list(range(100))


@pytest.mark.parametrize("epoch", [0, 1, 2, 7])
def test_every_epoch_is_a_permutation(rows, epoch):
    taken = rows.take(epoch * 25, 25)
    assert sorted(map(tuple, taken.tolist())) == sorted(map(tuple, rows.take(0, 25).tolist()))
    assert {rows.order(epoch, index) for index in range(25)} == {
        (f, r) for f, n in enumerate([7, 1, 12, 5]) for r in range(n)
    }
    assert epoch == 0 or taken.tolist() != rows.take(0, 25).tolist()


def test_order_names_the_row_that_take_gives(rows):
    stored = [rows.take(0, 25)[start:end] for start, end in ((0, 7), (7, 8), (8, 20), (20, 25))]
    for index in range(75):
        file, row = rows.order(*divmod(index, 25))
        assert rows.take(index, 1)[0].tolist() == stored[file][row].tolist()


@given(st.integers(0, 120), st.integers(0, 60), st.integers(1, 17))
def test_the_same_however_it_is_asked(rows, start, count, step):
    """In one piece or many, across file and epoch borders: any number of ranks reads the same run."""
    whole = rows.take(start, count)
    parts = [rows.take(at, min(step, start + count - at)) for at in range(start, start + count, step)]
    assert np.array_equal(whole, np.concatenate([np.empty((0, 4), np.uint16), *parts]))
    buffer = np.full((count + 2, 4), 9, np.uint16)
    assert rows.take(start, count, out=buffer[:count]) is not None
    assert np.array_equal(buffer[:count], whole) and (buffer[count:] == 9).all()


def test_seed_decides_later_epochs(rows, tmp_path):
    other = Rows(Stored(tmp_path, [7, 1, 12, 5]), seed=4)
    assert np.array_equal(other.take(0, 25), rows.take(0, 25)) and not np.array_equal(
        other.take(25, 25), rows.take(25, 25)
    )


def test_chunks_are_the_distinct_rows_consumed(rows):
    for consumed, distinct in ((0, 0), (10, 10), (25, 25), (60, 25)):
        blocks = list(rows.chunks(consumed))
        assert sum(map(len, blocks)) == distinct
        assert not blocks or np.array_equal(np.concatenate(blocks), rows.take(0, distinct))


def test_fast_enough_for_a_gpu_node(tmp_path):
    """20 M tokens a second and process are wanted; a copy of mapped memory is far above that even here."""
    rows = Rows(Stored(tmp_path, [700, 800], seq_len=2048), seed=1)
    buffer = np.empty((32, 2049), np.uint16)
    rows.take(1400, 300)
    best = 1e9
    for start in range(0, 4500, 32):
        begin = time.perf_counter()
        rows.take(start, 32, out=buffer)
        best = min(best, time.perf_counter() - begin)
    assert 32 * 2048 / best > 20e6
