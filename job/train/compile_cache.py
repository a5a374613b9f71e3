"""A rank's side of the compile cache (`job/run/compile_cache.py`): it says when it has compiled what it needs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from job.train.context import RankContext


@contextlib.contextmanager
def warming(context: RankContext) -> Iterator[None]:
    """Around a rank's warm-up: says when it is over, its seconds, and how many graphs it compiled and loaded."""
    from torch._dynamo.utils import counters

    began = time.monotonic()
    yield
    graphs = {what: counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss", "bypass")}
    compiled, loaded = graphs["miss"] + graphs["bypass"], graphs["hit"]
    seconds = time.monotonic() - began
    context.reporter.emit("train.warm", rank=context.rank, seconds=seconds, compiled=compiled, loaded=loaded)
