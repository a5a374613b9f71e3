"""The division that the plan counts with is the optimizer's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.config import GPTConfig
from model.gpt import GPT
from model.optimizer import build_shards
from model.partition import Parameter, parameter_groups, partition
from model.scaling import RULES, derive
from model.shards import Options


def meta_model(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config, torch.bfloat16)


@pytest.mark.parametrize("generation", ["feb", "head"])
@pytest.mark.parametrize("depth", [1, 4, 7])
def test_the_parameters_are_those_of_the_model_in_its_order(depth: int, generation: str) -> None:
    config = GPTConfig.for_depth(depth, 1000, 64, generation)
    described = parameter_groups(config, torch.bfloat16, torch.float32)
    groups = meta_model(config).groups()
    assert list(described) == list(groups)
    for group, named in groups.items():
        assert described[group] == [Parameter(name, tuple(p.shape), p.dtype) for name, p in named]


@pytest.mark.parametrize("generation", ["feb", "head"])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_each_rank_owns_the_slices_that_the_division_says(world: int, generation: str) -> None:
    config = GPTConfig.for_depth(5, 1000, 64, generation)
    model = meta_model(config)
    specs = derive(config, RULES[generation], steps=1, batch_tokens=64).specs
    kinds = {name: spec.kind for name, spec in specs.items()}
    division = partition(parameter_groups(config, torch.bfloat16, torch.float32), kinds)
    for rank in range(world):
        comm: Any = SimpleNamespace(world=world, rank=rank)
        shards = build_shards(model.groups(), specs, comm, Options(torch.bfloat16, None, 1 << 20))
        weights = {(s.name, s.start, len(s.tensor), s.total_rows) for shard in shards for s in shard.weights()}
        mine = [each for each in division if rank == 0 or each.kind != "replicated"]
        said = [piece for each in mine for piece in each.slices(world, rank)]
        assert weights == {(f"weight/{p.name}", start, stop - start, p.rows) for p, start, stop in said if stop > start}
