"""Muon's arithmetic against a plain second implementation on single matrices, and the properties each of its steps
promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.muon import POLAR_EXPRESS, equalize_rows, normuon, polar_express, step_size
from model.optimizer import GroupSpec, Optimizer, StepHyper

FEB = {"norm_factor": 1.02, "muon_eq": False, "muon_plus": False, "beta2": 0.95}
HEAD = {"norm_factor": 1.01, "muon_eq": True, "muon_plus": True, "beta2": 0.9}
SHAPES = [(48, 48), (64, 16), (16, 64), (6, 12)]


class PlainMuon:
    """The published recipe for one matrix, written down step by step, singular values and all."""

    def __init__(self, weight: Tensor, spec: GroupSpec) -> None:
        self.weight, self.spec = weight.clone(), spec
        self.average = torch.zeros_like(weight)
        self.variance = 0.0

    def step(self, grad: Tensor, hyper: StepHyper) -> None:
        spec, beta = self.spec, hyper.momentum
        rows, columns = grad.shape
        self.average = beta * self.average + (1 - beta) * grad
        u = (1 - beta) * grad + beta * self.average
        if spec.muon_eq:
            u = torch.diag(u.norm() / math.sqrt(rows) / u.norm(dim=1)) @ u
        left, values, right = torch.linalg.svd(u / (spec.norm_factor * u.norm() + 1e-6), full_matrices=False)
        for a, b, c in POLAR_EXPRESS:
            values = a * values + b * values**3 + c * values**5
        u = left @ torch.diag(values) @ right
        if spec.muon_plus:
            u = u * math.sqrt(min(rows, columns)) / u.norm()
        mean_square = (u**2).mean(dim=1 if rows >= columns else 0, keepdim=True)
        self.variance = spec.beta2 * self.variance + (1 - spec.beta2) * mean_square
        scaled = u / self.variance.sqrt()
        u = scaled * u.norm() / scaled.norm()
        lr = spec.lr * hyper.lr_mult * math.sqrt(max(1, rows / columns))
        agreeing = (u * self.weight >= 0).to(u.dtype)
        self.weight = self.weight - lr * (u + spec.weight_decay * hyper.wd_mult * self.weight * agreeing)


@pytest.mark.parametrize("generation", [FEB, HEAD], ids=["feb", "head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ten_steps_as_the_plain_one(generation: dict, dtype: torch.dtype) -> None:
    """Stacks of several shapes, a schedule that moves everything: weights within 1e-6 of the plain fp64 one."""
    generator = torch.Generator().manual_seed(3)
    spec = GroupSpec("matrices", "muon", lr=0.02, weight_decay=0.28, **generation)
    named = [
        (f"{rows}x{columns}.{k}", nn.Parameter((torch.randn(rows, columns, generator=generator) / 8).to(dtype)))
        for rows, columns in SHAPES
        for k in range(3)
    ]
    plain = [PlainMuon(p.detach().double(), spec) for _, p in named]
    optimizer = Optimizer({"matrices": named}, {"matrices": spec}, polar_dtype=dtype)
    for step in range(10):
        hyper = StepHyper(lr_mult=1 - step / 20, momentum=0.85 + step / 100, wd_mult=1 - step / 30)
        for (_, p), reference in zip(named, plain, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            reference.step(p.grad.double(), hyper)
        optimizer.step(hyper)
    for (name, p), reference in zip(named, plain, strict=True):
        error = (p.detach().double() - reference.weight).norm() / reference.weight.norm()
        assert error < (1e-12 if dtype == torch.float64 else 1e-6), name


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_express_is_a_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    u = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(u / u.norm(dim=(1, 2), keepdim=True) / 1.01, full_matrices=False)
    for a, b, c in POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
    x = polar_express(u, 1.01, torch.float64)
    assert torch.allclose(x, left @ torch.diag_embed(values) @ right, atol=1e-5)
    assert torch.linalg.svdvals(x).sub(1).abs().max() < 0.35


def test_polar_express_in_bfloat16_stays_near(shape: tuple[int, int] = (64, 256)) -> None:
    u = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    exact, rough = polar_express(u, 1.01, torch.float64), polar_express(u, 1.01, torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    assert (rough.double() - exact).norm() / exact.norm() < 0.03


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000))
def test_each_step_keeps_its_promise(rows: int, columns: int, seed: int) -> None:
    """MuonEq: equal rows, same norm. NorMuon: same norm, and the second moment is the mean square of what came in."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(3, rows, columns, dtype=torch.float64, generator=generator) + 0.01
    equal = equalize_rows(u)
    norms = equal.norm(dim=2)
    assert torch.allclose(norms, norms[:, :1].expand_as(norms), rtol=1e-9)
    assert torch.allclose(equal.norm(dim=(1, 2)), u.norm(dim=(1, 2)), rtol=1e-9)
    tall = rows >= columns
    second = torch.zeros(3, *((rows, 1) if tall else (1, columns)), dtype=torch.float64)
    scaled = normuon(u, second, torch.tensor(0.25, dtype=torch.float64))
    assert torch.allclose(scaled.norm(dim=(1, 2)), u.norm(dim=(1, 2)), rtol=1e-9)
    assert torch.allclose(second, 0.25 * u.square().mean(dim=2 if tall else 1, keepdim=True))


@pytest.mark.parametrize("generation", [FEB, HEAD], ids=["feb", "head"])
def test_a_zero_gradient_moves_nothing(generation: dict) -> None:
    """At initialisation whole matrices have a zero gradient: no NaN, no update, and decay alone where it is asked
    for."""
    start = torch.randn(8, 4)
    for decay, expected in ((0.0, start), (0.5, start * (1 - 0.02 * math.sqrt(2) * 0.5))):
        p = nn.Parameter(start.clone())
        spec = GroupSpec("matrices", "muon", lr=0.02, weight_decay=decay, **generation)
        optimizer = Optimizer({"matrices": [("p", p)]}, {"matrices": spec})
        p.grad = torch.zeros_like(p)
        optimizer.step(StepHyper())
        assert torch.allclose(p, expected, rtol=1e-6)


def test_decay_is_cautious() -> None:
    """Entries that the update pushes away from zero are not decayed; without decay the two runs differ only
    elsewhere."""
    weights = {}
    for decay in (0.0, 0.4):
        p = nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(5)))
        before = p.detach().clone()
        spec = GroupSpec("matrices", "muon", lr=0.02, weight_decay=decay)
        optimizer = Optimizer({"matrices": [("p", p)]}, {"matrices": spec}, polar_dtype=torch.float32)
        p.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(6))
        optimizer.step(StepHyper())
        weights[decay] = p.detach().clone()
    outward = (before - weights[0.0]) * before < 0
    assert 0 < outward.sum() < outward.numel()
    assert torch.equal(weights[0.4][outward], weights[0.0][outward])
    expected = weights[0.0] - 0.02 * 0.4 * before
    assert torch.allclose(weights[0.4][~outward], expected[~outward], atol=1e-6)


def test_step_size_follows_the_shape() -> None:
    assert step_size(0.02, 1024, 256) == 0.04
    assert step_size(0.02, 256, 1024) == step_size(0.02, 256, 256) == 0.02
