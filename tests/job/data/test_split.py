"""Cutting by arrays against the pattern itself, as a regular expression engine reads it."""

from __future__ import annotations

import itertools
import unicodedata

import regex
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from job.data.split import BLANKS, TABLED, piece_starts
from job.data.tokenizer import SPLIT_PATTERN

PATTERN = regex.compile(SPLIT_PATTERN)
CHARACTERS = "  \n\n\r\t\x0b\x0c\x00\x1caezZ'''sSdmtTlLvVrReE.,(;-12345٣½²Ⅳ中éñſKßʼ’“—\u0301\u00a0\u3000\u2028\u200b🙂"
TEXT = st.text(st.one_of(st.sampled_from(CHARACTERS), st.characters(codec="utf-8")), max_size=40)


def cut(*texts: str) -> tuple[list[list[bytes]], bool]:
    """The pieces of each text, all cut together, and whether any character was uncertain."""
    joined = b"\xff" + b"\xff".join(text.encode() for text in texts) + b"\xff"
    starts, uncertain = piece_starts(joined)
    bounds = [*starts.tolist(), len(joined)]
    documents: list[list[bytes]] = []
    for start, end in itertools.pairwise(bounds):
        piece = joined[start:end]
        if piece == b"\xff":
            documents.append([])
        else:
            documents[-1].append(piece)
    return documents[:-1], bool(len(uncertain))


def expected(text: str) -> list[bytes]:
    return [match.group().encode() for match in PATTERN.finditer(text)]


@settings(max_examples=600)
@given(st.lists(TEXT, min_size=1, max_size=4))
@example(
    ["don't I'LL you'veX 'tis ''s 'ſx ’s", " 'tis a\u00a0'b \u00a0.", ".\n\n  \n x", "a\r\n\r\n", "", "12345", "1²3", " \n", "\n "]
)
def test_pieces_are_those_of_the_pattern(texts):
    documents, uncertain = cut(*texts)
    if not uncertain:
        assert documents == [expected(text) for text in texts]


def test_every_character_is_of_the_class_that_the_encoder_gives_it():
    """Each assigned character, where its class decides the cut, against tiktoken's engine: a letter joins what follows it."""
    tokens = {bytes([byte]): byte for byte in range(256)}
    points = [p for p in range(128, TABLED) if not 0xD800 <= p < 0xE000 and unicodedata.category(chr(p)) != "Cn"]
    words = [f"1{chr(point)}a" for point in points]
    pairs = {word[1:].encode(): 256 + index for index, word in enumerate(words)}  # one token where the piece is "?a"
    encoding = tiktoken.Encoding("pairs", pat_str=SPLIT_PATTERN, mergeable_ranks=tokens | pairs, special_tokens={})
    documents, uncertain = cut(*words)
    assert not uncertain
    for word, pieces, ids in zip(words, documents, encoding.encode_ordinary_batch(words, num_threads=1), strict=True):
        assert (pieces[-1] == word[1:].encode()) == (ids[-1] >= 256), hex(ord(word[1]))
    for point in BLANKS:
        assert cut(f"a{chr(point)}{chr(point)}.")[0] == [expected(f"a{chr(point)}{chr(point)}.")]


def test_characters_that_this_python_does_not_know_are_named():
    unassigned = chr(next(point for point in range(0x1C80, TABLED) if unicodedata.category(chr(point)) == "Cn"))
    assert cut("abc", f"d{unassigned}")[1] and cut("\U00020000")[1] and not cut("abc", "é")[1]
