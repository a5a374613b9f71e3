"""The optimizer: Muon for the matrices, AdamW for the rest; on one rank or on many, by the same code.

`groups` and `specs` say which parameter takes which rule (`model/muon.py`, `model/adamw.py`); a `StepHyper` what
changes from step to step.

**Sharding (ZeRO stage 2, arXiv 1910.02054).** Every rank holds all weights and runs its own rows; gradients are
averaged. Each rank updates the parameters that it owns, keeps the optimizer state of those alone, and sends the result
to the others: a reduce-scatter of gradients and an all-gather of weights move as many bytes as the all-reduce that they
replace (`model/partition.py` says who owns what, `model/shards.py` does it):

* Muon needs whole matrices: Polar Express multiplies a matrix with its own transpose. Matrices of one shape are
  stacked, the stack is padded to a multiple of W, and each rank owns whole ones.
* AdamW works entry by entry: a table is cut by rows, evenly, in the dtype of its gradient.
* Tensors below 1024 entries: one all-reduce of all of them, and every rank makes the same update.

**Overlap.** The last micro-step's backward completes gradients from the head down to the embedding. After
`begin_overlap()` a hook on every parameter notices that; when all gradients of a bucket (some matrices of one shape,
one table) are there, their reduce-scatter starts while the backward goes on. Collectives must start in the same order
on every rank: the first such backward only watches, rank 0's order of arrival is sent to all, and from then on a bucket
waits for those before it. A model compiled as one graph completes all gradients at its end and overlaps nothing;
compiled block by block it overlaps. `step()` launches what is missing, then goes through the shards in the order in
which their gradients arrive: update, start the gather, next. Without `begin_overlap()` the same collectives run after
the backward: the result is the same, bit for bit.

**Transport** is in the parameter's own dtype, or in `transport_dtype` where that is narrower. With bfloat16 the owner
keeps the exact fp32 weight, everybody else its rounding, which never accumulates. A forward pass that casts weights to
bfloat16 first reads the same numbers on every rank; one in fp32 would not and must not ask for it. fp8 quantises the
fp32 weight, so that operands differ where the rounding to bfloat16 (2^-9) crosses a border of fp8's much coarser grid
(2^-4): a rank's gradient is then one at slightly other weights, and the ranks still apply one and the same mean. A
checkpoint holds the owners' exact weights; `round_foreign` makes of the others' what a gather would have left, so that
a resumed run goes on as if it had not stopped.

**State** is named slices: "muon_momentum/<parameter>" (whole matrices), "adamw_first/<parameter>" (this rank's rows),
and so on. `state_slices` and `weight_slices` of all ranks together hold every row of every name exactly once;
`load_slices` asks its reader for exactly what this rank owns. No slice knows how many ranks wrote it: a checkpoint of 8
ranks loads on 4 or on 1.

**Nothing waits for the device.** Numbers that change are 0-d tensors in host memory (a compiled update never
recompiles); whether a gradient was finite is a tensor of flags, `nonfinite`, and how long all of them were one of a
square, `gradient_square`, for the caller to copy and read some steps later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version

from model.adamw import adamw_update
from model.collectives import Collectives, Named, Reduction, Traffic
from model.hyper import GroupSpec, StepHyper
from model.muon import muon_update
from model.partition import Parameter, partition
from model.shards import MuonStack, Options, RowShard, Shard, Slice, SmallTensors

Reader = Callable[[str, int, int], Tensor]
EITHER = {torch.bfloat16, torch.float32}
"""the dtypes of tables and their state, by what a machine computes fast in: another machine goes on from either"""


class Optimizer:
    """Muon and AdamW over `groups` (name -> [(parameter name, parameter)]), as the specs of the same names say.

    process_group: the data-parallel ranks; None: alone. Every rank builds it with the same groups and the same weights.
    polar_dtype: what Polar Express computes in. transport_dtype: send wider gradients and weights as this (bfloat16).
    bucket_bytes: about how much one reduce-scatter of matrices holds. compile: compile the two update functions.

    `nonfinite` (bool, on the device) says for each name in `flagged` whether the last step's gradient had a NaN or Inf
    in what this rank owns; `gradient_square` (0-d), summed over ranks, is the square of the mean gradient's norm.
    `traffic` counts what this rank sent. Raises ValueError for groups and specs that do not fit each other.
    """

    def __init__(
        self,
        groups: Mapping[str, Named],
        specs: dict[str, GroupSpec],
        process_group: dist.ProcessGroup | None = None,
        *,
        polar_dtype: torch.dtype = torch.bfloat16,
        transport_dtype: torch.dtype | None = None,
        bucket_bytes: int = 64 << 20,
        compile: bool = False,
    ) -> None:
        options = Options(polar_dtype, transport_dtype, bucket_bytes)
        if compile:
            # One variant for every shape of the model: more than the eight that torch allows by default.
            settings: dict[str, Any] = {"fullgraph": True, "dynamic": False, "recompile_limit": 64}
            muon, adamw = torch.compile(muon_update, **settings), torch.compile(adamw_update, **settings)
            options = replace(options, muon=muon, adamw=adamw)
        self._comm = Collectives(process_group)
        self._shards = build_shards(groups, specs, self._comm, options)
        self._reductions: list[Reduction] = [reduction for shard in self._shards for reduction in shard.reductions]
        self._parameters = [named for reduction in self._reductions for named in reduction.parameters]
        self._step = torch.zeros(1, dtype=torch.int64)
        self.flagged = [name for shard in self._shards for name in shard.flagged]
        device = self._parameters[0][1].device
        self.nonfinite = torch.zeros(len(self.flagged), dtype=torch.bool, device=device)
        self.gradient_square = torch.zeros((), device=device)
        self._overlapping = False
        self._order = list(range(len(self._reductions)))
        self._order_agreed = False
        self._missing: list[int] = []
        self._ready: list[int] = []
        self._next = 0
        if self._comm.world > 1:
            self._listen()

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent since the start."""
        return self._comm.traffic

    @property
    def steps(self) -> int:
        """Steps taken, over all attempts."""
        return int(self._step)

    def _listen(self) -> None:
        """Have every parameter report its finished gradient while armed."""
        for index, reduction in enumerate(self._reductions):
            for _, parameter in reduction.parameters:

                def arrived(_: Tensor, index: int = index) -> None:
                    if self._overlapping:
                        self._arrived(index)

                parameter.register_post_accumulate_grad_hook(arrived)

    def begin_overlap(self) -> None:
        """The next backward is the step's last: reduce each gradient as soon as it is complete."""
        self._overlapping = True
        self._missing = [len(reduction.parameters) for reduction in self._reductions]
        self._ready.clear()

    def _arrived(self, index: int) -> None:
        """A gradient of reduction `index` is complete. Launch what is ready, in the order that all ranks agreed on."""
        self._missing[index] -= 1
        if self._missing[index] < 0:
            name = self._reductions[index].parameters[0][0]
            raise RuntimeError(
                f"a second backward pass reached the reduction of {name}: "
                "begin_overlap() goes before the last one only."
            )
        if self._missing[index] == 0:
            self._ready.append(index)
        while self._order_agreed and self._next < len(self._order) and not self._missing[self._order[self._next]]:
            self._launch()

    @torch.no_grad()
    def _launch(self) -> None:
        self._reductions[self._order[self._next]].launch()
        self._next += 1

    @torch.no_grad()
    def step(self, hyper: StepHyper) -> None:
        """Reduce what is not yet reduced, update what this rank owns, gather. Gradients are consumed (None afterwards).

        Raises RuntimeError naming a parameter that has no gradient.
        """
        while self._next < len(self._order):
            self._launch()
        self._agree()
        self._step += 1
        norms = {}
        for number in sorted(range(len(self._shards)), key=self._last_launch):
            shard = self._shards[number]
            for reduction in shard.reductions:
                reduction.wait()
            norms[number] = shard.update(hyper, self.steps)
        for shard in self._shards:
            shard.finish()
        self._changed()
        self.nonfinite = ~torch.isfinite(torch.cat([norms[number].float() for number in range(len(self._shards))]))
        holders = [self._comm.world if shard.replicated else 1 for shard in self._shards]
        squares = [norms[number].float().square().sum() / count for number, count in enumerate(holders)]
        self.gradient_square = torch.stack(squares).sum()
        self._overlapping, self._next = False, 0

    def _changed(self) -> None:
        """Count every parameter's version up: fp8 copies are kept until it counts (`model.fp8_tensor.Copies`).

        The updates write through detached tensors, and whether those count for the parameter is up to who looks on: a
        TorchDispatchMode hides them.
        """
        increment_version([parameter for _, parameter in self._parameters])

    def _last_launch(self, number: int) -> int:
        """When the last gradients of shard `number` were sent: the first to be complete is the first to be updated."""
        mine = {id(reduction) for reduction in self._shards[number].reductions}
        return max(at for at, index in enumerate(self._order) if id(self._reductions[index]) in mine)

    def _agree(self) -> None:
        """After the first armed backward: the order in which its gradients arrived on rank 0 becomes everybody's."""
        if self._overlapping and not self._order_agreed and len(self._ready) == len(self._order):
            self._order = self._comm.agree(self._ready, self.nonfinite.device)
            self._order_agreed = True

    def zero_grad(self) -> None:
        """Forget all gradients, also those that an armed backward has already sent."""
        for reduction in self._reductions:
            reduction.wait()
        for _, parameter in self._parameters:
            parameter.grad = None
        self._overlapping, self._next = False, 0

    def state_slices(self) -> list[Slice]:
        """The state that this rank has to save: every name's every row on exactly one rank, however many there are."""
        mine = [s for shard in self._shards if not shard.replicated or self._comm.rank == 0 for s in shard.state()]
        return [*mine, *self._counter()] if self._comm.rank == 0 else mine

    def _counter(self) -> list[Slice]:
        return [Slice("optimizer/steps", 0, self._step, 1)]

    def weight_slices(self) -> list[Slice]:
        """The weights that this rank has to save, exact: every parameter's every row on exactly one rank."""
        return [s for shard in self._shards for s in shard.weights()]

    @torch.no_grad()
    def load_slices(self, reader: Reader) -> None:
        """Fill this rank's state: reader(name, start, stop) returns these rows of a state that any number of ranks
        wrote, in bfloat16 or float32 whichever this model has.

        Raises ValueError naming a slice whose shape or dtype is not what this model needs.
        """
        for shard in self._shards:
            _fill(shard.state(), reader)
        _fill(self._counter(), reader)

    @torch.no_grad()
    def round_foreign(self) -> None:
        """After loading exact weights: what other ranks own as they would have sent it, in the transport dtype."""
        for shard in self._shards:
            shard.round_foreign()

    @contextmanager
    def preserve_state(self) -> Iterator[None]:
        """Whatever happens inside leaves weights, state and step count bit for bit as they were: for warming up.

        The copies are in host memory. What survives is what warming up is for: compiled code, the order of launches.
        """
        kept = [p.detach() for _, p in self._parameters]
        kept += [s.tensor for shard in self._shards for s in shard.state()] + [self._step]
        copies = [tensor.to("cpu", copy=True) for tensor in kept]
        try:
            yield
        finally:
            self.zero_grad()
            for tensor, copy in zip(kept, copies, strict=True):
                tensor.copy_(copy)
            self._changed()


def _fill(slices: Iterable[Slice], reader: Reader) -> None:
    for s in slices:
        rows = reader(s.name, s.start, s.start + len(s.tensor))
        if rows.shape != s.tensor.shape or (rows.dtype != s.tensor.dtype and {rows.dtype, s.tensor.dtype} != EITHER):
            found, needed = (f"{tuple(t.shape)} {t.dtype}" for t in (rows, s.tensor))
            raise ValueError(
                f"{s.name} from row {s.start}: found {found}, needed {needed}: it belongs to another model."
            )
        s.tensor.copy_(rows)


def build_shards(
    groups: Mapping[str, Named], specs: dict[str, GroupSpec], comm: Collectives, options: Options
) -> list[Shard]:
    """Every parameter into exactly one shard, as `model.partition` divides them."""
    _check(groups, specs)
    kinds = {group: specs[group].kind for group in groups}
    described = {g: [Parameter(name, tuple(p.shape), p.dtype) for name, p in named] for g, named in groups.items()}
    parameters = {name: p for named in groups.values() for name, p in named}
    group_of = {name: group for group, named in groups.items() for name, _ in named}
    shards: list[Shard] = []
    for shard in partition(described, kinds):
        named = [(p.name, parameters[p.name]) for p in shard.parameters]
        if shard.kind == "matrices":
            shards.append(MuonStack(named, shard, specs[shard.group], comm, options))
        elif shard.kind == "rows":
            shards.append(RowShard(named[0], shard, specs[shard.group], comm, options))
        else:
            shards.append(SmallTensors([(name, p, specs[group_of[name]]) for name, p in named], comm))
    return shards


def _check(groups: Mapping[str, Named], specs: dict[str, GroupSpec]) -> None:
    """Raises ValueError for groups and specs that do not fit each other or the kinds."""
    if not groups.keys() <= specs.keys():
        raise ValueError(f"no spec for group {sorted(groups.keys() - specs.keys())}: specs has {sorted(specs)}.")
    seen: set[int] = set()
    for key, named in groups.items():
        if specs[key].kind not in ("muon", "adamw"):
            raise ValueError(f"group {key}: kind is {specs[key].kind!r}, must be muon or adamw.")
        for name, p in named:
            if specs[key].kind == "muon" and p.dim() != 2:
                raise ValueError(f"{name} in group {key} has shape {tuple(p.shape)}: Muon takes matrices only.")
            if id(p) in seen:
                raise ValueError(f"{name} is in two groups, or twice in {key}.")
            seen.add(id(p))
    if not seen:
        raise ValueError("the optimizer was given no parameters.")
