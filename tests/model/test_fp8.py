"""fp8: which layers, on what hardware, how exactly, and never in evaluation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model import fp8
from model.config import GPTConfig
from model.fp8_tensor import E4M3, E5M2, quantise
from model.gpt import GPT, Linear
from model.hyper import StepHyper
from model.kernels import Fp8Error, require_fp8
from model.loss import cross_entropy
from model.optimizer import Optimizer
from model.scaling import RULES, derive

SMALL = GPTConfig.for_depth(2, 256, 32, width=128, head_dim=64)


def on_meta(depth: int, generation: str = "head") -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig.for_depth(depth, 32_768, 2048, generation), compute_dtype=torch.bfloat16)


def small(in_fp8: bool) -> GPT:
    model = GPT(SMALL, compute_dtype=torch.bfloat16)
    model.init_weights(0)
    if in_fp8:
        fp8.apply(model, 64)
    for name, parameter in model.named_parameters():  # the published start leaves half of the layers without a gradient
        if name.endswith(("attn.o.weight", "mlp.down.weight", "head.weight")):
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    return model


def batch() -> tuple[Tensor, Tensor]:
    rows = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(3))
    return rows[:, :-1], rows[:, 1:]


# ---- which layers


@pytest.mark.parametrize(
    ("depth", "generation", "count", "gates"),
    [(24, "feb", 145, 12), (26, "feb", 157, 13), (24, "head", 145, 13), (26, "head", 157, 14)],
)
def test_the_published_counts_of_layers(depth: int, generation: str, count: int, gates: int) -> None:
    chosen, left = fp8.layers(on_meta(depth, generation), generation)
    assert len(chosen) == count == 6 * depth + 1 and "head" in chosen
    assert len(left) == gates  # the value embeddings' gates, and since July the smear gate
    assert all(name.endswith("gate") for name in left)


def test_the_generations_differ_in_small_layers_only() -> None:
    model = on_meta(32, "feb")  # 16 heads: its gates map 32 channels to 16, which February takes and July does not
    chosen, left = fp8.layers(model, "feb")
    assert len(chosen) == 6 * 32 + 1 + 16 and left == []
    assert len(fp8.layers(model, "head")[0]) == 6 * 32 + 1


def test_apply_keeps_parameters_and_names() -> None:
    model = GPT(SMALL)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    names = fp8.apply(model, 64)
    assert len(names) == 13
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert all(parameter.dtype == torch.float32 for _, parameter in model.named_parameters())
    assert type(model.get_submodule(names[0])) is not Linear and type(model.blocks[1].attn.ve_gate) is Linear


def test_dimensions_that_are_no_multiples_of_16() -> None:
    with pytest.raises(
        Fp8Error, match=r"blocks\.0\.attn\.q maps 136 to 136 channels, .* divisible by 16: .*train\.fp8=false"
    ):
        fp8.layers(GPT(GPTConfig(depth=1, vocab_size=64, seq_len=32, width=136, head_dim=34)))
    with pytest.raises(Fp8Error, match=r"a micro-batch has 33 tokens, .* multiple of 16"):
        fp8.apply(GPT(SMALL), 33)
    with pytest.raises(Fp8Error, match="no layer has both sides of at least 128"):
        fp8.apply(GPT(GPTConfig(depth=1, vocab_size=64, seq_len=32, width=64, head_dim=32)), 64)
    model = small(True)
    with pytest.raises(Fp8Error, match="31 tokens cannot be computed in fp8"):
        cross_entropy(
            torch.randn(31, 128),
            model.head.weight,
            torch.zeros(31, dtype=torch.int64),
            15.0,
            quantised=model.head.quantised(),
        )


# ---- on what hardware


@pytest.mark.parametrize(
    ("name", "capability", "why"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "NVIDIA H100 80GB HBM3 (Hopper) multiplies fp8 at twice its bf16 rate"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "NVIDIA GeForce RTX 4090 (Ada) multiplies fp8 at twice its bf16 rate"),
        ("NVIDIA B200", (10, 0), "NVIDIA B200 (Blackwell) multiplies fp8 at twice its bf16 rate"),
        (
            "NVIDIA GeForce RTX 5090",
            (12, 0),
            "NVIDIA GeForce RTX 5090 (Blackwell) multiplies fp8 at twice its bf16 rate",
        ),
    ],
)
def test_hardware_with_fp8(name: str, capability: tuple[int, int], why: str) -> None:
    assert require_fp8(capability, name) == why


@pytest.mark.parametrize(
    ("name", "capability", "generation"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), "Ampere"),
        ("NVIDIA GeForce RTX 3090", (8, 6), "Ampere"),
        ("Tesla T4", (7, 5), "Turing"),
        ("Tesla V100-SXM2-16GB", (7, 0), "Volta"),
        ("Tesla P100", (6, 0), "compute capability 6.0"),
    ],
)
def test_hardware_without_fp8_and_what_that_costs(name: str, capability: tuple[int, int], generation: str) -> None:
    with pytest.raises(Fp8Error) as refused:
        require_fp8(capability, name)
    assert str(refused.value) == (
        f"{name} ({generation}) has no fp8 matrix units (Ada, Hopper and Blackwell have): set train.fp8=false, "
        "which takes 17% longer than the same card with fp8 would (as published for a d26)"
    )


def test_a_cpu_is_for_tests_and_other_devices_have_none() -> None:
    assert "for tests" in require_fp8(None, "")


# ---- how exactly


@settings(max_examples=60, deadline=None)
@given(scale=st.floats(1e-6, 1e6), dtype=st.sampled_from([E4M3, E5M2]), seed=st.integers(0, 9))
def test_quantised_within_half_a_step(scale: float, dtype: torch.dtype, seed: int) -> None:
    x = scale * torch.randn(64, generator=torch.Generator().manual_seed(seed))
    rounded, inverse = quantise(x, dtype)
    error = (rounded.float() * inverse - x).abs()
    smallest = torch.finfo(dtype).smallest_normal * inverse  # below it, steps are of one size
    assert (error <= torch.finfo(dtype).eps / 2 * torch.maximum(x.abs(), smallest) * 1.0001).all()
    assert rounded.float().abs().max() == torch.finfo(dtype).max  # the whole range is used


def test_zero_stays_zero_and_a_nan_does_not_hide() -> None:
    zero, inverse = quantise(torch.zeros(16), E4M3)
    assert not zero.float().any() and inverse.isfinite()
    for broken in (math.nan, math.inf):
        x = torch.ones(16)
        x[3] = broken
        rounded, inverse = quantise(x, E4M3)
        assert (rounded.float() * inverse).isnan().any()


def test_the_head_in_fp8_is_the_loss_of_rounded_operands() -> None:
    """Against autograd through the same numbers in fp32, where only the gradient's own rounding is missing."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 128, generator=generator, requires_grad=True)
    layer = small(True).head
    targets = torch.randint(0, 256, (64,), generator=generator)
    loss = cross_entropy(hidden, layer.weight, targets, 15.0, 250 + 6, quantised=layer.quantised())
    got = torch.autograd.grad(loss, (hidden, layer.weight))
    (h8, h_inverse), (w8, w_inverse) = quantise(hidden.detach(), E4M3), quantise(layer.weight.detach(), E4M3)
    rounded = ((h8.float() * h_inverse).requires_grad_(), (w8.float() * w_inverse).requires_grad_())
    expected = F.cross_entropy(15.0 * torch.tanh(rounded[0] @ rounded[1].mT / 15.0), targets)
    wanted = torch.autograd.grad(expected, rounded)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for a, b in zip(got, wanted, strict=True):
        assert 0.001 * b.norm() < (a - b).norm() < 0.1 * b.norm()  # e5m2 rounds to two bits: 0.06 here, and not 0
    assert got[1].dtype == torch.float32


def test_gradients_of_the_whole_model_are_those_of_bf16_but_for_rounding() -> None:
    inputs, targets = batch()
    grads = {}
    for in_fp8 in (False, True):
        model = small(in_fp8)
        model.loss(inputs, targets).backward()
        grads[in_fp8] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, grad in grads[False].items():
        if grad.any() and grad.dim() == 2:  # the smear gate starts closed
            other = grads[True][name]
            assert other.dtype == grad.dtype and F.cosine_similarity(other.flatten(), grad.flatten(), dim=0) > 0.97, (
                name
            )


# ---- never in evaluation, never stale


def test_evaluation_is_outside_fp8() -> None:
    inputs, targets = batch()
    plain, eight = small(False), small(True)
    assert torch.equal(plain.token_losses(inputs, targets)[0], eight.token_losses(inputs, targets)[0])
    with torch.no_grad():
        assert torch.equal(plain.logits(inputs), eight.logits(inputs))
        assert torch.equal(plain.loss(inputs, targets), eight.loss(inputs, targets))
    assert not torch.equal(plain.loss(inputs, targets), eight.loss(inputs, targets))


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_head_is_quantised_once_a_step(compile: bool) -> None:
    inputs, targets = batch()
    model = small(True)
    specs = derive(SMALL, RULES["head"], ratio=None, steps=2, batch_tokens=64).specs
    optimizer = Optimizer(model.groups(), specs, compile=compile)
    copies = []
    for _ in range(2):
        for _ in range(2):  # micro-steps
            model.loss(inputs, targets).backward()
            copies.append(model.head.quantised())
        optimizer.step(StepHyper())
    assert copies[0] is copies[1] and copies[2] is copies[3]
    assert not torch.equal(copies[1].rows.float(), copies[2].rows.float())
    now, inverse = quantise(model.head.weight.detach(), E4M3)
    assert torch.equal(model.head.quantised().rows.view(torch.uint8), now.view(torch.uint8))
    assert torch.equal(model.head.quantised().inverse_scale, inverse)
    assert torch.equal(model.head.quantised().transposed.view(torch.uint8), now.t().contiguous().view(torch.uint8))
