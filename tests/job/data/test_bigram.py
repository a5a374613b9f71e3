"""The bigram model against its formula, written with dictionaries."""

from __future__ import annotations

import collections
import itertools
import math

import numpy as np
import pytest

from job.data.bigram import bigram_bpb

VOCAB = 20


def plain_bigram_bpb(train, val, token_bytes):
    """The module's two formulas, one probability at a time."""
    pairs = collections.Counter((v, w) for row in train for v, w in itertools.pairwise(row))
    words = collections.Counter(w for row in train for w in row[1:])

    def discount(counts):
        once, twice = (sum(c == k for c in counts.values()) for k in (1, 2))
        return once / (once + 2 * twice) if once and twice else 0.5

    d, e, n = discount(pairs), discount(words), sum(words.values())

    def unigram(w):
        return max(words[w] - e, 0) / n + e * len(words) / n / VOCAB

    def probability(v, w):
        after = {x: c for (u, x), c in pairs.items() if u == v}
        total = sum(after.values())
        return unigram(w) if not total else max(after.get(w, 0) - d, 0) / total + d * len(after) / total * unigram(w)

    for context in range(VOCAB):
        assert math.isclose(sum(probability(context, w) for w in range(VOCAB)), 1.0)
    scored = [(v, w) for row in val for v, w in itertools.pairwise(row) if token_bytes[w]]
    return -sum(math.log2(probability(v, w)) for v, w in scored) / sum(int(token_bytes[w]) for _, w in scored)


@pytest.fixture
def data():
    draw = np.random.default_rng(0)
    skewed = (draw.random((30, 9)) ** 3 * 17).astype(np.uint16)
    skewed[:, 0] = VOCAB - 1  # BOS
    token_bytes = draw.integers(1, 5, VOCAB).astype(np.int32)
    token_bytes[-1] = 0
    skewed[20:, 4] = VOCAB - 1  # a special token among the targets
    skewed[25, 5:7] = 18  # never seen in training
    return skewed[:20], skewed[20:], token_bytes


def test_agrees_with_the_formula(data):
    train, val, token_bytes = data
    expected = plain_bigram_bpb(train.tolist(), val.tolist(), token_bytes)
    assert bigram_bpb([train], val, token_bytes, VOCAB) == pytest.approx(expected, rel=1e-12)
    assert bigram_bpb(iter([train[:3], train[3:4], train[4:]]), val, token_bytes, VOCAB) == pytest.approx(
        expected, rel=1e-12
    )


def test_text_that_repeats_is_predicted_better(data):
    train, _, token_bytes = data
    assert bigram_bpb([train], train, token_bytes, VOCAB) < bigram_bpb([train[::-1, ::-1]], train, token_bytes, VOCAB)


def test_knowing_nothing_is_uniform(data):
    _, val, token_bytes = data
    targets = val[:, 1:][token_bytes[val[:, 1:]] > 0]
    uniform = len(targets) * math.log2(VOCAB) / token_bytes[targets].sum()
    assert bigram_bpb([], val, token_bytes, VOCAB) == pytest.approx(uniform)


def test_not_for_large_vocabularies(data):
    train, val, _ = data
    assert bigram_bpb([train], val, np.ones(16_385), 16_385) is None
    assert bigram_bpb([train], val, np.ones(16_384), 16_384) is not None
