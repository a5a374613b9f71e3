"""Documents, grouped into shards, in one fixed order, with an identity.

A document is one text (a row of a parquet file, a line of a jsonl file, a piece of a txt file, a module of the standard
library). A shard is what one worker reads and packs: a source file, or consecutive small ones together. The identity
says what the text is (file names, sizes and SHA-256; or the Python version and the SHA-256 of its text), so that equal
text gives the id of equal work.

The validation split goes by document: embedded and local text hold out a document when the first 64 bits of its
SHA-256, read as a fraction of 2^64, lie below `val_fraction`; of a named dataset the documents of the last shard are
held out, wherever else they occur. Identical documents therefore always fall on the same side; duplicates are kept.
Null, empty and blank documents are skipped and counted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

SHARD_BYTES = 4 << 20
"""Consecutive files are grouped into one shard while their text stays below this many bytes."""


class Shard(Protocol):
    """What one worker reads. Pickles small: it names its text and reads it again wherever it arrives."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def texts(self) -> Iterator[str | None]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """Text to prepare: its identity, and its shards in reading order; `val` is a shard for validation alone.

    `left_out` names what lies beside the files that are read and is none of them.
    """

    identity: dict[str, Any]
    shards: tuple[Shard, ...]
    val: Shard | None = None
    left_out: tuple[str, ...] = ()


@dataclasses.dataclass
class Counts:
    """Of a shard: `documents` and `bytes` of the wanted side, documents of the other side, `skipped` of either."""

    documents: int = 0
    bytes: int = 0
    other_side: int = 0
    skipped: int = 0


Split = Callable[[bytes], bool]
"""whether a document (its UTF-8 bytes) is held out for validation"""


def documents(shard: Shard, split: Split, *, held_out: bool, counts: Counts) -> Iterator[str]:
    """The training (or held-out) documents of `shard` in order, counted into `counts` as they are read."""
    for text in shard.texts():
        if text is None or not text.strip():
            counts.skipped += 1
            continue
        encoded = text.encode()
        if split(encoded) == held_out:
            counts.documents += 1
            counts.bytes += len(encoded)
            yield text
        else:
            counts.other_side += 1


def batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """`texts` in their order, in lists that end where they have so many characters."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def document_hash(document: bytes) -> int:
    """The first 64 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big")


@dataclasses.dataclass(frozen=True)
class ByHash:
    """Hold out `fraction` of all documents, by their hash alone."""

    fraction: float

    def __call__(self, document: bytes) -> bool:
        return document_hash(document) < self.fraction * 2.0**64


@dataclasses.dataclass(frozen=True)
class ByShard:
    """Hold out the documents whose hashes are in `file`, a .npy of uint64: those of the validation shard."""

    file: Path

    def __call__(self, document: bytes) -> bool:
        return document_hash(document) in _hashes(self.file)


@functools.lru_cache(maxsize=1)
def _hashes(file: Path) -> frozenset[int]:
    return frozenset(np.load(file).tolist())


def group(sizes: list[int]) -> Iterator[slice]:
    """Cut a list of file sizes into consecutive runs of at most SHARD_BYTES (a larger file stands alone)."""
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and total + size > SHARD_BYTES:
            yield slice(start, index)
            start, total = index, 0
        total += size
    if sizes:
        yield slice(start, len(sizes))
