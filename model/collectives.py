"""A thin, counting skin over a process group, and the one-shot reduction of gradients built on it.

Everything is launched asynchronously on the group's own stream (NCCL) or threads (gloo) and waited for where its result
is needed. Without a group the rank is alone and sends nothing: the same code runs, and every buffer's "sum" is itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

Named = Sequence[tuple[str, nn.Parameter]]


@dataclass
class Traffic:
    """Collectives launched and the bytes of their full buffers: a reduce-scatter's input, an all-gather's output."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def moved(self, world_size: int) -> float:
        """Bytes that each rank of a ring sends: (W-1)/W of a scatter's or gather's buffer, twice for an all-reduce."""
        one_way = self.bytes["reduce_scatter"] + self.bytes["all_gather"] + 2 * self.bytes["all_reduce"]
        return one_way * (world_size - 1) / world_size


class Collectives:
    """The process group, its size, this rank, and what was sent."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.world = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0
        self.traffic = Traffic()

    def _count(self, kind: str, full: Tensor) -> None:
        self.traffic.calls[kind] += 1
        self.traffic.bytes[kind] += full.numel() * full.element_size()

    def reduce_scatter(self, output: Tensor, full: Tensor) -> dist.Work:
        """output <- this rank's part of the ranks' mean of `full` (W times output's size)."""
        self._count("reduce_scatter", full)
        return dist.reduce_scatter_single(
            output.view(-1), full.view(-1), op=dist.ReduceOp.AVG, group=self.group, async_op=True
        )

    def all_gather(self, full: Tensor, part: Tensor) -> dist.Work:
        """full <- the ranks' parts in rank order."""
        self._count("all_gather", full)
        return dist.all_gather_single(full.view(-1), part.view(-1), group=self.group, async_op=True)

    def all_reduce(self, full: Tensor) -> dist.Work:
        """full <- the ranks' mean of it, the same bits on every rank."""
        self._count("all_reduce", full)
        return dist.all_reduce(full, op=dist.ReduceOp.AVG, group=self.group, async_op=True)

    def agree(self, numbers: list[int], device: torch.device) -> list[int]:
        """Rank 0's list, on every rank (all lists are of one length); waits."""
        full = torch.tensor(numbers, dtype=torch.int64, device=device)
        self._count("broadcast", full)
        dist.broadcast(full, group=self.group, group_src=0)
        return full.tolist()


class Reduction:
    """One collective over the gradients of `parameters`: launched once all of them are there, waited for by the update.

    `send` gets the gradients in that order, to keep, and returns the work in flight (None when alone).
    """

    def __init__(self, parameters: Named, send: Callable[[list[Tensor]], dist.Work | None]) -> None:
        self.parameters = list(parameters)
        self._send = send
        self._work: dist.Work | None = None

    def launch(self) -> None:
        """Take the gradients away from their parameters and send them.

        Raises RuntimeError naming a parameter that no backward pass has reached.
        """
        grads = []
        for name, parameter in self.parameters:
            if parameter.grad is None:
                raise RuntimeError(f"{name} has no gradient: no backward pass reached it since the last step.")
            grads.append(parameter.grad)
        for _, parameter in self.parameters:
            parameter.grad = None
        self._work = self._send(grads)

    def wait(self) -> None:
        """The reduced gradients are there (on CUDA: for whatever the current stream does next)."""
        if self._work is not None:
            self._work.wait()
        self._work = None
