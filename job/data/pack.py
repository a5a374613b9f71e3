"""BOS-aligned best-fit packing: documents into rows of exactly T+1 tokens, without padding.

Every row starts with a document's BOS and is filled to its last token (leaderboard §6). A buffer holds
`BUFFER_DOCUMENTS` documents while the shard lasts. The packer takes the largest buffered document that fits into the
rest of the row, and repeats; when none fits, it crops the shortest to fill the row exactly. What becomes of a cropped
document's rest is the one choice:

    split_long=False   it is dropped, as in the published runs (job.data.hub.CROP_SHARE of the tokens)
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
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from job.data.documents import Counts, Shard, Split, documents
from job.data.tokenizer import Tokenizer
from job.errors import DataError
from job.recipe.config import DataConfig
from job.store.artifact_cache import Artifact
from job.store.documents import canonical_json
from job.store.sealed import sealing

BUFFER_DOCUMENTS = 1000
BLOCK_ROWS = 4096
AGE_BITS = 40
AGE_MASK = (1 << AGE_BITS) - 1
HELD_OUT_BYTES = 2 << 20
PROGRESS_BYTES = 1 << 18


@dataclasses.dataclass
class PackCounts:
    """`tokens` counts ids and a BOS for each document, `cropped_tokens` those in no row, `split_bos` BOS of splits."""

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
        """Remove and return the largest document that fits `space` tokens, the first read among equals; or None."""
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
    row, filled = np.empty(row_tokens, np.uint16), 0  # (T+1,)
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

    The packer leaves long documents for a shard's end, so that rows as packed would be a curriculum: better on what a
    packer makes first, worse on a sample of all (tests/bench/bench_row_order.py). They go to a neighbouring file first:
    memory stays bounded by BLOCK_ROWS rows whatever the shard.
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
            packed = np.memmap(unordered, np.uint16, "r", shape=(count, row_tokens))  # (n, T+1)
            order = permutation(count, *seed)  # (n,)
            for start in range(0, count, BLOCK_ROWS):
                handle.write(packed[order[start : start + BLOCK_ROWS]].data)
    unordered.unlink()
    return count


def permutation(count: int, *seed: Any) -> np.ndarray:
    """(count,) int64: 0..count-1 in a seeded order; `seed` is anything JSON-able.

    By SplitMix64 (Steele et al. 2014): NumPy's generators may change their streams between releases.
    """
    start = np.frombuffer(hashlib.sha256(canonical_json(seed).encode()).digest()[:8], "<u8")
    z = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


@dataclasses.dataclass(frozen=True)
class PackTask:
    """One sealed folder of rows: the documents of `shards` on one side of the split."""

    name: str
    artifact: Artifact
    shards: tuple[Shard, ...]
    tokenizer: Path
    split: Split
    data: DataConfig
    seq_len: int

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)

    def run(self, advance: Callable[[int], None]) -> dict[str, Any]:
        """Encode, pack and seal; the manifest's metadata."""
        started = time.perf_counter()
        tokenizer = Tokenizer.load(self.tokenizer)
        counts, packed = Counts(), PackCounts()
        path, kind = self.artifact.path, self.artifact.kind
        with sealing(path, kind=kind, made_from=self.artifact.inputs) as folder:
            each = (documents(shard, self.split, held_out=kind == "val", counts=counts) for shard in self.shards)
            texts = _advancing(itertools.chain.from_iterable(each), advance)
            if kind == "val":
                texts = _kept(texts, folder.path / "held_out.jsonl")
            rows = pack(
                tokenizer.encode_documents(texts),
                row_tokens=self.seq_len + 1,
                bos=tokenizer.bos_id,
                split_long=self.data.split_long,
                counts=packed,
            )
            write_rows(folder.path / "rows.npy", rows, self.seq_len + 1, (self.data.seed, "stored", path.name))
            if kind == "val" and not packed.rows:
                raise DataError(
                    f"the held-out text ({packed.documents} documents, {packed.tokens} tokens) does not fill one row of"
                    f" {self.seq_len + 1} tokens; give more text, a larger data.val_fraction or a smaller model.seq_len"
                )
            folder.facts |= {
                "shard": self.name,
                **dataclasses.asdict(packed),
                "bytes": counts.bytes,
                "skipped": counts.skipped,
                "other_side": counts.other_side,
                "crop_share": packed.cropped_tokens / max(1, packed.tokens),
            }
            return folder.facts | {"seconds": time.perf_counter() - started}


def _advancing(texts: Iterator[str], advance: Callable[[int], None]) -> Iterator[str]:
    """`texts`, telling `advance` of their characters now and then."""
    characters = 0
    for text in texts:
        yield text
        characters += len(text)
        if characters >= PROGRESS_BYTES:
            advance(characters)
            characters = 0
    advance(characters)


def _kept(texts: Iterator[str], file: Path) -> Iterator[str]:
    """`texts`, the first HELD_OUT_BYTES of them also written to `file`, whole documents."""
    left = HELD_OUT_BYTES
    with open(file, "w", encoding="utf-8") as handle:
        for text in texts:
            size = len(text.encode())
            if size <= left:
                handle.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                left -= size
            yield text
