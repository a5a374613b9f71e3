"""Byte-level BPE: against the plain algorithm, and what later stages rely on."""

from __future__ import annotations

import collections
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from job.data.tokenizer import SPECIALS, SPLIT_PATTERN, Tokenizer, train_tokenizer
from job.errors import DataError

VOCAB = 420
ROOT = Path(__file__).parents[3]
TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("  \n\n\r\taeiou'st.,(;123٣½²中é")), max_size=80)


def trained(texts, vocab_size=VOCAB) -> Tokenizer:
    return train_tokenizer(texts, vocab_size=vocab_size, max_chars=10**9, document_chars=10_000)[0]


@pytest.fixture(scope="module")
def tokenizer(prose) -> Tokenizer:
    return trained(prose[:80])


def merged(symbols: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    out: list[int] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair and out[-1] != new:
            out[-1] = new
        else:
            out.append(symbol)
    return tuple(out)


def test_every_merge_is_a_most_frequent_pair(tokenizer, prose):
    """The trainer against the definition: recount all pairs before each merge."""
    words = collections.Counter(
        tuple(piece.encode()) for text in prose[:80] for piece in regex.findall(SPLIT_PATTERN, text)
    )
    for new in range(256, VOCAB - len(SPECIALS)):
        pairs: collections.Counter[tuple[int, int]] = collections.Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        most = max(pairs.values())
        pair = next(
            p
            for p, n in pairs.items()
            if n == most and tokenizer.ranks[p[0]] + tokenizer.ranks[p[1]] == tokenizer.ranks[new]
        )
        changed: collections.Counter[tuple[int, ...]] = collections.Counter()
        for word, count in words.items():
            changed[merged(word, pair, new)] += count
        words = changed


def plain_encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Merge the lowest-ranked pair of each piece until none is left."""
    rank = {token: index for index, token in enumerate(tokenizer.ranks)}
    ids = []
    for piece in regex.findall(SPLIT_PATTERN, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while len(parts) > 1:
            ranked = [(rank.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
            best, index = min(ranked)
            if best == 1 << 30:
                break
            parts[index : index + 2] = [parts[index] + parts[index + 1]]
        ids += [rank[part] for part in parts]
    return ids


def test_encodes_as_the_plain_algorithm_does(tokenizer, prose):
    for text in prose[:20]:
        assert tokenizer.encode(text) == plain_encode(tokenizer, text)


@given(TEXT)
def test_any_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert sum(tokenizer.token_bytes[ids]) == len(text.encode())
    assert [part.tolist() for part in tokenizer.encode_documents([text, "", text])] == [ids, [], ids]


def test_specials_are_placed_after_the_merges_and_never_come_from_text(tokenizer):
    assert tokenizer.vocab_size == VOCAB and len(tokenizer.ranks) == VOCAB - 9
    assert list(tokenizer.special_ids.values()) == list(range(VOCAB - 9, VOCAB)) and tokenizer.bos_id == VOCAB - 9
    for name, index in tokenizer.special_ids.items():
        ids = tokenizer.encode(f"say {name} aloud")
        assert index not in ids and tokenizer.decode(ids) == f"say {name} aloud"
        assert tokenizer.decode([index]) == name


def test_token_bytes_are_exact(tokenizer):
    """Also of ids that are not valid UTF-8 alone, which decode to a replacement character of another length."""
    assert tokenizer.token_bytes.shape == (VOCAB,)
    assert (tokenizer.token_bytes[:256] == 1).all() and (tokenizer.token_bytes[-9:] == 0).all()
    text = "naïve 中文 🙂"
    assert sum(tokenizer.token_bytes[tokenizer.encode(text)]) == len(text.encode())


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (
        again.ranks == tokenizer.ranks
        and again.special_ids == tokenizer.special_ids
        and again.pattern == tokenizer.pattern
    )
    assert not [file for file in tmp_path.iterdir() if file.read_bytes()[:1] == b"\x80"]  # no pickle


def test_only_the_asked_for_text_is_trained_on():
    seen = []

    def documents():
        for text in ("ab" * 100, "cd" * 100, "ef" * 100):
            seen.append(text)
            yield text

    tokenizer, characters = train_tokenizer(documents(), vocab_size=267, max_chars=150, document_chars=120)
    assert characters == 150 and len(seen) == 2
    assert tokenizer.ranks[256:] == [b"ab", b"abab"]


def test_a_text_too_small_for_the_vocabulary_says_how_far_it_goes():
    with pytest.raises(
        DataError,
        match=r"too small for data.vocab_size=5000: only \d+ of 4735 merges are possible; "
        r"give more text or .* at most (\d+)",
    ) as e:
        trained(["the cat sat on the mat"], 5000)
    most = int(str(e.value).rsplit(" ", 1)[1])
    assert trained(["the cat sat on the mat"], most).vocab_size == most


def test_same_ranks_on_any_number_of_threads(tmp_path, prose):
    code = (
        "import hashlib, pathlib, sys; from job.data.tokenizer import train_tokenizer;"
        "texts = pathlib.Path(sys.argv[1]).read_text().split(chr(0));"
        "print(train_tokenizer(texts, vocab_size=2000, max_chars=10**9, document_chars=10**4)[0].ranks)"
    )
    file = tmp_path / "texts"
    file.write_text(chr(0).join(prose))
    outputs = []
    for threads in ("1", "3"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        outputs.append(
            subprocess.run(
                [sys.executable, "-c", code, str(file)], env=environment, check=True, capture_output=True
            ).stdout
        )
    assert outputs[0] == outputs[1] and outputs[0]
