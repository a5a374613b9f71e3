"""BOS-aligned best-fit packing: documents into rows of exactly T+1 tokens, without padding.

Every row starts with a document's BOS and is filled to its last token (leaderboard §6). A buffer holds
`BUFFER_DOCUMENTS` documents while the shard lasts. The packer takes the largest buffered document that fits into the
rest of the row, and repeats; when none fits, it crops the shortest to fill the row exactly. What becomes of a cropped
document's rest is the one choice:

    split_long=False   it is dropped, as in the published runs (34.6 % of FineWeb-Edu's tokens at T = 2048)
    split_long=True    it comes back into the buffer as a document with a BOS of its own; for small corpora

A document longer than a row never fits and is treated by the same rule. A shard's last row, if it cannot be filled, is
dropped.

Every decision is determined. Among documents of equal length the one read first is taken when it fits, the one read
last when it is cropped. The buffer is a sorted list of integers, length in the high bits and age in the low, so that
"largest that fits" is one binary search.

Accounting, exact for every shard: tokens + split_bos == rows x (T+1) + cropped_tokens.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from job.data.permutation import permutation

BUFFER_DOCUMENTS = 1000
BLOCK_ROWS = 4096
AGE_BITS = 40
AGE_MASK = (1 << AGE_BITS) - 1


@dataclasses.dataclass
class PackCounts:
    """`tokens` counts each document's ids and its BOS; `cropped_tokens` what is in no row; `split_bos` the BOS added by
    splits."""

    documents: int = 0
    tokens: int = 0
    rows: int = 0
    cropped_tokens: int = 0
    split_bos: int = 0


class Buffer:
    """Documents ordered by length. A document is its ids without the BOS, which counts in its length."""

    def __init__(self) -> None:
        self._keys: list[int] = []
        self._ids: dict[int, np.ndarray] = {}
        self._age = AGE_MASK

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, ids: np.ndarray) -> None:
        key = (len(ids) + 1) << AGE_BITS | self._age
        self._age -= 1
        self._ids[key] = ids
        bisect.insort(self._keys, key)

    def take_largest(self, space: int) -> np.ndarray | None:
        """Remove and return the largest document of at most `space` tokens, the first read among equals; None when none
        fits."""
        index = bisect.bisect_left(self._keys, (space + 1) << AGE_BITS)
        return self._ids.pop(self._keys.pop(index - 1)) if index else None

    def take_shortest(self) -> np.ndarray:
        """Remove and return the shortest document, the last read among equals."""
        return self._ids.pop(self._keys.pop(0))


def pack(
    documents: Iterable[np.ndarray],
    *,
    row_tokens: int,
    bos: int,
    split_long: bool,
    counts: PackCounts,
    buffer_documents: int = BUFFER_DOCUMENTS,
) -> Iterator[np.ndarray]:
    """Rows (row_tokens,) uint16 of `documents` (each (n,) uint16 without BOS), counted into `counts`."""
    source = iter(documents)
    buffer = Buffer()
    row, filled = np.empty(row_tokens, np.uint16), 0
    while True:
        while len(buffer) < buffer_documents and (ids := next(source, None)) is not None:
            counts.documents += 1
            counts.tokens += len(ids) + 1
            buffer.add(ids)
        if not len(buffer):
            counts.cropped_tokens += filled
            return
        space = row_tokens - filled
        ids = buffer.take_largest(space)
        if ids is None:
            ids = buffer.take_shortest()
            ids, rest = ids[: space - 1], ids[space - 1 :]
            if split_long:
                buffer.add(rest)
                counts.split_bos += 1
            else:
                counts.cropped_tokens += len(rest)
        row[filled] = bos
        row[filled + 1 : filled + 1 + len(ids)] = ids
        filled += 1 + len(ids)
        if filled == row_tokens:
            counts.rows += 1
            yield row
            row, filled = np.empty(row_tokens, np.uint16), 0


def write_rows(file: Path, rows: Iterable[np.ndarray], row_tokens: int, seed: tuple[Any, ...]) -> int:
    """Write `rows` in the permutation that `seed` gives as `file`, an (n, row_tokens) uint16 .npy; n.

    The packer leaves long documents for a shard's end, so that rows as packed would be a curriculum. They go to a
    neighbouring file first: memory stays bounded by BLOCK_ROWS rows whatever the shard.
    """
    unordered = file.with_suffix(".unordered")
    count = 0
    with open(unordered, "wb") as handle:
        for row in rows:
            handle.write(row.data)
            count += 1
    with open(file, "wb") as handle:
        np.lib.format.write_array_header_1_0(
            handle, {"descr": "<u2", "fortran_order": False, "shape": (count, row_tokens)}
        )
        if count:
            packed = np.memmap(unordered, np.uint16, "r", shape=(count, row_tokens))
            order = permutation(count, *seed)
            for start in range(0, count, BLOCK_ROWS):
                handle.write(packed[order[start : start + BLOCK_ROWS]].data)
    unordered.unlink()
    return count
