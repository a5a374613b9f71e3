"""The optimizer over many ranks (gloo processes on this machine) against one rank, with the real GPT.

A worker process runs one `scenario` function of this module; what it returns is read back by the test. The processes
are forked from a server that has imported torch once.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers import loopback, on_ranks
from model.config import GPTConfig
from model.gpt import GPT
from model.hyper import GroupSpec, StepHyper
from model.optimizer import Optimizer

ROWS = 24  # divisible by every number of ranks here
TINY = GPTConfig(depth=4, vocab_size=300, seq_len=16, width=64, head_dim=16)
SPECS = {
    "matrices": GroupSpec("matrices", "muon", lr=0.02, weight_decay=0.28),
    "wte": GroupSpec("wte", "adamw", lr=0.3, weight_decay=0.001, betas=(0.8, 0.995)),
    "value_embeds": GroupSpec("value_embeds", "adamw", lr=0.15, weight_decay=0.01, betas=(0.8, 0.995)),
    "head": GroupSpec("head", "adamw", lr=0.008, weight_decay=0.01, betas=(0.8, 0.96)),
    "resid_lambdas": GroupSpec("resid_lambdas", "adamw", lr=0.005, weight_decay=0.05),
    "x0_lambdas": GroupSpec("x0_lambdas", "adamw", lr=0.5, betas=(0.96, 0.95)),
    "smear_backout": GroupSpec("smear_backout", "adamw", lr=0.2),
}


def hyper(step: int) -> StepHyper:
    """Moves everything that a schedule moves."""
    return StepHyper(lr_mult=min(1.0, (step + 1) / 4), momentum=0.85 + 0.005 * step, wd_mult=1 - step / 40)


@torch.no_grad()
def stir(model: GPT) -> None:
    """Give the parameters that begin as zero a value. While no block adds anything, the gradients of lambda and mu
    vanish but for rounding, which differs with the number of ranks, and Adam divides it by its own size: nothing
    could then be compared."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def build(config: GPTConfig, dtype: torch.dtype, group: dist.ProcessGroup | None, **options) -> tuple[GPT, Optimizer]:
    model = GPT(config, compute_dtype=torch.float32 if dtype == torch.float64 else dtype)
    model.init_weights(0)
    stir(model)
    model = model.double() if dtype == torch.float64 else model
    options = {"polar_dtype": torch.promote_types(dtype, torch.float32), "bucket_bytes": 1 << 16, **options}
    return model, Optimizer(model.groups(), SPECS, group, **options)


def train(
    model: GPT, optimizer: Optimizer, steps: range, rank: int, world: int, overlap: bool, micro_steps: int = 1
) -> None:
    """Every step has the same ROWS rows whatever the number of ranks: each takes its share, in micro_steps parts."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(0, model.config.vocab_size, (ROWS, model.config.seq_len + 1), generator=generator)
        mine = rows.chunk(world)[rank].chunk(micro_steps)
        for number, part in enumerate(mine):
            if overlap and number == micro_steps - 1:
                optimizer.begin_overlap()
            (model.loss(part[:, :-1], part[:, 1:]) / micro_steps).backward()
        optimizer.step(hyper(step))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def slices_of(optimizer: Optimizer) -> list[tuple[str, int, Tensor, int]]:
    slices = optimizer.state_slices() + optimizer.weight_slices()
    return [(s.name, s.start, s.tensor.clone(), s.total_rows) for s in slices]


def scenario_train(
    rank: int, world: int, config: GPTConfig, dtype: torch.dtype, steps: int, overlap: bool = True, **options
):
    model, optimizer = build(config, dtype, dist.group.WORLD, **options)
    train(model, optimizer, range(steps), rank, world, overlap)
    return {"weights": weights_of(model), "slices": slices_of(optimizer), "traffic": optimizer.traffic}


def scenario_overlap(rank: int, world: int):
    """Train with overlap and without, in fp32 with accumulation."""
    weights = []
    for overlap in (True, False):
        model, optimizer = build(TINY, torch.float32, dist.group.WORLD)
        train(model, optimizer, range(4), rank, world, overlap, micro_steps=2)
        weights.append(weights_of(model))
    return weights


def scenario_launches(rank: int, world: int, backend: str | None):
    """How many collectives had been launched when the last, ..., the first block's own gradients were there."""
    model, optimizer = build(TINY, torch.float32, dist.group.WORLD)
    launched: dict[int, int] = {}
    for number, block in enumerate(model.blocks):
        block.mlp.up.weight.register_post_accumulate_grad_hook(
            lambda _, number=number: launched.update({number: optimizer.traffic.calls["reduce_scatter"]})
        )
        if backend:
            block.compile(backend=backend, fullgraph=True)
    train(model, optimizer, range(1), rank, world, overlap=True)
    optimizer.traffic.calls.clear()
    train(model, optimizer, range(1, 2), rank, world, overlap=True)
    return launched, optimizer.traffic.calls["reduce_scatter"]


def scenario_resume(rank: int, world: int, slices: list, steps: range):
    """Load what another number of ranks saved, reading only the rows asked for, and train on."""
    model, optimizer = build(TINY, torch.float64, dist.group.WORLD)
    reader = reader_of(slices)
    model.load_state_dict(
        {name: reader(f"weight/{name}", 0, len(p) if p.dim() else 1).view_as(p) for name, p in model.named_parameters()}
    )
    optimizer.load_slices(reader)
    loaded = slices_of(optimizer)
    train(model, optimizer, steps, rank, world, overlap=True)
    return {"weights": weights_of(model), "loaded": loaded, "steps": optimizer.steps}


def scenario_bf16(rank: int, world: int):
    """One step's reduced gradients by transport; then four steps with bf16, at once and resumed after two from exact
    weights.

    The forward pass is in fp32 here, and so sees whether the weights of other owners are those that a gather leaves.
    """
    moments = {}
    for transport in (None, torch.bfloat16):
        model, optimizer = build(TINY, torch.float32, dist.group.WORLD, transport_dtype=transport)
        train(model, optimizer, range(1), rank, world, overlap=True)
        moments[transport] = slices_of(optimizer)
    train(model, optimizer, range(1, 2), rank, world, overlap=True)
    saved: list[list] = [[] for _ in range(world)]
    dist.all_gather_object(saved, slices_of(optimizer))
    resumed, again = build(TINY, torch.float32, dist.group.WORLD, transport_dtype=torch.bfloat16)
    reader = reader_of([s for slices in saved for s in slices])
    resumed.load_state_dict(
        {
            name: reader(f"weight/{name}", 0, len(p) if p.dim() else 1).view_as(p)
            for name, p in resumed.named_parameters()
        }
    )
    again.load_slices(reader)
    again.round_foreign()
    for one, its in ((model, optimizer), (resumed, again)):
        train(one, its, range(2, 4), rank, world, overlap=True)
    return {
        "exact": moments[None],
        "bf16": moments[torch.bfloat16],
        "whole": weights_of(model),
        "resumed": weights_of(resumed),
    }


def scenario_odd(rank: int, world: int):
    """Rows, matrices and tensors that no number of ranks divides; a second armed backward; an unreached parameter."""
    torch.manual_seed(0)
    big, small = nn.Parameter(torch.randn(1031, 3)), nn.Parameter(torch.randn(7))
    few = nn.Parameter(torch.randn(1, 2000))
    matrices = [(f"m{i}", nn.Parameter(torch.randn(6, 10))) for i in range(5)]
    groups = {"matrices": matrices, "rest": [("big", big), ("few", few), ("small", small)]}
    specs = {"matrices": SPECS["matrices"], "rest": GroupSpec("rest", "adamw", lr=0.1)}
    optimizer = Optimizer(groups, specs, dist.group.WORLD, polar_dtype=torch.float32)
    everything = [*matrices, *groups["rest"]]

    def loss() -> Tensor:
        return sum(((rank + 1) * p.sin()).sum() for _, p in everything)

    for _ in range(3):
        optimizer.begin_overlap()
        loss().backward()
        optimizer.step(StepHyper())
    result = {"weights": {name: p.detach().clone() for name, p in everything}, "slices": slices_of(optimizer)}
    optimizer.begin_overlap()
    loss().backward()
    with pytest.raises(RuntimeError, match="second backward"):
        loss().backward()
    optimizer.zero_grad()  # also of what was on its way
    optimizer.begin_overlap()
    loss().backward()
    optimizer.step(StepHyper())
    return result


def scenario_fault(rank: int, world: int):
    """One rank's NaN in one matrix's gradient: who says so?"""
    model, optimizer = build(TINY, torch.float32, dist.group.WORLD)
    rows = torch.zeros(1, 17, dtype=torch.int64)
    model.loss(rows[:, :-1], rows[:, 1:]).backward()
    if rank == 1:
        model.blocks[1].mlp.up.weight.grad[3, 5] = math.nan
        model.head.weight.grad[7, 0] = math.inf
    optimizer.step(hyper(0))
    return [name for name, bad in zip(optimizer.flagged, optimizer.nonfinite.tolist(), strict=True) if bad]


@pytest.fixture(autouse=True)
def _one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def reader_of(slices: list):
    """A reader over slices that any number of ranks wrote: joins them by name and start row."""

    def read(name: str, start: int, stop: int) -> Tensor:
        found = sorted(((first, rows) for n, first, rows, _ in slices if n == name), key=lambda pair: pair[0])
        assert found, name
        return torch.cat([rows for _, rows in found])[start:stop]

    return read


def gathered(results: list[dict], key: str = "slices") -> dict[str, Tensor]:
    """All ranks' slices joined; checks that every row of every name was on exactly one rank."""
    slices = [s for result in results for s in result[key]]
    joined = {}
    for name in {s[0] for s in slices}:
        mine = sorted((s for s in slices if s[0] == name), key=lambda s: s[1])
        at = 0
        for _, start, rows, _ in mine:
            assert start == at, name
            at += len(rows)
        assert at == mine[0][3], name
        joined[name] = torch.cat([rows for _, _, rows, _ in mine])
    return joined


def distances(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """How far two tensors of one name are apart, relative to that tensor's norm."""
    assert a.keys() == b.keys()
    return {n: ((a[n].double() - b[n].double()).norm() / b[n].double().norm().clamp_min(1e-30)).item() for n in a}


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(distances(a, b).values())


def reduced_gradients(results: list[dict]) -> dict[str, Tensor]:
    """The first step's reduced gradients but for a factor: the first moments start as zero and are linear in them."""
    return {n: t for n, t in gathered(results).items() if n.startswith(("muon_momentum/", "adamw_first/"))}


@functools.cache
def alone(config: GPTConfig, dtype: torch.dtype, steps: int) -> dict:
    model, optimizer = build(config, dtype, None)
    train(model, optimizer, range(steps), 0, 1, overlap=True)
    return {"weights": weights_of(model), "slices": slices_of(optimizer)}


def check_world(world: int, config: GPTConfig, steps: int, folder: Path) -> tuple[float, float]:
    """fp64: weights and state after `steps`; fp32: the first step's reduced gradients. Returns the distances."""
    kwargs = {"config": config, "function": scenario_train, "world": world}
    many = on_ranks(folder=folder / "f64", dtype=torch.float64, steps=steps, **kwargs)
    one = alone(config, torch.float64, steps)
    for result in many:
        assert worst(result["weights"], many[0]["weights"]) == 0
    drift = worst(gathered(many), gathered([one]))
    assert drift < 1e-9
    many = on_ranks(folder=folder / "f32", dtype=torch.float32, steps=1, **kwargs)
    one, exact = (reduced_gradients([alone(config, dtype, 1)]) for dtype in (torch.float32, torch.float64))
    rounding = distances(
        one, exact
    )  # a scalar whose terms cancel has more than 1e-6 of it on one rank already, and as much on two
    gradient = distances(reduced_gradients(many), one)
    assert {name: (far, rounding[name]) for name, far in gradient.items() if far >= max(1e-6, 2 * rounding[name])} == {}
    return drift, max(value for name, value in gradient.items() if rounding[name] < 1e-6)


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    check_world(2, TINY, 8, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_d4_on_many_ranks_trains_as_on_one(world: int, tmp_path: Path) -> None:
    drift, gradient = check_world(world, GPTConfig.for_depth(4, 512, 16), 20, tmp_path)
    print(f"\n{world} ranks: fp64 weights and state after 20 steps {drift:.1e}, fp32 reduced gradients {gradient:.1e}")


def test_overlap_changes_no_bit(tmp_path: Path) -> None:
    for on, off in on_ranks(2, tmp_path / "ranks", scenario_overlap):
        assert all(torch.equal(on[name], off[name]) for name in on)


@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", id="blocks compiled", marks=pytest.mark.slow)])
def test_reductions_start_during_the_backward(backend: str | None, tmp_path: Path) -> None:
    """The head's and the last block's gradients are on their way before the first block's backward is done."""
    for launched, total in on_ranks(2, tmp_path / "ranks", scenario_launches, backend=backend):
        assert 0 < launched[3] < launched[1] < launched[0] < total


def test_state_moves_between_numbers_of_ranks(tmp_path: Path) -> None:
    """3 ranks -> 2 ranks -> 1 rank against one rank throughout, in fp64."""
    three = on_ranks(3, tmp_path / "three", scenario_train, config=TINY, dtype=torch.float64, steps=4)
    saved = [s for result in three for s in result["slices"]]
    two = on_ranks(2, tmp_path / "two", scenario_resume, slices=saved, steps=range(4, 7))
    before, after = gathered(three), gathered(two, "loaded")
    assert all(torch.equal(before[n], after[n]) for n in before.keys() | after.keys())
    assert {result["steps"] for result in two} == {7}
    one = alone(TINY, torch.float64, 7)
    assert worst(two[0]["weights"], one["weights"]) < 1e-9


def test_numbers_that_do_not_divide(tmp_path: Path) -> None:
    results = on_ranks(3, tmp_path / "ranks", scenario_odd)
    for result in results:
        assert worst(result["weights"], results[0]["weights"]) == 0
    joined = gathered(results)
    for name, weight in results[0]["weights"].items():
        assert torch.equal(joined[f"weight/{name}"], weight)


def test_bf16_transport(tmp_path: Path) -> None:
    """Owners keep exact weights, everybody else their bf16 rounding: what a bf16 forward reads is the same on every
    rank."""
    results = on_ranks(
        2,
        tmp_path / "ranks",
        scenario_train,
        config=TINY,
        dtype=torch.bfloat16,
        steps=3,
        transport_dtype=torch.bfloat16,
    )
    masters = gathered(results)
    differing = 0
    for name in results[0]["weights"]:
        a, b = (result["weights"][name] for result in results)
        assert torch.equal(a.bfloat16(), b.bfloat16()), name
        assert torch.equal(masters[f"weight/{name}"].view_as(a).bfloat16(), a.bfloat16()), name
        differing += not torch.equal(a, b)
    assert differing > 0
    plain = on_ranks(2, tmp_path / "plain", scenario_train, config=TINY, dtype=torch.bfloat16, steps=3)
    sent, full = results[0]["traffic"], plain[0]["traffic"]
    assert sent.calls["all_gather"] == full.calls["all_gather"]
    assert 0.5 * full.bytes["all_gather"] <= sent.bytes["all_gather"] < full.bytes["all_gather"]


def test_bf16_transport_rounds_gradients_once_and_resumes_exactly(tmp_path: Path) -> None:
    """A mean of two rounded gradients, and its own rounding: 2^-8 of the norm at most, and not nothing."""
    results = on_ranks(2, tmp_path / "ranks", scenario_bf16)
    exact, rounded = (
        {name: t for name, t in gathered(results, key).items() if name.startswith(("muon_momentum/", "adamw_first/"))}
        for key in ("exact", "bf16")
    )
    far = distances(rounded, exact)
    assert 0 < max(far.values()) < 2**-8
    assert all(far[name] > 0 for name in far if "mlp" in name)
    for result in results:
        assert all(torch.equal(result["whole"][name], result["resumed"][name]) for name in result["whole"])
    assert worst(results[0]["whole"], results[1]["whole"]) > 0


def test_every_rank_hears_of_a_bad_gradient_that_it_owns(tmp_path: Path) -> None:
    named = on_ranks(2, tmp_path / "ranks", scenario_fault)
    assert sorted(set(named[0] + named[1])) == ["blocks.1.mlp.up.weight", "head.weight"]


def test_collectives_and_bytes_are_those_of_the_formula(tmp_path: Path) -> None:
    """Per step: matrices in stacks padded to the world, tables by rows, small tensors twice over the ring (facts:
    roofline)."""
    world, steps = 3, 2
    results = on_ranks(world, tmp_path / "ranks", scenario_train, config=TINY, dtype=torch.float32, steps=steps)
    groups = GPT(TINY).groups()
    stacks: dict[torch.Size, int] = {}
    for _, p in groups["matrices"]:
        stacks[p.shape] = stacks.get(p.shape, 0) + 1
    sharded = sum(math.ceil(count / world) * world * shape.numel() * 4 for shape, count in stacks.items())
    rest = [p for key, named in groups.items() if key != "matrices" for _, p in named]
    sharded += sum(math.ceil(p.size(0) / world) * world * p[0].numel() * 4 for p in rest if p.numel() >= 1024)
    small = sum(p.numel() * 4 for p in rest if p.numel() < 1024)
    for result in results:
        traffic = result["traffic"]
        assert traffic.bytes["reduce_scatter"] == traffic.bytes["all_gather"] == steps * sharded
        assert traffic.bytes["all_reduce"] == steps * small
        assert traffic.calls["all_reduce"] == steps
        assert traffic.calls["broadcast"] == 1  # the order of launches, once
        assert traffic.moved(world) == pytest.approx(steps * (2 * sharded + 2 * small) * (world - 1) / world)
