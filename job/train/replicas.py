"""Whether all ranks have the same weights: each has all of them, and what only one has wrong is that rank's machine.

The optimizer gives every rank the same bits, so a sum over the weights' bits, taken as integers, is the same on all. It
is looked at before each checkpoint: a flipped bit (a GPU's memory, a link) would otherwise be sealed, uploaded and gone
on from. What all ranks compute wrong alike it does not find. Where weights are sent as bfloat16 (comm.bf16) their owner
has them exactly and the others rounded: what is compared is all of them rounded.
"""

from __future__ import annotations

import collections

import torch
import torch.distributed as dist
from torch import Tensor, nn

from job.errors import OddReplica

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""by the bytes of an element"""


def fingerprint(model: nn.Module, sent_as: torch.dtype | None = None) -> Tensor:
    """0-d int64: each parameter's bits summed as integers, times its place, modulo 2^64; of those wider than `sent_as`
    the bits when rounded to it."""
    sums = []
    for parameter in model.parameters():
        narrow = sent_as if sent_as and sent_as.itemsize < parameter.element_size() else parameter.dtype
        sums.append(parameter.detach().to(narrow).view(INTEGERS[narrow.itemsize]).sum(dtype=torch.int64))
    return (torch.stack(sums) * torch.arange(1, 2 * len(sums), 2, device=sums[0].device)).sum()


def check_replicas(model: nn.Module, step: int, sent_as: torch.dtype | None = None) -> None:
    """OddReplica, on every rank, unless all ranks have the same weights, rounded to `sent_as` where that is narrower.

    One all-reduce of a number for each rank.
    """
    if not dist.is_initialized():
        return
    everyones = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=next(model.parameters()).device)
    everyones[dist.get_rank()] = fingerprint(model, sent_as)
    dist.all_reduce(everyones)
    values = everyones.tolist()
    (common, count), *others = collections.Counter(values).most_common()
    if others:
        common = common if count > len(values) / 2 else None
        raise OddReplica([rank for rank, value in enumerate(values) if value != common], step)
