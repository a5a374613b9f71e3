"""Trying again: after pauses that double.

In: how soon, how seldom, how often. Out: seconds to wait, or the waiting done. It may not know what is tried.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from itertools import chain, islice


def backoff(first: float = 1.0, most: float = 60.0, spread: float = 0.0) -> Iterator[float]:
    """Seconds until each further try, without end: doubled from `first` to `most`, each shortened at random by at most
    the share `spread`, so that many clients do not come back at once."""
    while True:
        yield first * random.uniform(1 - spread, 1)
        first = min(most, 2 * first)


def attempts(count: int) -> Iterator[int]:
    """Numbers from 0 for `count` tries, with a pause before each but the first; leave the loop when one succeeds."""
    for number, pause in enumerate(chain([0.0], islice(backoff(), count - 1))):
        time.sleep(pause)
        yield number
