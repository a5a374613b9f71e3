"""Seeded permutations that are the same with every version of NumPy (its generators may change their streams between
releases)."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from job.store.sealed import canonical_json


def permutation(count: int, *seed: Any) -> np.ndarray:
    """(count,) int64: the order of 0..count-1 by SplitMix64 (Steele et al. 2014) of a stream that `seed` (JSON-able)
    selects."""
    start = np.frombuffer(hashlib.sha256(canonical_json(seed).encode()).digest()[:8], "<u8")
    z = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")
