"""The processes that share the work of an evaluation: this one alone, or those of torch.distributed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from job.reporter import Reporter


class Ranks:
    """This process alone; `ProcessRanks` are torch.distributed's."""

    rank = 0
    size = 1

    def all_gather(self, value: Any) -> list[Any]:
        """Everybody's value, in rank order."""
        return [value]


class ProcessRanks(Ranks):
    """The ranks of torch.distributed's default process group."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def all_gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        self._reporter.beat("meeting the other ranks", waits=True)
        dist.all_gather_object(values, value)
        self._reporter.beat("going on after all ranks met")
        return values


def current_ranks(reporter: Reporter) -> Ranks:
    """Those of the default process group where there is one, else this process alone."""
    return ProcessRanks(reporter) if dist.is_initialized() else Ranks()


@contextlib.contextmanager
def joined(rank: int, size: int, reporter: Reporter) -> Iterator[Ranks]:
    """The `size` ranks of this machine, over gloo: what they exchange are answers and sums, a few kilobytes."""
    if size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        yield current_ranks(reporter)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
