"""What a step measured, read some steps later: its loss, whether its gradients were finite, how long it took.

A GPU works through a queue. Asking it for a number means waiting until the queue up to that number is empty, and then it stands idle
until the next step has been queued. So nothing is asked of the step just begun: its numbers are copied to host memory as part of the
queue, and looked at `lag` steps later, when they have long arrived. That also keeps the host from running further ahead than that.

A bad step is therefore noticed a few steps late, which costs these steps, and never a checkpoint: `settle` reads all that is left, and
is called before every one. Every rank reads the numbers of a step at the same place in its own queue, and they are the same numbers
(summed over ranks), so all ranks come to the same verdict there.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

LAG = {"cpu": 0, "cuda": 3}
"""steps by which reading lags behind: on a CPU every number is there at once"""


@dataclasses.dataclass(frozen=True)
class Reading:
    """One step's numbers."""

    step: int
    loss: float
    """nats per token, mean over ranks"""
    broken: tuple[str, ...]
    """parameters whose gradient held a NaN or Inf, over all ranks"""
    lr_mult: float
    seconds: float

    @property
    def diverged(self) -> bool:
        return bool(self.broken) or not math.isfinite(self.loss)


@dataclasses.dataclass
class _Pending:
    step: int
    lr_mult: float
    numbers: Tensor
    flags: Tensor
    began: torch.cuda.Event | float
    ended: torch.cuda.Event | float


class Readings:
    """The steps whose numbers are still to be read; each goes to `report` in order.

    flagged: the names that belong to the flags of `end_step`, on this rank.
    """

    def __init__(
        self, device: torch.device, flagged: Sequence[str], report: Callable[[Reading], None], lag: int | None = None
    ) -> None:
        self._device, self._flagged, self._report = device, flagged, report
        self._lag = LAG[device.type] if lag is None else lag
        self._pending: deque[_Pending] = deque()
        self._began = self._now()

    def begin_step(self) -> None:
        self._began = self._now()

    def end_step(self, step: int, loss: Tensor, nonfinite: Tensor, lr_mult: float) -> None:
        """Queue the numbers of the step just done, and report the step `lag` steps back.

        loss: 0-d, this rank's mean. nonfinite: bool, one for each of `flagged`. Every rank calls it.
        """
        numbers = torch.stack([loss.detach().float(), nonfinite.any().float()])
        if dist.is_initialized():
            dist.all_reduce(numbers)
            numbers[0] /= dist.get_world_size()
        copies = _on_its_way(numbers), _on_its_way(nonfinite)  # before the moment that is waited for
        self._pending.append(_Pending(step, lr_mult, *copies, self._began, self._now()))
        self._read(self._lag)

    def settle(self) -> None:
        """Report all steps that are left; waits for them."""
        self._read(0)

    def _read(self, leave: int) -> None:
        while len(self._pending) > leave:
            self._report(self._look_at(self._pending.popleft()))

    def _look_at(self, pending: _Pending) -> Reading:
        if not isinstance(pending.ended, float):
            pending.ended.synchronize()
        loss, any_broken = pending.numbers.tolist()
        names = self._names(pending.flags) if any_broken else ()
        return Reading(pending.step, loss, names, pending.lr_mult, _between(pending.began, pending.ended))

    def _names(self, flags: Tensor) -> tuple[str, ...]:
        """The parameters behind the flags, of all ranks: every rank gets here or none."""
        mine = [name for name, bad in zip(self._flagged, flags.tolist(), strict=True) if bad]
        if not dist.is_initialized():
            return tuple(mine)
        everyones: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyones, mine)
        return tuple(sorted({name for names in everyones for name in names}))

    def _now(self) -> torch.cuda.Event | float:
        """A moment in the device's queue, or on a CPU of the clock."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _on_its_way(numbers: Tensor) -> Tensor:
    """The same in host memory, pinned where it comes from a GPU, whenever the queue gets there."""
    return numbers.to("cpu", non_blocking=True)


def _between(began: torch.cuda.Event | float, ended: torch.cuda.Event | float) -> float:
    return ended - began if isinstance(ended, float) else began.elapsed_time(ended) / 1000
