"""Which rank owns what: how parameters are divided among ranks, from names and shapes alone. Free of torch.

Matrices of Muon are stacked by shape and dealt out whole, large AdamW tensors are cut by rows, small ones are
everybody's. The plan's memory model and the optimizer's shards both ask here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from model.config import SMEAR_CHANNELS, GPTConfig

SMALL = 1024
Shape = tuple[int, ...]


class Parameter(NamedTuple):
    """A parameter by name; `dtype` is whatever tells tensors apart that cannot lie in one buffer."""

    name: str
    shape: Shape
    dtype: Any

    @property
    def rows(self) -> int:
        """A 0-d parameter is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """Parameters of one group that are divided together; "replicated" holds those of several groups."""

    kind: Literal["matrices", "rows", "replicated"]
    group: str
    parameters: tuple[Parameter, ...]
    offset: int = 0

    def owners(self, world: int) -> list[tuple[int, int]]:
        """(rank, slot) of each matrix: number j belongs to rank (j + offset) mod W."""
        return [((j + self.offset) % world, j // world) for j in range(len(self.parameters))]

    def slots(self, world: int) -> int:
        """Matrices of the fullest rank."""
        return math.ceil(len(self.parameters) / world)

    def slices(self, world: int, rank: int) -> list[tuple[Parameter, int, int]]:
        """Each parameter of which `rank` owns rows, with the first of them and the one after the last."""
        if self.kind == "rows":
            share = math.ceil(self.parameters[0].rows / world)
            start = min(rank * share, self.parameters[0].rows)
            return [(self.parameters[0], start, min(start + share, self.parameters[0].rows))]
        owned = self.parameters
        if self.kind == "matrices":
            owned = tuple(p for p, (owner, _) in zip(owned, self.owners(world), strict=True) if owner == rank)
        return [(parameter, 0, parameter.rows) for parameter in owned]


def partition(groups: Mapping[str, Sequence[Parameter]], kinds: Mapping[str, str]) -> list[Shard]:
    """Every parameter in exactly one shard; `kinds` says "muon" or "adamw" for each group.

    Stacks are filled from the last parameter, whose gradient comes first, and each starts at the rank after the last
    one's end, so that remainders do not all fall to the low ranks.
    """
    shards: list[Shard] = []
    small: dict[Hashable, list[Parameter]] = {}
    offset = 0
    for group, parameters in groups.items():
        stacks: dict[Hashable, list[Parameter]] = {}
        for parameter in reversed(parameters):
            if kinds[group] == "muon":
                stacks.setdefault((parameter.shape, parameter.dtype), []).append(parameter)
            elif parameter.size < SMALL:
                small.setdefault(parameter.dtype, []).append(parameter)
            else:
                shards.append(Shard("rows", group, (parameter,)))
        for stack in stacks.values():
            shards.append(Shard("matrices", group, tuple(stack), offset))
            offset += len(stack)
    return shards + [Shard("replicated", "", tuple(parameters)) for parameters in small.values()]


def parameter_groups(config: GPTConfig, compute_dtype: Any, master_dtype: Any) -> dict[str, list[Parameter]]:
    """What `GPT(config).groups()` holds, in its order; embedding tables are in `compute_dtype`."""
    V, d = config.padded_vocab, config.width
    matrices: list[tuple[str, Shape]] = []
    for i in range(config.depth):
        matrices += [(f"blocks.{i}.attn.{name}.weight", (d, d)) for name in "qkvo"]
        if i in config.value_embed_layers:
            matrices.append((f"blocks.{i}.attn.ve_gate.weight", (config.heads, config.ve_gate_channels)))
        matrices += [(f"blocks.{i}.mlp.up.weight", (4 * d, d)), (f"blocks.{i}.mlp.down.weight", (d, 4 * d))]
    smear: list[tuple[str, Shape]] = [("smear_lambda", ())] if config.smear else []
    backout: list[tuple[str, Shape]] = [("backout_lambda", ())] if config.backout else []
    gate: list[tuple[str, Shape]] = [("smear_gate.weight", (1, SMEAR_CHANNELS))] if config.smear else []
    groups: dict[str, list[tuple[str, Shape]]] = {
        "resid_lambdas": [("resid_lambdas", (config.depth,))],
        "x0_lambdas": [("x0_lambdas", (config.depth,))],
        "smear_backout": smear + backout + gate,
        "wte": [("wte.weight", (V, d))],
        "value_embeds": [(f"value_embeds.{i}.weight", (V, d)) for i in config.value_embed_layers],
        "matrices": matrices,
        "head": [("head.weight", (V, d))],
    }
    dtypes = {"wte": compute_dtype, "value_embeds": compute_dtype}
    return {
        group: [Parameter(name, shape, dtypes.get(group, master_dtype)) for name, shape in named]
        for group, named in groups.items()
        if named
    }
