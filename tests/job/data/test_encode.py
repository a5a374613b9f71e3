"""Ids by tables against tiktoken's, for any text and any vocabulary, with tables that overflow and batches that are cut anywhere."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data import encode
from job.data.encode import ABSENT, Table
from job.data.tokenizer import Tokenizer, train_tokenizer

WORDS = [
    "internationalization",
    "a",
    " the",
    "\n\n",
    "  ",
    "\x00",
    "7",
    "!?",
    "中文",
    "ſ",
    "🙂",
    "\u0378",
    "\U00020000",
    "x" * 300,
    "<|bos|>",
]
TEXTS = st.lists(
    st.lists(st.one_of(st.sampled_from(WORDS), st.text(st.characters(codec="utf-8"), max_size=9)), max_size=20).map("".join),
    max_size=8,
)


def trained(prose, size: int) -> Tokenizer:
    return train_tokenizer(prose, vocab_size=size, max_chars=10**6, document_chars=10_000)[0]


@pytest.fixture(scope="module")
def tokenizer(prose) -> Tokenizer:
    return trained(prose[:100], 900)


@given(TEXTS)
def test_ids_are_those_of_the_encoder(tokenizer, texts):
    encoded = list(tokenizer.encode_documents(texts))
    assert [ids.tolist() for ids in encoded] == [tokenizer.encode(text) for text in texts]
    assert all(ids.dtype == np.uint16 and ids.base is None for ids in encoded)


@given(texts=TEXTS, size=st.integers(1, 200), learned=st.integers(1, 40))
def test_however_batches_are_cut_and_whatever_is_forgotten(prose, texts, size, learned):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "BATCH_BYTES", size)
        patch.setattr(encode, "MOST_LEARNED", learned)
        tokenizer = SMALL[0]
        assert [ids.tolist() for ids in tokenizer.encode_documents(texts * 2)] == [tokenizer.encode(text) for text in texts * 2]


SMALL: list[Tokenizer] = [Tokenizer([bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"in", b"on"])]


@pytest.mark.parametrize("size", [300, 2000])
def test_prose_with_vocabularies_of_several_sizes(prose, size):
    tokenizer = trained(prose, size)
    assert [ids.tolist() for ids in tokenizer.encode_documents(prose)] == [tokenizer.encode(text) for text in prose]


def test_documents_come_as_they_are_asked_for(tokenizer):
    """Read ahead is bounded by a batch, not by the shard."""
    read = 0

    def texts():
        nonlocal read
        for _ in range(1000):
            read += 1
            yield "word " * 2000

    next(tokenizer.encode_documents(texts()))
    assert read * 10_000 <= encode.BATCH_BYTES + 10_000


@pytest.mark.parametrize("words", [1, 2])
def test_a_table_finds_what_was_added_and_nothing_else(words):
    draw, table = random.Random(3), Table(words)
    keys = [tuple(draw.getrandbits(64) for _ in range(words)) for _ in range(20_000)]
    columns = tuple(np.array(column, np.uint64) for column in zip(*keys, strict=True))
    present = tuple(column[:15_000] for column in columns)
    for start in range(0, 15_000, 5000):
        table.add(tuple(column[start : start + 5000] for column in present), np.arange(start, start + 5000, dtype=np.int32))
    found = table.find(columns)
    assert found[:15_000].tolist() == list(range(15_000)) and (found[15_000:] == ABSENT).all()
    assert not (table.find(tuple(column[::-1].copy() for column in columns))[:5000] != ABSENT).any()


def test_colliding_keys_are_told_apart():
    """Keys made for one slot: the table walks on to the next."""
    table = Table(1)
    inverse = pow(int(encode.MULTIPLIER), -1, 1 << 64)
    keys = np.array([(index * inverse) % (1 << 64) for index in range(1, 300)], np.uint64)
    table.add((keys[:200],), np.arange(200, dtype=np.int32))
    assert table.find((keys,)).tolist() == [*range(200), *[ABSENT] * 99]
