"""Three ways to share parameters out among ranks: whole matrices, rows, not at all (essay: `model/optimizer.py`).

Each kind offers the same verbs, so that the optimizer is a loop over them:

    reductions        what may be launched once the parameters that it names have their gradients
    update(...)       this rank's arithmetic on what it owns; the gather of the new weights is begun. Returns for each
                      name in `flagged` the norm of its reduced gradient (this rank's part of it)
    finish()          the gathered weights stand in the parameters; temporaries are gone
    round_foreign()   weights that others own are what a gather would have left of them
    state()           the slices of optimizer state that this rank holds
    weights()         the slices of the weights that this rank owns
    replicated        whether every rank holds the same state, so that one of them is enough to save it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import partition
from model.adamw import AdamWScalars, adamw_update, math_dtype
from model.collectives import Collectives, Named, Reduction
from model.hyper import GroupSpec, StepHyper
from model.muon import MuonScalars, muon_update, second_moment_shape, step_size

# Bytes of weights that are updated at a time, which bounds the temporaries: a CPU's cache, a share of a GPU's memory.
CHUNK_BYTES = {"cpu": 1 << 20, "other": 128 << 20}


@dataclass
class Slice:
    """Rows start .. start + len(tensor) of the state or weight `name`, which has total_rows rows.

    `tensor` is the live storage, not a copy: whoever writes it while training goes on copies it first.
    """

    name: str
    start: int
    tensor: Tensor
    total_rows: int


@dataclass(frozen=True)
class Options:
    """What all shards of one optimizer share: dtypes of Polar Express and transport, bucket size, update functions."""

    polar_dtype: torch.dtype
    transport_dtype: torch.dtype | None
    bucket_bytes: int
    muon: Callable[..., None] = muon_update
    adamw: Callable[..., None] = adamw_update

    def wire(self, dtype: torch.dtype, world: int) -> torch.dtype:
        """What a tensor of `dtype` is sent as: the transport dtype if that is narrower and there is anybody to send
        to."""
        narrow = self.transport_dtype
        return narrow if narrow is not None and world > 1 and narrow.itemsize < dtype.itemsize else dtype


def _norm(grad: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """The norm of all entries (or one for each matrix), not finite where one of them is not."""
    return torch.linalg.vector_norm(grad, dim=dim, dtype=math_dtype(grad.dtype))


def _chunks(count: int, item_bytes: int, device: torch.device) -> Iterator[slice]:
    """0 .. count in pieces of about CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES["cpu" if device.type == "cpu" else "other"] // item_bytes)
    return (slice(low, min(low + step, count)) for low in range(0, count, step))


def as_rows(tensor: Tensor) -> Tensor:
    """A 0-d parameter as one row; anything else as it is."""
    return tensor.detach().view(1) if tensor.dim() == 0 else tensor.detach()


class MuonStack:
    """All Muon matrices of one shape and group, shared out whole: as `partition.Shard.owners` says.

    The stack is padded to M = ceil(K / W) slots a rank. It is reduced in buckets, each the next few slots of every rank
    (so the first bucket holds the first matrices of `named`, which should be the first to get gradients), updated at
    once and gathered at once.
    """

    replicated = False

    def __init__(
        self, named: Named, division: partition.Shard, spec: GroupSpec, comm: Collectives, options: Options
    ) -> None:
        self.named, self.spec, self.comm, self.options = list(named), spec, comm, options
        example = self.named[0][1]
        self.shape, self.device, self.dtype = example.shape, example.device, math_dtype(example.dtype)
        self.wire = options.wire(example.dtype, comm.world)
        self.slots = division.slots(comm.world)
        self.place = division.owners(comm.world)
        self.own = [pair for pair, (rank, _) in zip(self.named, self.place, strict=True) if rank == comm.rank]
        self.momentum = self._buffer(len(self.own), self.shape, self.dtype).zero_()
        self.second = self._buffer(len(self.own), second_moment_shape(*self.shape), self.dtype).zero_()
        self.flagged = [name for name, _ in self.own]
        self.muon = partial(
            options.muon,
            norm_factor=spec.norm_factor,
            muon_eq=spec.muon_eq,
            muon_plus=spec.muon_plus,
            dtype=options.polar_dtype,
        )
        self.grads: list[Tensor] = []  # of a rank that is alone, else `reduced`: (slots, rows, columns)
        self.reduced: Tensor | None = None
        self.gather: tuple[dist.Work, Tensor] | None = None
        self.reductions = list(self._cut())

    def _buffer(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(count, *shape, dtype=dtype, device=self.device)

    def _cut(self) -> Iterator[Reduction]:
        """A reduction for every few slots, as many as `bucket_bytes` holds and at least one."""
        world = self.comm.world
        step = max(1, self.options.bucket_bytes // (self.shape.numel() * self.wire.itemsize * world))
        for low in range(0, self.slots, step):
            high = min(low + step, self.slots)
            yield Reduction(self.named[low * world : high * world], partial(self._reduce, low, high))

    def _reduce(self, low: int, high: int, grads: list[Tensor]) -> dist.Work | None:
        """Pack the gradients of every rank's slots low .. high and scatter their mean to the owners."""
        world = self.comm.world
        if world == 1:
            self.grads[low:high] = grads
            return None
        if self.reduced is None:
            self.reduced = self._buffer(self.slots, self.shape, self.wire)
        full = self._buffer(world * (high - low), self.shape, self.wire).view(world, high - low, *self.shape)
        if len(grads) < world * (high - low):
            full.zero_()
        places = self.place[low * world : high * world]
        torch._foreach_copy_([full[rank, slot - low] for rank, slot in places], grads)
        return self.comm.reduce_scatter(self.reduced[low:high], full)

    def update(self, hyper: StepHyper, step: int) -> Tensor:
        """Muon on the owned matrices, some at a time, then begin the gather."""
        spec, count, reduced = self.spec, len(self.own), self.reduced
        eta = step_size(spec.lr * hyper.lr_mult, *self.shape)
        scalars = MuonScalars.of(eta, spec.weight_decay * hyper.wd_mult, hyper.momentum, spec.beta2, self.dtype)
        norms = torch.zeros(count, dtype=self.dtype, device=self.device)
        sent = None if reduced is None else self._buffer(self.slots, self.shape, self.wire)
        for part in _chunks(count, self.shape.numel() * self.dtype.itemsize, self.device):
            owned = [p.detach() for _, p in self.own[part]]
            weight = torch.stack(owned).to(self.dtype)  # (K, rows, columns)
            grad = (torch.stack(self.grads[part]) if reduced is None else reduced[part]).to(self.dtype)
            norms[part] = _norm(grad, dim=(1, 2))
            self.muon(weight, grad, self.momentum[part], self.second[part], scalars)
            torch._foreach_copy_(owned, list(weight.unbind()))
            if sent is not None:
                sent[part].copy_(weight)
        if sent is not None:
            sent[count:].zero_()
            gathered = self._buffer(self.comm.world * self.slots, self.shape, self.wire)  # (W slots, rows, columns)
            self.gather = self.comm.all_gather(gathered, sent), gathered
        return norms

    def finish(self) -> None:
        """Owners keep the exact weights, the others take what was sent."""
        if self.gather is not None:
            work, gathered = self.gather
            work.wait()
            foreign = [(p, at) for (_, p), at in zip(self.named, self.place, strict=True) if at[0] != self.comm.rank]
            if foreign:
                sources = [gathered[rank * self.slots + slot] for _, (rank, slot) in foreign]
                torch._foreach_copy_([p.detach() for p, _ in foreign], sources)
        self.grads, self.reduced, self.gather = [], None, None

    def round_foreign(self) -> None:
        for (_, p), at in zip(self.named, self.place, strict=True):
            if at[0] != self.comm.rank and p.dtype != self.wire:
                p.detach().copy_(p.detach().to(self.wire))

    def state(self) -> Iterator[Slice]:
        for (name, _), momentum, second in zip(self.own, self.momentum, self.second, strict=True):
            yield Slice(f"muon_momentum/{name}", 0, momentum, momentum.size(0))
            yield Slice(f"muon_second/{name}", 0, second, second.size(0))

    def weights(self) -> Iterator[Slice]:
        for name, parameter in self.own:
            yield Slice(f"weight/{name}", 0, parameter.detach(), parameter.size(0))


class RowShard:
    """One large AdamW tensor, shared by rows: rank r owns the r-th ceil(rows / W) of them, the last perhaps fewer."""

    replicated = False

    def __init__(
        self,
        named: tuple[str, nn.Parameter],
        division: partition.Shard,
        spec: GroupSpec,
        comm: Collectives,
        options: Options,
    ) -> None:
        name, parameter = self.name, self.parameter = named
        self.spec, self.comm, self.options = spec, comm, options
        self.wire = options.wire(parameter.dtype, comm.world)
        self.total = parameter.size(0)
        self.share = math.ceil(self.total / comm.world)
        [(_, self.start, self.stop)] = division.slices(comm.world, comm.rank)
        # Nothing padded, nothing cast: the gather may write into the parameter itself.
        self.direct = self.wire == parameter.dtype and self.share * comm.world == self.total
        self.first = torch.zeros_like(self._own())
        self.second = torch.zeros_like(self._own())
        self.flagged = [name]
        self.reduced: Tensor
        self.gather: tuple[dist.Work, Tensor] | None = None
        self.reductions = [Reduction([(name, parameter)], self._reduce)]

    def _own(self) -> Tensor:
        return self.parameter.detach()[self.start : self.stop]

    def _padded(self, rows: Tensor, count: int) -> Tensor:
        """`rows` in the wire dtype, contiguous, then zero rows up to `count`; itself where it is so already."""
        if rows.size(0) == count:
            return rows.to(self.wire).contiguous()
        padded = rows.new_zeros(count, *rows.shape[1:], dtype=self.wire)
        padded[: rows.size(0)].copy_(rows)
        return padded

    def _reduce(self, grads: list[Tensor]) -> dist.Work | None:
        world = self.comm.world
        full = self._padded(grads[0], world * self.share)  # (W share, ...)
        self.reduced = full if world == 1 else full.new_empty(self.share, *full.shape[1:])
        return None if world == 1 else self.comm.reduce_scatter(self.reduced, full)

    def update(self, hyper: StepHyper, step: int) -> Tensor:
        """AdamW on the owned rows, some at a time, then begin the gather."""
        scalars = AdamWScalars.of(self.spec, hyper, step, math_dtype(self.parameter.dtype))
        own = self._own()
        for part in _chunks(len(own), own.element_size() * self.parameter[0].numel(), own.device):
            self.options.adamw(own[part], self.reduced[part], self.first[part], self.second[part], scalars)
        if self.comm.world > 1:
            sent = self._padded(own, self.share)  # (share, ...)
            whole = (self.comm.world * self.share, *sent.shape[1:])
            gathered = self.parameter.detach() if self.direct else sent.new_empty(whole)
            self.gather = self.comm.all_gather(gathered, sent.clone() if sent is own else sent), gathered
        return _norm(self.reduced).view(1)

    def finish(self) -> None:
        """Owners keep the exact rows, the others take what was sent."""
        if self.gather is not None:
            work, gathered = self.gather
            work.wait()
            if not self.direct:
                weight = self.parameter.detach()
                weight[: self.start].copy_(gathered[: self.start])
                weight[self.stop :].copy_(gathered[self.stop : self.total])
        del self.reduced
        self.gather = None

    def round_foreign(self) -> None:
        weight = self.parameter.detach()
        if weight.dtype != self.wire:
            for rows in (weight[: self.start], weight[self.stop :]):
                rows.copy_(rows.to(self.wire))

    def state(self) -> Iterator[Slice]:
        if self.start < self.stop:
            yield Slice(f"adamw_first/{self.name}", self.start, self.first, self.total)
            yield Slice(f"adamw_second/{self.name}", self.start, self.second, self.total)

    def weights(self) -> Iterator[Slice]:
        if self.start < self.stop:
            yield Slice(f"weight/{self.name}", self.start, self._own(), self.total)


class SmallTensors:
    """All AdamW tensors of one dtype below `partition.SMALL` elements: one all-reduce for all of them, and every rank
    updates every one."""

    replicated = True

    def __init__(self, entries: list[tuple[str, nn.Parameter, GroupSpec]], comm: Collectives) -> None:
        self.entries, self.comm = entries, comm
        self.first = [torch.zeros_like(p.detach()) for _, p, _ in entries]
        self.second = [torch.zeros_like(p.detach()) for _, p, _ in entries]
        self.flagged = [name for name, _, _ in entries]
        self.reduced: list[Tensor] = []
        self.reductions = [Reduction([(name, p) for name, p, _ in entries], self._reduce)]

    def _reduce(self, grads: list[Tensor]) -> dist.Work | None:
        flat = torch.cat([grad.reshape(-1) for grad in grads])  # (all elements,)
        parts = flat.split([grad.numel() for grad in grads])
        self.reduced = [part.view(grad.shape) for part, grad in zip(parts, grads, strict=True)]
        return None if self.comm.world == 1 else self.comm.all_reduce(flat)

    def update(self, hyper: StepHyper, step: int) -> Tensor:
        for (_, p, spec), grad, first, second in zip(self.entries, self.reduced, self.first, self.second, strict=True):
            adamw_update(p.detach(), grad, first, second, AdamWScalars.of(spec, hyper, step, math_dtype(p.dtype)))
        return torch.stack([_norm(grad) for grad in self.reduced])

    def finish(self) -> None:
        self.reduced = []

    def round_foreign(self) -> None:
        """Nothing: every rank makes these itself."""

    def state(self) -> Iterator[Slice]:
        for (name, _, _), first, second in zip(self.entries, self.first, self.second, strict=True):
            yield Slice(f"adamw_first/{name}", 0, as_rows(first), len(as_rows(first)))
            yield Slice(f"adamw_second/{name}", 0, as_rows(second), len(as_rows(second)))

    def weights(self) -> Iterator[Slice]:
        """Every parameter belongs to exactly one rank: these to rank 0."""
        if self.comm.rank == 0:
            for name, p, _ in self.entries:
                yield Slice(f"weight/{name}", 0, as_rows(p), len(as_rows(p)))


Shard = MuonStack | RowShard | SmallTensors
