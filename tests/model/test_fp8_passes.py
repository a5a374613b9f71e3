"""fp8 blocks that leave passes over memory out, beside torchao's: the same numbers, or bounds that hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model import fp8, fp8_passes
from model.attention import attention
from model.config import LEVERS, GPTConfig
from model.fp8_passes import longest_row, norm, quantise
from model.fp8_tensor import E4M3, E5M2
from model.fp8_transpose import transposed
from model.gpt import GPT
from model.gpt import norm as plain_norm
from model.hyper import StepHyper
from model.optimizer import Optimizer
from model.scaling import RULES, derive
from tensors import Largest

SMALL = GPTConfig.for_depth(3, 256, 32, width=128, head_dim=64)
EXACT = ("shared_input", "kept_weights", "kept_columns")


def trainee(*levers: str) -> GPT:
    model = GPT(SMALL, compute_dtype=torch.bfloat16)
    model.init_weights(0)
    fp8.apply(model, 64, levers=levers)
    for name, parameter in model.named_parameters():  # the published start leaves half of the layers without a gradient
        if name.endswith(("attn.o.weight", "mlp.down.weight", "head.weight")):
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    return model


def gradients(model: GPT) -> dict[str, Tensor]:
    rows = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(3))
    loss = model.loss(rows[:, :-1], rows[:, 1:])
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def of_a_block(*levers: str) -> dict[str, Tensor]:
    """Output and gradients of the block without value embedding."""
    model = trainee(*levers)
    if model.before_loss:
        model.before_loss()
    x, x0 = (torch.randn(2, 32, 128, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2))
    leaves = {"x": x.requires_grad_(), "x0": x0.requires_grad_()} | dict(model.blocks[1].named_parameters())
    lambdas = torch.tensor(1.1), torch.tensor(0.1)
    out = model.blocks[1](x, x0, lambdas, None, model._rotary.tables(32, x), attention)
    found = torch.autograd.grad(out, list(leaves.values()), torch.randn(out.shape).mul(1e-3).bfloat16())
    return {"out": out.detach()} | dict(zip(leaves, found, strict=True))


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return of_a_block()


@pytest.mark.parametrize("levers", [EXACT[:1], EXACT])
def test_sharing_and_keeping_change_no_bit(levers: tuple[str, ...], plain: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    found = of_a_block(*levers)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], right) for name, right in plain.items())


@pytest.mark.parametrize(
    ("lever", "bound"),
    [
        ("norm_output", 0.03),
        ("joint_qkv", 0.1),
        ("relu_root", 0.1),
        ("wide_gradients", 2**-8),
        ("bounded_scales", 0.12),
    ],
)
def test_the_others_change_gradients_by_no_more_than_fp8_does(
    lever: str, bound: float, plain: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    found = of_a_block("shared_input", lever)
    off = {name: ((found[name] - right).float().norm() / right.float().norm()).item() for name, right in plain.items()}
    assert 0 < max(off.values()) < bound, off


def test_a_norms_gradient_from_its_output() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    dy = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    mine, right = norm(x), plain_norm(x)
    assert torch.equal(mine, right)
    (dx,), (wanted,) = torch.autograd.grad(mine, x, dy), torch.autograd.grad(right, x, dy)
    assert ((dx - wanted).float().norm() / wanted.float().norm()) < 2**-8


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_bound_far_above_the_largest_costs_no_precision(dtype: torch.dtype) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    for factor, worse in ((1.0, 1.001), (2.0**4, 1.001), (2.0 ** (9 if dtype == E4M3 else 20), 1.5)):
        errors = [
            (rounded.float() * inverse - x).norm()
            for rounded, inverse in (quantise(x, dtype), quantise(x, dtype, x.abs().amax() * factor))
        ]
        assert errors[1] < worse * 1.1 * errors[0]


def test_no_number_exceeds_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(x: Tensor, dtype: torch.dtype, bound: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
        if bound is not None:
            seen.append(float(x.abs().amax() / bound))
        return quantise(x, dtype, bound)

    monkeypatch.setattr(fp8_passes, "quantise", watched)
    model = trainee("shared_input", "relu_root", "bounded_scales")
    for block in model.blocks:  # the rows of `up` point where the inputs do: bounds are almost reached
        with torch.no_grad():
            block.mlp.up.weight[:] = block.mlp.up.weight[0]
    gradients(model)
    assert len(seen) == 3 * 6 and 0.01 < max(seen) <= 1


def test_kept_copies_follow_the_optimizer() -> None:
    """The blocks' by a lever, the head's always: after a step and after a rehearsal they are those of today's weights,
    also where somebody watches the operators."""
    found = []
    for levers in (EXACT[:1], EXACT):
        model = trainee(*levers)
        specs = derive(SMALL, RULES["head"], ratio=None, steps=2, batch_tokens=64).specs
        optimizer = Optimizer(model.groups(), specs, polar_dtype=torch.float32)
        with Largest():
            gradients(model)
            optimizer.step(hyper := StepHyper(lr_mult=100.0, momentum=0.9, wd_mult=0.5))
            found.append(gradients(model))
            with optimizer.preserve_state():
                optimizer.step(hyper)
                model.loss(*torch.zeros(2, 1, 32, dtype=torch.int64))
            found.append(gradients(model))
    for other in found[1:]:
        assert found[0].keys() == other.keys() and all(map(torch.equal, found[0].values(), other.values()))
    assert torch.equal(model.head.quantised().rows.float(), quantise(model.head.weight.detach(), E4M3)[0].float())


def test_levers_are_outside_evaluation() -> None:
    idx = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(3))
    plain, levered = trainee(), trainee(*LEVERS)
    with torch.no_grad():
        assert torch.equal(plain.logits(idx), levered.logits(idx))


def test_transposed() -> None:
    x = torch.randn(48, 32).to(E5M2)
    assert torch.equal(transposed(x).float(), x.float().t()) and transposed(x).is_contiguous()


def test_the_longest_row() -> None:
    assert longest_row(torch.tensor([[3.0, 4.0], [1.0, 1.0]])) == 5
