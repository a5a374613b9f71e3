"""Ids of many texts against tiktoken's, for any text and any vocabulary, with batches that are cut anywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data import tokenizer as tokenizers
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
    "\u180e",
    "x" * 300,
    "<|bos|>",
]
TEXTS = st.lists(
    st.lists(st.one_of(st.sampled_from(WORDS), st.text(st.characters(codec="utf-8"), max_size=9)), max_size=20).map(
        "".join
    ),
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


@given(texts=TEXTS, size=st.integers(1, 200))
def test_however_batches_are_cut(texts, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "BATCH_CHARS", size)
        tokenizer = SMALL[0]
        assert [ids.tolist() for ids in tokenizer.encode_documents(texts * 2)] == [
            tokenizer.encode(text) for text in texts * 2
        ]


def test_a_long_text_is_cut_between_words_and_has_its_own_ids(prose, monkeypatch):
    monkeypatch.setattr(tokenizers, "BATCH_CHARS", 500)
    text = " ".join(prose[:20])
    assert len(list(tokenizers._parts(text))) > len(text) // 1000
    assert [ids.tolist() for ids in SMALL[0].encode_documents(["a b", text])] == [
        SMALL[0].encode(each) for each in ("a b", text)
    ]


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
    assert read * 10_000 <= tokenizers.BATCH_CHARS + 10_000


@pytest.mark.parametrize(
    "first", [0, 0x2000, *(pytest.param(first, marks=pytest.mark.slow) for first in range(0x4000, 0x36000, 0x2000))]
)
def test_every_character_is_of_the_class_that_tiktoken_gives_it(first):
    """Both libraries must know the same Unicode: each character c with the merges ca and ac, which show where a text is
    cut ("1ca" after the 1 unless c is a number, ".cca" within cc if c is white space or a letter, "ac." before c unless
    c is a letter)."""
    characters = [chr(point) for point in range(first, first + 0x2000) if not 0xD800 <= point < 0xE000]
    merges = [
        text.encode()[:end]
        for c in characters
        for text in (f"{c}a", f"a{c}")
        for end in range(2, len(text.encode()) + 1)
    ]
    tokenizer = Tokenizer(list(dict.fromkeys([*(bytes([byte]) for byte in range(256)), *merges])))
    texts = [text for c in characters for text in (f"1{c}a", f".{c}{c}a", f"a{c}.")]
    assert [ids.tolist() for ids in tokenizer.encode_documents(texts)] == [tokenizer.encode(text) for text in texts]


def test_a_run_that_is_longer_than_any_stack(tokenizer):
    for run in (" ", "中"):
        (ids,) = tokenizer.encode_documents([run * 1_000_000])
        assert tokenizer.token_bytes[ids].sum() == 1_000_000 * len(run.encode())
