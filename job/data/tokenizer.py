"""Byte-level BPE: trained by rustbpe, encoded by tiktoken (one text) and fastokens (many), stored as text (no pickle).

Text is cut by GPT-4's split pattern (numbers in groups of at most two digits), each piece is a sequence of bytes, and
the most frequent neighbouring pair becomes the next token until the vocabulary is full (Sennrich et al. 2016). Ids: the
256 bytes in their order, then the merges in theirs, then nine special tokens. The vocabulary size counts all of them.

A sealed tokenizer holds `ranks.tiktoken` (one line per id: base64 of its bytes, space, id; tiktoken's own format) and
`tokenizer.json` (split pattern and special tokens). Text never becomes a special token: only the packer and the chat
format place them.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import fastokens
import numpy as np
import rustbpe
import tiktoken

from job.data.documents import batches
from job.errors import DataError, OutOfMemoryError
from job.machine import host
from job.reporter import Reporter

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIALS = (
    "<|bos|>",
    *(f"<|{who}_{edge}|>" for who in ("user", "assistant", "python", "output") for edge in ("start", "end")),
)
BYTES = 256
BATCH_CHARS = 1 << 19
VOWEL_SEPARATOR = "\u180e"
"""the one character of Unicode that fastokens cuts by another class (white space, as it was until 2013) than
tiktoken"""
BETWEEN_WORDS = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")
"""where the split pattern ends a piece whatever comes before and after, so that a text may be cut there"""
SAMPLE_CHARS = 1 << 20


class Tokenizer:
    """Text to ids and back. `ranks` are the bytes of each id below the specials, in order of id."""

    def __init__(
        self, ranks: Sequence[bytes], specials: Sequence[str] = SPECIALS, pattern: str = SPLIT_PATTERN
    ) -> None:
        self.ranks, self.specials, self.pattern = list(ranks), tuple(specials), pattern
        self.vocab_size = len(self.ranks) + len(self.specials)
        self.special_ids = {name: len(self.ranks) + index for index, name in enumerate(self.specials)}
        self.bos_id = self.special_ids["<|bos|>"]

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """Below the specials, by their bytes: of two ids with the same bytes only the first is ever produced."""
        return {token: index for index, token in reversed(list(enumerate(self.ranks)))}

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding("speedrun", pat_str=self.pattern, mergeable_ranks=self.ids, special_tokens={})

    @cached_property
    def _bulk(self) -> fastokens.Tokenizer:
        """Encodes many texts in one thread: a machine's cores have a shard each."""
        os.environ.setdefault("RAYON_NUM_THREADS", "1")
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(_ranks_file(self.ids.items()))
            file.flush()
            return fastokens.Tokenizer.from_tiktoken(file.name, pattern=self.pattern)

    @cached_property
    def _table(self) -> list[bytes]:
        return self.ranks + [name.encode() for name in self.specials]

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """(V,) int32: bytes of text of each id, exact for ids that are not valid UTF-8 alone; specials 0."""
        return np.array([len(token) for token in self.ranks] + [0] * len(self.specials), dtype=np.int32)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS; the spelling of a special token in it stays text."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """(n,) uint16 for each text: the ids of `encode`, several times as fast. Reads ahead by BATCH_CHARS of text."""
        for batch in batches(texts, BATCH_CHARS):
            if max(map(len, batch)) > 2 * BATCH_CHARS:
                yield from (
                    np.concatenate([self._encode_together([part])[0] for part in _parts(text)]) for text in batch
                )
            else:
                yield from self._encode_together(batch)

    def _encode_together(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids, offsets = self._bulk.encode_batch_flat(texts)
        flat = np.frombuffer(ids, "<u4")  # (ids of all texts,)
        edges = np.frombuffer(offsets, "<u8").tolist()  # texts + 1 of them
        return [
            np.array(self.encode(text) if VOWEL_SEPARATOR in text else flat[start:end], np.uint16)
            for text, (start, end) in zip(texts, itertools.pairwise(edges), strict=True)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; specials by their names, bytes that are not UTF-8 as U+FFFD."""
        return self.bytes_of(ids).decode("utf-8", errors="replace")

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """What `decode` decodes: a token need not end where a character does."""
        return b"".join(self._table[index] for index in ids)

    def save(self, folder: Path) -> None:
        (folder / "ranks.tiktoken").write_bytes(_ranks_file((token, index) for index, token in enumerate(self.ranks)))
        facts = {"pattern": self.pattern, "specials": self.specials, "vocab_size": self.vocab_size}
        (folder / "tokenizer.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a sealed folder (the caller has verified it)."""
        facts = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        lines = (folder / "ranks.tiktoken").read_bytes().splitlines()
        return cls([base64.b64decode(line.split()[0]) for line in lines], facts["specials"], facts["pattern"])


def _parts(text: str) -> Iterator[str]:
    """Parts of about BATCH_CHARS whose ids, joined, are the text's: encoding takes a dozen times a part's memory."""
    start = 0
    while len(text) - start > 2 * BATCH_CHARS and (cut := BETWEEN_WORDS.search(text, start + BATCH_CHARS)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _ranks_file(ids: Iterable[tuple[bytes, int]]) -> bytes:
    """tiktoken's format, in order of id."""
    return b"".join(
        base64.b64encode(token) + f" {index}\n".encode() for token, index in sorted(ids, key=lambda item: item[1])
    )


def train_tokenizer(
    documents: Iterable[str], *, vocab_size: int, max_chars: int, document_chars: int
) -> tuple[Tokenizer, int]:
    """Train on the first `max_chars` characters of `documents`, each cut to `document_chars`; also the characters used.

    The same documents give the same ranks on any number of threads. Raises DataError when the text has too few pairs to
    merge.
    """
    count = 0

    def sample() -> Iterator[str]:
        nonlocal count
        for document in documents:
            text = document[: min(document_chars, max_chars - count)]
            count += len(text)
            yield text
            if count >= max_chars:
                return

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(sample(), vocab_size - len(SPECIALS), pattern=SPLIT_PATTERN)
    ranks = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])]
    wanted, found = vocab_size - len(SPECIALS) - BYTES, len(ranks) - BYTES
    if found < wanted:
        most = found + BYTES + len(SPECIALS)
        raise DataError(
            f"the training text ({count} characters) is too small for data.vocab_size={vocab_size}: only {found}"
            f" of {wanted} merges are possible; give more text or a vocabulary of at most {most}"
        )
    return Tokenizer(ranks), count


def training_bytes(characters: int) -> int:
    """Estimated memory of training on so many characters, beyond what the process has.

    It goes with the number of different words, which grows slower than the text (Heaps' law): measured 62, 96 and
    109 MB for 15, 30 and 60 MB of English (tests/bench/bench_data.py), an exponent of 0.41; text of the web has more
    rare words, so 0.7 is assumed.
    """
    return int(40e6 + 110e6 * (characters / 60e6) ** 0.7)


def check_memory(characters: int, reporter: Reporter) -> None:
    """Report how much memory the training will take; OutOfMemoryError when that is more than there is."""
    needed, available = training_bytes(characters), host.available_memory()
    reporter.emit("prepare.memory", stage="tokenizer", estimated_bytes=needed, available_bytes=available)
    if available is not None and needed > available:
        raise OutOfMemoryError(
            f"training the tokenizer on {characters:,} characters takes about {needed / 1e9:.1f} GB of memory and"
            f" {available / 1e9:.1f} GB are free; lower data.tokenizer_chars or take a machine with more memory"
        )


def bytes_per_token(tokenizer: Tokenizer, texts: Iterator[str]) -> float:
    """Of the first SAMPLE_CHARS characters of `texts`."""
    sample = next(batches(texts, SAMPLE_CHARS))
    return sum(len(text.encode()) for text in sample) / sum(map(len, tokenizer.encode_documents(sample)))
