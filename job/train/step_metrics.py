"""What a step measured, read some steps later: its loss, whether its gradients were finite, how long it took.

A GPU works through a queue. Asking it for a number means waiting until the queue up to that number is empty, and then
it stands idle until the next step has been queued. So nothing is asked of the step just begun: its numbers are copied
to host memory as part of the queue, and looked at `lag` steps later, when they have long arrived. That also keeps the
host from running further ahead than that.

A bad step is therefore noticed a few steps late, which costs these steps, and never a checkpoint: `flush` reads all
that is left, and is called before every one. Every rank reads the numbers of a step at the same place in its own queue,
and they are the same numbers (summed over ranks), so all ranks come to the same verdict there.

**Whose GPU is slow.** A step takes as long as its slowest rank: the others wait for it in the optimizer's collectives,
so that every rank's step is equally long. What tells them apart is the time to the end of a rank's own last backward
pass (`end_backward`), which waits for nobody: a second event in the queue. The ranks learn each other's times by the
all-reduce that each step makes anyway: beside what is summed it has a slot for every rank, in which all others have a
zero. No collective is added, and nothing is waited for:

    summed over ranks               loss, whether a gradient was broken, the square of the gradient's norm, the stop
                                    signal (job/train/context.py)
    one slot for each rank          seconds of its computing, for the steps that it has read since its last collective

The slot of step s cannot hold the time of step s, which the GPU has not computed yet when the host queues the
collective. It holds what was read last: with a lag of 3 that of step s - 4; after `flush` has read several steps at
once, their sum; after a start, nothing. All ranks read the same steps at the same place, so that the slots of one
collective always cover the same steps (`Computing.steps`). `SlowRanks` compares their sums over a window.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LAG = {"cpu": 0, "cuda": 3}
"""steps by which reading lags behind: on a CPU every number is there at once"""
WINDOW = 50
"""steps over which ranks are compared"""
TOLERANCE = 0.03
"""share of the median rank's time by which a rank may be slower and not be named"""
SUMMED = 4
"""numbers of a step's all-reduce that are sums over ranks; a slot for each rank follows"""


@dataclasses.dataclass(frozen=True)
class Computing:
    """Seconds that each rank computed, forward and backward, in `steps` steps before the reading that brings them."""

    seconds: tuple[float, ...]
    """by rank"""
    steps: int


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
    computing: Computing = Computing((), 0)
    signal: int = 0
    """the greatest stop signal of all ranks in this step's all-reduce"""
    gradient_norm: float = 0.0
    """of the mean gradient of all ranks' rows"""

    @property
    def diverged(self) -> bool:
        return bool(self.broken) or not math.isfinite(self.loss)


@dataclasses.dataclass
class _Pending:
    step: int
    lr_mult: float
    numbers: Tensor
    flags: Tensor
    carried: int
    """steps that the ranks' slots cover"""
    began: torch.cuda.Event | float
    computed: torch.cuda.Event | float
    ended: torch.cuda.Event | float


class StepMetrics:
    """The steps whose numbers are still to be read; each goes to `report` in order.

    flagged: the names that belong to the flags of `end_step`, on this rank.
    """

    def __init__(
        self, device: torch.device, flagged: Sequence[str], report: Callable[[Reading], None], lag: int | None = None
    ) -> None:
        self._device, self._flagged, self._report = device, flagged, report
        self.lag = LAG[device.type] if lag is None else lag
        self._pending: deque[_Pending] = deque()
        self._began = self._computed = now(self._device)
        self._own, self._own_steps = 0.0, 0

    def begin_step(self) -> None:
        self._began = self._computed = now(self._device)

    def end_backward(self) -> None:
        """The step's last backward pass is queued, and nothing yet that waits for another rank."""
        self._computed = now(self._device)

    def end_step(
        self, step: int, loss: Tensor, nonfinite: Tensor, gradient_square: Tensor, lr_mult: float, signal: int = 0
    ) -> None:
        """Queue the numbers of the step just done, and report the step `lag` steps back.

        loss: 0-d, this rank's mean. nonfinite: bool, one for each of `flagged`. gradient_square: 0-d, this rank's part.
        signal: 0, 1 or 2, this rank's; one 2 outweighs all 1s in the sum. Every rank calls it.
        """
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        numbers = torch.zeros(SUMMED + world, dtype=torch.float32, device=loss.device)
        numbers[:3] = torch.stack([loss.detach().float(), nonfinite.any().float(), gradient_square.float()])
        # numbers of the host's go along as arguments of kernels: nothing is copied
        numbers[3].fill_((0, 1, world + 1)[signal])
        numbers[SUMMED + rank].fill_(self._own)
        carried, self._own, self._own_steps = self._own_steps, 0.0, 0
        if world > 1:
            dist.all_reduce(numbers)
            numbers[0] /= world
        copies = _on_its_way(numbers), _on_its_way(nonfinite)  # before the moment that is waited for
        self._pending.append(_Pending(step, lr_mult, *copies, carried, self._began, self._computed, now(self._device)))
        self._read(self.lag)

    def flush(self) -> None:
        """Report all steps that are left; waits for them."""
        self._read(0)

    def _read(self, leave: int) -> None:
        while len(self._pending) > leave:
            self._report(self._look_at(self._pending.popleft()))

    def _look_at(self, pending: _Pending) -> Reading:
        if not isinstance(pending.ended, float):
            pending.ended.synchronize()
        loss, any_broken, square, signals, *seconds = pending.numbers.tolist()
        names = self._names(pending.flags) if any_broken else ()
        self._own += seconds_between(pending.began, pending.computed)
        self._own_steps += 1
        signal = 2 if signals > len(seconds) else int(signals > 0)
        took = seconds_between(pending.began, pending.ended)
        computing = Computing(tuple(seconds), pending.carried)
        return Reading(pending.step, loss, names, pending.lr_mult, took, computing, signal, math.sqrt(square))

    def _names(self, flags: Tensor) -> tuple[str, ...]:
        """The parameters behind the flags, of all ranks: every rank gets here or none."""
        mine = [name for name, bad in zip(self._flagged, flags.tolist(), strict=True) if bad]
        if not dist.is_initialized():
            return tuple(mine)
        everyones: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyones, mine)
        return tuple(sorted({name for names in everyones for name in names}))


def _on_its_way(numbers: Tensor) -> Tensor:
    """The same in host memory, pinned where it comes from a GPU, whenever the queue gets there."""
    return numbers.to("cpu", non_blocking=True)


def now(device: torch.device) -> torch.cuda.Event | float:
    """A moment in the device's queue, or on a CPU of the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(began: torch.cuda.Event | float, ended: torch.cuda.Event | float) -> float:
    """Of two moments that have passed."""
    if isinstance(began, float) or isinstance(ended, float):
        assert isinstance(began, float) and isinstance(ended, float)
        return ended - began
    return began.elapsed_time(ended) / 1000


class SlowRanks:
    """Compares the ranks over WINDOW readings at a time."""

    def __init__(self) -> None:
        self._readings: list[Reading] = []

    def take(self, reading: Reading) -> dict[str, dict[str, Any]]:
        """The events, by kind, of the window that `reading` ends: of several ranks "train.ranks", with the `ms` that
        each computed a step, and "train.slow_ranks" where one was slower than the median one by more than TOLERANCE.

        behind: for each such rank, by what share of the median rank's time it was slower. lost_ms: a step, what the
        median rank waited for the slowest. step_ms: a step's length, of which that is a part. steps: that the
        comparison covers.
        """
        self._readings.append(reading)
        if len(self._readings) < WINDOW:
            return {}
        window, self._readings = self._readings, []
        steps = sum(r.computing.steps for r in window)
        by_rank = [sum(seconds) for seconds in zip(*(r.computing.seconds for r in window), strict=True)]
        median = statistics.median_low(by_rank)  # of two ranks the faster: what is lost is what it waits
        if len(by_rank) < 2 or not steps:
            return {}
        events: dict[str, dict[str, Any]] = {
            "train.ranks": {"steps": steps, "ms": [round(1000 * own / steps, 3) for own in by_rank]}
        }
        slow = {str(rank): own / median - 1 for rank, own in enumerate(by_rank) if own > (1 + TOLERANCE) * median > 0}
        if slow:
            lost = 1000 * (max(by_rank) - median) / steps
            step_ms = 1000 * statistics.fmean(r.seconds for r in window)
            events["train.slow_ranks"] = {"steps": steps, "behind": slow, "lost_ms": lost, "step_ms": step_ms}
        return events
