"""The optimizer on one rank: AdamW against torch's, state as slices, refusals, determinism, and the traffic of
published shapes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.config import GPTConfig
from model.gpt import GPT
from model.hyper import GroupSpec, StepHyper
from model.optimizer import Optimizer

TINY = GPTConfig(depth=3, vocab_size=300, seq_len=16, width=64, head_dim=16)


def specs_for(groups: dict) -> dict[str, GroupSpec]:
    return {
        name: GroupSpec(name, "muon", lr=0.02, weight_decay=0.2)
        if name == "matrices"
        else GroupSpec(name, "adamw", lr=0.01, weight_decay=0.01)
        for name in groups
    }


def build(compute_dtype: torch.dtype = torch.float32, **options) -> tuple[GPT, Optimizer]:
    model = GPT(TINY, compute_dtype=compute_dtype)
    model.init_weights(0)
    return model, Optimizer(model.groups(), specs_for(model.groups()), **options)


def train(model: GPT, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        rows = torch.randint(0, TINY.vocab_size, (4, TINY.seq_len + 1), generator=torch.Generator().manual_seed(step))
        model.loss(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step(StepHyper(lr_mult=1 / (step + 1), momentum=0.9, wd_mult=0.5))


def bits(model: nn.Module) -> list[bytes]:
    return [p.detach().flatten().view(torch.uint8).numpy().tobytes() for p in model.parameters() if p.numel()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_as_torchs(dtype: torch.dtype) -> None:
    """Ten steps, a moving learning rate, a large tensor, a small one and a scalar: within 1e-6 of torch.optim.AdamW."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((70, 33), (5,), ())]
    ours, theirs = ([nn.Parameter(t.clone()) for t in starts] for _ in range(2))
    spec = GroupSpec("all", "adamw", lr=0.05, weight_decay=0.1, betas=(0.8, 0.96))
    optimizer = Optimizer({"all": [(str(i), p) for i, p in enumerate(ours)]}, {"all": spec})
    reference = torch.optim.AdamW(theirs, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay)
    for step in range(10):
        for a, b in zip(ours, theirs, strict=True):
            b.grad = torch.randn(a.shape, generator=generator, dtype=dtype)
            a.grad = b.grad.clone()
        reference.param_groups[0]["lr"] = spec.lr * (1 - step / 12)
        optimizer.step(StepHyper(lr_mult=1 - step / 12))
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 1e-6


def test_bfloat16_tables_keep_bfloat16_moments_and_compute_in_fp32() -> None:
    """Against the formula written out, with the roundings where the published runs have them: bit for bit."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(64, 32, generator=generator).bfloat16())
    spec = GroupSpec("wte", "adamw", lr=0.3, weight_decay=0.001, betas=(0.8, 0.995))
    optimizer = Optimizer({"wte": [("wte", p)]}, {"wte": spec})
    weight, m, v = p.detach().clone(), torch.zeros(64, 32).bfloat16(), torch.zeros(64, 32).bfloat16()
    for step in range(1, 6):
        grad = torch.randn(64, 32, generator=generator).bfloat16()
        p.grad = grad.clone()
        optimizer.step(StepHyper())
        wide_m = 0.8 * m.float() + (1 - 0.8) * grad.float()
        wide_v = 0.995 * v.float() + (1 - 0.995) * grad.float() ** 2
        denominator = wide_v.sqrt() / math.sqrt(1 - 0.995**step) + 1e-10
        change = 0.3 / (1 - 0.8**step) * wide_m / denominator
        weight, m, v = (weight.float() * (1 - 0.3 * 0.001) - change).bfloat16(), wide_m.bfloat16(), wide_v.bfloat16()
    state = {s.name: s.tensor for s in optimizer.state_slices()}
    assert state["adamw_first/wte"].dtype == torch.bfloat16
    for ours, expected in ((p.detach(), weight), (state["adamw_first/wte"], m), (state["adamw_second/wte"], v)):
        assert (ours != expected).float().mean() < 0.01  # one unit in the last place where fp32 rounds the other way
        assert torch.allclose(ours.float(), expected.float(), rtol=0.01)


def test_two_runs_are_byte_identical() -> None:
    runs = []
    for _ in range(2):
        model, optimizer = build(torch.bfloat16)
        train(model, optimizer, range(4))
        runs.append(bits(model))
    assert runs[0] == runs[1]


def test_state_continues_in_another_process_bit_for_bit() -> None:
    model, optimizer = build()
    train(model, optimizer, range(3))
    saved = {s.name: (s.tensor.clone(), s.total_rows) for s in optimizer.state_slices() + optimizer.weight_slices()}
    assert all(s.start == 0 and len(s.tensor) == s.total_rows for s in optimizer.state_slices())
    assert {n.removeprefix("weight/") for n in saved if n.startswith("weight/")} == {
        n for n, _ in model.named_parameters()
    }
    train(model, optimizer, range(3, 6))
    again, resumed = build()

    def read(name: str, start: int, stop: int) -> Tensor:
        return saved[name][0][start:stop]

    again.load_state_dict({n: read(f"weight/{n}", 0, 10**6).view_as(p) for n, p in again.named_parameters()})
    resumed.load_slices(read)
    assert resumed.steps == 3
    train(again, resumed, range(3, 6))
    assert bits(again) == bits(model)


def test_state_of_another_model_is_refused() -> None:
    _, optimizer = build()
    with pytest.raises(
        ValueError, match=r"adamw_first/wte.weight from row 0: found \(320, 3\).*belongs to another model"
    ):
        optimizer.load_slices(lambda name, start, stop: torch.zeros(stop - start, 3))
    with pytest.raises(ValueError, match="float64"):
        optimizer.load_slices(lambda name, start, stop: torch.zeros(stop - start, TINY.width, dtype=torch.float64))


def test_a_rehearsal_leaves_every_bit() -> None:
    model, optimizer = build(torch.bfloat16)
    train(model, optimizer, range(2))
    weights, state = bits(model), [s.tensor.clone() for s in optimizer.state_slices()]
    with optimizer.preserve_state():
        train(model, optimizer, range(2, 4))
        assert bits(model) != weights
    assert bits(model) == weights
    assert all(torch.equal(a, s.tensor) for a, s in zip(state, optimizer.state_slices(), strict=True))
    assert optimizer.steps == 2 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_is_named(bad: float) -> None:
    model, optimizer = build()
    train(model, optimizer, range(1))
    assert not optimizer.nonfinite.any()
    names = ["blocks.1.mlp.down.weight", "wte.weight", "resid_lambdas"]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for name in names:
        model.get_parameter(name).grad.view(-1)[2] = bad
    optimizer.step(StepHyper())
    assert sorted(n for n, flag in zip(optimizer.flagged, optimizer.nonfinite.tolist(), strict=True) if flag) == sorted(
        names
    )


def test_the_gradients_norm_is_of_all_of_them_together() -> None:
    model, optimizer = build()
    for number, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 0.01 * (number + 1))
    expected = sum(p.grad.double().square().sum() for p in model.parameters())
    optimizer.step(StepHyper())
    assert float(optimizer.gradient_square) == pytest.approx(float(expected), rel=1e-5)


def test_forgotten_gradients_are_taken_from_no_step() -> None:
    model, optimizer = build()
    rows = torch.ones(1, 17, dtype=torch.int64)
    model.loss(rows[:, :-1], rows[:, 1:]).backward()
    optimizer.zero_grad()
    train(model, optimizer, range(1))
    again, fresh = build()
    train(again, fresh, range(1))
    assert bits(model) == bits(again)


def test_a_parameter_without_gradient_is_named() -> None:
    model, optimizer = build()
    model.head.weight.sum().backward()
    with pytest.raises(RuntimeError, match=r"wte\.weight has no gradient"):
        optimizer.step(StepHyper())


def test_groups_that_do_not_fit_are_refused() -> None:
    matrix, vector = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(3))
    muon = {"a": GroupSpec("a", "muon", 0.1), "b": GroupSpec("b", "muon", 0.1)}
    for groups, message in (
        ({"c": [("m", matrix)]}, "no spec for group"),
        ({"a": [("v", vector)]}, r"v in group a has shape \(3,\)"),
        ({"a": [("m", matrix)], "b": [("m", matrix)]}, "m is in two groups"),
        ({"a": []}, "no parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            Optimizer(groups, muon)
    with pytest.raises(ValueError, match="sgd"):
        Optimizer({"a": [("m", matrix)]}, {"a": GroupSpec("a", "sgd", 0.1)})


@pytest.fixture
def pretend():
    """pretend(depth, rank, ...): the optimizer of a published model on one of 8 ranks that are not there, weights on
    meta."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def make(depth: int, rank: int, **options) -> Optimizer:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
        with torch.device("meta"):
            model = GPT(GPTConfig.for_depth(depth, 32768, 2048), compute_dtype=torch.bfloat16)
        optimizer = Optimizer(model.groups(), specs_for(model.groups()), dist.group.WORLD, **options)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        return optimizer

    yield make
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("depth", "sent", "moved"), [(22, 3.51e9, 6.15e9), (24, 4.23e9, 7.40e9), (26, 5.73e9, 10.03e9)]
)
def test_traffic_of_published_shapes(depth: int, sent: float, moved: float, pretend) -> None:
    """Bytes of one step as in the roofline's table: fp32 matrices and head, bf16 tables."""
    optimizer = pretend(depth, rank=0)
    optimizer.step(StepHyper())
    assert optimizer.traffic.bytes["reduce_scatter"] == pytest.approx(sent, rel=2e-3)
    assert optimizer.traffic.moved(8) == pytest.approx(moved, rel=2e-3)


@pytest.mark.parametrize(("depth", "moved"), [(22, 4.04e9), (24, 4.84e9), (26, 6.35e9)])
def test_traffic_of_published_shapes_in_bf16(depth: int, moved: float, pretend) -> None:
    optimizer = pretend(depth, rank=0, transport_dtype=torch.bfloat16)
    optimizer.step(StepHyper())
    assert optimizer.traffic.moved(8) == pytest.approx(moved, rel=2e-3)


def test_remainders_do_not_pile_up_on_one_rank(pretend) -> None:
    """d26 has 26 matrices of each rectangular shape for 8 ranks: nobody gets the extra one of both."""
    cost = []
    for rank in range(8):
        owned = [s.tensor.shape for s in pretend(26, rank).weight_slices() if s.name.startswith("weight/blocks.")]
        cost.append(
            sum(min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in owned)
        )  # of one Polar Express iteration
    square, rectangular = 3 * 1664**3, 9 * 1664**3
    assert max(cost) < 13 * square + 7.01 * rectangular  # the hundredth: gates


@pytest.mark.slow
def test_compiled_updates_agree_and_never_recompile() -> None:
    """Schedules move every number for 50 steps after the first; the compiled updates stay within rounding of the
    plain ones."""
    torch._dynamo.reset()
    plain, optimizer = build(polar_dtype=torch.float32)
    train(plain, optimizer, range(1))
    model, optimizer = build(polar_dtype=torch.float32, compile=True)
    train(model, optimizer, range(1))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        train(model, optimizer, range(1, 51))
