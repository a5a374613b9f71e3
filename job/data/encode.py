"""Text to token ids, many documents at a time: pieces from arrays, ids from hash tables of arrays.

Byte-pair encoding is a function of a piece, and text repeats its pieces: after a few megabytes nearly every piece has been seen. So each
piece is looked up, and only a piece never seen before is merged (by tiktoken) and remembered. The tables are open-addressed (linear probing)
and hold a piece of up to 7 bytes as one integer (its bytes and, in the highest byte, its length), one of up to 15 bytes as two;
longer ones are in a dict. All pieces of a batch are looked up together, so that the work per piece is a few array operations.

The ids are tiktoken's, on any text: a property test compares them (tests/job/data/test_encode.py). Measured in LOG.md.
"""

from __future__ import annotations

import array
import itertools
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from job.data.split import piece_starts

BATCH_BYTES = 1 << 19
SHORT, LONG = 7, 15
"""bytes of the longest piece that one word and that two words hold"""
LONGEST_KEPT = 256
TABLE_BITS = 19
MOST_LEARNED = 1 << 18
"""pieces beyond the vocabulary that are remembered before all of them are forgotten"""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
MASKS = np.array([(1 << 8 * count) - 1 for count in range(8)] + [(1 << 64) - 1], dtype=np.uint64)
SLOTS = 1 << TABLE_BITS
ABSENT = np.iinfo(np.int32).min
# between a newline and what is not space, and between a letter and a space before another letter, the split pattern begins a new
# piece whatever else the text holds: a text may be cut there and encoded part by part with the same result
BORDER = re.compile(r"(?<=\n)(?=\S)|(?<=[^\W\d_])(?= [^\W\d_])")


class Table:
    """From pieces, as `words` integers each, to an int32."""

    def __init__(self, words: int) -> None:
        self.keys = np.zeros((words, SLOTS), np.uint64)
        self.values = np.full(SLOTS, ABSENT, np.int32)
        self.size = 0

    def find(self, keys: tuple[np.ndarray, ...]) -> np.ndarray:
        """(n,) int32: the value of each key, ABSENT where there is none."""
        slot = self._slots(keys)
        found = self.values[slot]
        at = np.flatnonzero(self._differs(slot, keys) & (found != ABSENT))
        while len(at):
            slot[at] = probed = slot[at] + 1 & SLOTS - 1
            found[at] = self.values[probed]
            at = at[self._differs(probed, tuple(key[at] for key in keys)) & (found[at] != ABSENT)]
        return found

    def add(self, keys: tuple[np.ndarray, ...], values: np.ndarray) -> None:
        """Remember keys that are not there yet, all different."""
        slot, at = self._slots(keys), np.arange(len(values))
        self.size += len(values)
        while len(at):
            free = at[self.values[slot[at]] == ABSENT]
            won = free[np.unique(slot[free], return_index=True)[1]]
            self.values[slot[won]] = values[won]
            for own, key in zip(self.keys, keys, strict=True):
                own[slot[won]] = key[won]
            at = np.setdiff1d(at, won, assume_unique=True)
            slot[at] = slot[at] + 1 & SLOTS - 1

    def _slots(self, keys: tuple[np.ndarray, ...]) -> np.ndarray:
        mixed = keys[0] * MULTIPLIER
        for key in keys[1:]:
            mixed = (mixed ^ (mixed >> np.uint64(29)) ^ key) * MULTIPLIER
        return (mixed >> np.uint64(64 - TABLE_BITS)).astype(np.int64)

    def _differs(self, slot: np.ndarray, keys: tuple[np.ndarray, ...]) -> np.ndarray:
        differs = self.keys[0][slot] != keys[0]
        for own, key in zip(self.keys[1:], keys[1:], strict=True):
            differs |= own[slot] != key
        return differs


class Pieces:
    """The ids of pieces: `ids[bytes]` where a piece is one token, and what `merge(bytes)` says where it is several."""

    def __init__(self, ids: dict[bytes, int], merge: Callable[[bytes], list[int]]) -> None:
        self._merge = merge
        self._vocabulary = list(ids), np.array(list(ids.values()), np.int32)
        self._forget()

    def _forget(self) -> None:
        """Back to the vocabulary alone: what was learned is bounded, and what is frequent is soon learned again."""
        self._short, self._long = Table(1), Table(2)
        self._rest: dict[bytes, int] = {}
        self._merged, self._ends = array.array("H"), array.array("q", [0])
        self._remember(*self._vocabulary)

    def encode(self, text: bytes, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids (m,) uint16 of the pieces of `text` that begin at `starts`, and (n,) the index of each piece's first id."""
        if len(self._ends) > MOST_LEARNED:
            self._forget()
        value = self._values(text, starts)
        several = np.flatnonzero(value < 0)
        if not len(several):
            return value.astype(np.uint16), np.arange(len(value))
        ends = np.frombuffer(self._ends, np.int64)
        which = -value[several].astype(np.int64)
        inner = ends[which] - ends[which - 1]
        counts = np.ones(len(value), np.int64)
        counts[several] = inner
        firsts = np.cumsum(counts) - counts
        out = np.repeat(value.astype(np.uint16), counts)
        within = np.arange(inner.sum()) - np.repeat(np.cumsum(inner) - inner, inner)
        merged = np.frombuffer(self._merged, np.uint16)
        out[np.repeat(firsts[several], inner) + within] = merged[np.repeat(ends[which - 1], inner) + within]
        return out, firsts

    def _values(self, text: bytes, starts: np.ndarray) -> np.ndarray:
        """(n,) int32: a piece's id, or -i where its ids are merged[ends[i-1] : ends[i]]."""
        lengths = np.diff(starts, append=len(text))
        words = np.ndarray((len(text) + 8,), "<u8", text + bytes(16), strides=(1,))
        word = words[starts]
        value = self._short.find((_short_key(word, lengths),))
        at = np.flatnonzero((lengths > SHORT) & (lengths <= LONG))
        value[at] = self._long.find(_long_keys(word[at], words[starts[at] + 8], lengths[at]))
        at = np.flatnonzero(lengths > LONG)
        value[at] = [self._rest.get(piece, ABSENT) for piece in _cut(text, starts[at], lengths[at])]
        unknown = np.flatnonzero(value == ABSENT)
        if len(unknown):
            value[unknown] = self._learn(_cut(text, starts[unknown], lengths[unknown]))
        return value

    def _learn(self, pieces: list[bytes]) -> list[int]:
        """The values of pieces that are in no table, which they enter."""
        new = list(dict.fromkeys(pieces))
        merged = list(map(self._merge, new))
        first = len(self._ends)
        ends = len(self._merged) + np.cumsum([len(ids) for ids in merged])
        self._merged.extend(itertools.chain.from_iterable(merged))
        self._ends.frombytes(ends.astype(np.int64).tobytes())
        values = -np.arange(first, first + len(new), dtype=np.int32)
        self._remember(new, values)
        of_piece = dict(zip(new, values.tolist(), strict=True))
        return [of_piece[piece] for piece in pieces]

    def _remember(self, pieces: list[bytes], values: np.ndarray) -> None:
        lengths = np.array([len(piece) for piece in pieces])
        words = np.frombuffer(b"".join(piece[:16].ljust(16, b"\0") for piece in pieces), "<u8").reshape(-1, 2)
        at = np.flatnonzero(lengths <= SHORT)
        self._short.add((_short_key(words[at, 0], lengths[at]),), values[at])
        at = np.flatnonzero((lengths > SHORT) & (lengths <= LONG))
        self._long.add(_long_keys(words[at, 0], words[at, 1], lengths[at]), values[at])
        for index in np.flatnonzero((lengths > LONG) & (lengths <= LONGEST_KEPT)).tolist():
            self._rest[pieces[index]] = int(values[index])


def _short_key(word: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A piece of up to SHORT bytes as one integer; a longer one as an integer that no shorter one has."""
    capped = np.minimum(lengths, SHORT + 1)
    return (word & MASKS[np.minimum(capped, SHORT)]) | capped.astype(np.uint64) << np.uint64(56)


def _long_keys(word: np.ndarray, second: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return word, (second & MASKS[lengths - 8]) | lengths.astype(np.uint64) << np.uint64(56)


def _cut(text: bytes, starts: np.ndarray, lengths: np.ndarray) -> list[bytes]:
    return [text[start : start + length] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]


class BatchEncoder:
    """Encodes documents as `whole(text)` would, which also takes those that only a newer Unicode can cut."""

    def __init__(self, pieces: Pieces, whole: Callable[[str], list[int]]) -> None:
        self._pieces, self._whole = pieces, whole

    def documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """(n,) uint16 for each text in its order. Reads ahead by BATCH_BYTES of text; a long text is encoded in parts."""
        parts: list[bytes] = []
        of_document: list[int] = []
        size = 0
        for text in texts:
            before = len(parts)
            parts += [piece.encode() for piece in cut_safely(text)]
            of_document.append(len(parts) - before)
            size += sum(map(len, parts[before:]))
            if size >= BATCH_BYTES:
                yield from self._join(parts, of_document)
                parts, of_document, size = [], [], 0
        yield from self._join(parts, of_document)

    def _join(self, parts: list[bytes], of_document: list[int]) -> Iterator[np.ndarray]:
        encoded = self._in_batches(parts)
        for count in of_document:
            yield next(encoded) if count == 1 else np.concatenate([next(encoded) for _ in range(count)])

    def _in_batches(self, parts: list[bytes]) -> Iterator[np.ndarray]:
        """The parts' ids, BATCH_BYTES of text at a time (a document of 50 MB is many batches)."""
        first = size = 0
        for index, part in enumerate(parts):
            size += len(part)
            if size >= BATCH_BYTES or index == len(parts) - 1:
                yield from self._batch(parts[first : index + 1])
                first, size = index + 1, 0

    def _batch(self, parts: list[bytes]) -> Iterator[np.ndarray]:
        text = b"\xff" + b"\xff".join(parts) + b"\xff"
        starts, uncertain = piece_starts(text)
        ids, firsts = self._pieces.encode(text, starts)
        borders = np.cumsum([0, *(len(part) + 1 for part in parts)])
        at = firsts[np.searchsorted(starts, borders)].tolist()
        others = set((np.searchsorted(borders, uncertain, side="right") - 1).tolist())
        for index, part in enumerate(parts):
            if index in others:
                yield np.array(self._whole(part.decode()), np.uint16)
            else:
                yield ids[at[index] + 1 : at[index + 1]].copy()


def cut_safely(text: str, size: int = BATCH_BYTES) -> Iterator[str]:
    """`text` in parts of about `size` characters, cut only where the split pattern cuts in any case."""
    starts = [0]
    while len(text) - starts[-1] > size:
        border = BORDER.search(text, starts[-1] + size)
        if border is None:
            break
        starts.append(border.start())
    for start, end in itertools.pairwise([*starts, len(text)]):
        yield text[start:end]
