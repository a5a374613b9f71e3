"""The bar that a trained model has to clear: bits per byte of an interpolated absolute-discount bigram model.

    P(w | v) = max(c(v,w) - d, 0) / c(v) + d N(v) / c(v) P(w)        N(v): distinct followers of v
    P(w)     = max(c(w) - e, 0) / n      + e N / n       1 / V       N: distinct tokens

with the discounts d = n1 / (n1 + 2 n2) of Ney, Essen & Kneser (1994), n1 and n2 being the numbers of pairs (tokens, for
e) seen once and twice; 1/2 where either is 0, so that nothing is impossible. A context that was never seen falls back
to P(w). The model is trained on the rows that the network consumed, each distinct row once: a second epoch brings a
network more training but a count model no new evidence. It is scored as the network is: all T targets of every held-out
row, special tokens left out of both nats and bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

MOST_VOCAB = 16_384


def bigram_bpb(
    train_rows: Iterable[np.ndarray], val_rows: np.ndarray, token_bytes: np.ndarray, vocab_size: int
) -> float | None:
    """Bits per byte on `val_rows` (m, T+1) after counting the blocks (n, T+1) of `train_rows`; None for vocabularies
    above 16 k.

    `token_bytes` (V,): bytes per id, 0 for special tokens.
    """
    if vocab_size > MOST_VOCAB:
        return None
    pairs, counts, words = _count(train_rows, vocab_size)
    context, target = (np.asarray(side, dtype=np.int64).ravel() for side in (val_rows[:, :-1], val_rows[:, 1:]))
    scored = token_bytes[target] > 0
    context, target = context[scored], target[scored]
    probability = _unigram(words)[target]
    contexts, followers = pairs // vocab_size, np.zeros(vocab_size)
    np.add.at(followers, contexts, 1.0)
    totals = np.bincount(contexts, weights=counts, minlength=vocab_size)
    discount = _discount(counts)
    pair_count = _look_up(pairs, counts, context * vocab_size + target)
    total = np.maximum(totals[context], 1.0)
    backed_off = np.where(totals[context] > 0, discount * followers[context] / total, 1.0)
    probability = np.maximum(pair_count - discount, 0.0) / total + backed_off * probability
    return float(-np.log2(probability).sum() / token_bytes[target].sum())


def _count(blocks: Iterable[np.ndarray], vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted distinct pairs (as v V + w) with their counts, and the counts (V,) of single targets."""
    pairs: np.ndarray = np.empty(0, np.int64)
    counts: np.ndarray = np.empty(0)
    words = np.zeros(vocab_size)
    for block in blocks:
        targets = block[:, 1:].ravel()
        words += np.bincount(targets, minlength=vocab_size)
        new, times = np.unique(block[:, :-1].astype(np.int64).ravel() * vocab_size + targets, return_counts=True)
        merged, where = np.unique(np.concatenate([pairs, new]), return_inverse=True)
        counts = np.bincount(where, weights=np.concatenate([counts, times]), minlength=len(merged))
        pairs = merged
    return pairs, counts, words


def _discount(counts: np.ndarray) -> float:
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return once / (once + 2 * twice) if once and twice else 0.5


def _unigram(words: np.ndarray) -> np.ndarray:
    """(V,) probabilities, none of them zero."""
    total, discount = max(words.sum(), 1.0), _discount(words)
    left = discount * np.count_nonzero(words) / total if words.any() else 1.0
    return np.maximum(words - discount, 0.0) / total + left / len(words)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` at `wanted` among the sorted `keys`, 0 where absent."""
    if not len(keys):
        return np.zeros(len(wanted))
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0.0)
