"""The chunked loss against the plain one, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import model.loss
from job.plan.memory import CHUNK_LOGIT
from model.fp8_tensor import E4M3, Quantised, quantise
from model.loss import capped_logits, cross_entropy, token_losses
from tensors import Largest

N, D, V, PADDED = 70, 24, 50, 64


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, vocab_size: int) -> Tensor:
    logits = softcap * torch.tanh((hidden @ weight.mT)[:, :vocab_size].float() / softcap)
    return F.cross_entropy(logits, targets)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, requires_grad=True)
    weight = (2.0 * torch.randn(PADDED, D, generator=generator)).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=generator)


@pytest.mark.parametrize("rows", [1, 7, 35, 70, 1000])
@pytest.mark.parametrize("softcap", [2.0, 15.0, 20.0])
def test_value_and_gradients(monkeypatch: pytest.MonkeyPatch, batch: tuple, rows: int, softcap: float) -> None:
    monkeypatch.setattr(model.loss, "CPU_CHUNK_ELEMENTS", rows * PADDED)
    hidden, weight, targets = batch
    expected = plain(hidden, weight, targets, softcap, V)
    actual = cross_entropy(hidden, weight, targets, softcap, V)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(3.0 * expected, (hidden, weight))
    got = torch.autograd.grad(3.0 * actual, (hidden, weight))
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    assert not got[1][V:].any()  # padding words learn nothing


def test_in_double_precision_gradients_are_exact(batch: tuple) -> None:
    hidden, weight, targets = batch
    hidden, weight = (x.detach()[:, :4].double() for x in (hidden[:6], weight))
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy(h, w, targets[:6], 5.0, V), inputs)


def test_bf16_hidden_leaves_an_fp32_gradient_for_the_weight(monkeypatch: pytest.MonkeyPatch, batch: tuple) -> None:
    monkeypatch.setattr(model.loss, "CPU_CHUNK_ELEMENTS", 8 * PADDED)
    hidden, weight, targets = batch
    low = hidden.detach().bfloat16().requires_grad_()
    loss = cross_entropy(low, weight, targets, 15.0, V)
    loss.backward()
    expected = torch.autograd.grad(plain(hidden, weight, targets, 15.0, V), (hidden, weight))
    assert loss.dtype == torch.float32 and low.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert (low.grad.float() - expected[0]).norm() <= 0.03 * expected[0].norm()
    assert (weight.grad - expected[1]).norm() <= 0.03 * expected[1].norm()


def test_token_losses_are_the_same_numbers(monkeypatch: pytest.MonkeyPatch, batch: tuple) -> None:
    monkeypatch.setattr(model.loss, "CPU_CHUNK_ELEMENTS", 8 * PADDED)
    hidden, weight, targets = batch
    nll, greedy = token_losses(hidden, weight, targets, 15.0, V)
    logits = capped_logits(hidden, weight, 15.0, V)
    assert logits.shape == (N, V) and logits.abs().max() <= 15.0
    torch.testing.assert_close(nll, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-6)
    assert torch.equal(greedy, logits.argmax(-1)) and not nll.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(hidden, weight, targets, 15.0, V), nll.mean())


def test_extreme_logits_stay_finite(batch: tuple) -> None:
    hidden, weight, targets = batch
    loss = cross_entropy(1e4 * hidden, weight, targets, 15.0, V)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)


def test_the_logits_of_a_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.loss, "CPU_CHUNK_ELEMENTS", 16 * 512)
    hidden, weight = torch.randn(1024, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    targets = torch.zeros(1024, dtype=torch.int64)
    with Largest() as largest:
        cross_entropy(hidden, weight, targets, 15.0).backward()
        token_losses(hidden, weight, targets, 15.0)
    assert largest.elements <= max(16 * 512, 1024 * 8)


# ---- memory and the compiler


def peak_bytes(loss: Callable[[Tensor, Tensor, Tensor], Tensor], rows: int, words: int, width: int) -> int:
    """Most bytes that tensors take at one time from the inputs to their gradients: counted by torch on tensors
    without memory."""
    with FakeTensorMode():
        hidden = torch.empty(rows, width, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(words, width, requires_grad=True)
        targets = torch.empty(rows, dtype=torch.int64)
        tracker = MemTracker()
        tracker.track_external(hidden, weight, targets)
        with tracker:
            loss(hidden, weight, targets).backward()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize("chunk", [model.loss.CPU_CHUNK_ELEMENTS, model.loss.LOSS_CHUNK_ELEMENTS], ids=["cpu", "gpu"])
def test_peak_memory_is_a_tenth_of_the_plain_loss(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """And beside the gradients and the copies of the weight no more than the plan counts for a chunk."""
    monkeypatch.setattr(model.loss, "CPU_CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(model.loss, "BLOCK_ELEMENTS", 1 << 23)  # coarser than real: fewer operations to count
    size = {"rows": 16_384, "words": 49_152, "width": 1536}
    whole = peak_bytes(lambda h, w, y: plain(h, w.to(h.dtype), y, 15.0, 49_152), **size)
    ours = peak_bytes(lambda h, w, y: cross_entropy(h, w, y, 15.0), **size)
    assert whole > 4 * 4 * 16_384 * 49_152  # what this is about: four fp32 tensors of all logits and more
    print(f"{ours / whole:.4f} of {whole / 1e9:.1f}e9 bytes")
    assert ours <= whole / 10
    assert ours <= CHUNK_LOGIT * chunk + 16 * model.loss.BLOCK_ELEMENTS + 1536 * (12 * 49_152 + 8 * 16_384)


def test_traced_into_a_callers_graph(monkeypatch: pytest.MonkeyPatch, batch: tuple) -> None:
    """One graph, no break; a backend that runs what was traced as it is, so that no compiler is needed."""
    monkeypatch.setattr(model.loss, "CPU_CHUNK_ELEMENTS", 16 * PADDED)
    hidden, weight, targets = batch
    traced = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    expected, actual = cross_entropy(hidden, weight, targets, 15.0, V), traced(hidden, weight, targets, 15.0, V)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        losses = torch.compile(token_losses, fullgraph=True, backend="aot_eager")(hidden, weight, targets, 15.0, V)
    torch.testing.assert_close(losses[0].mean(), expected)


def test_the_head_in_fp8_is_traced_too() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 128, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(256, 128, generator=generator).requires_grad_()
    rows, inverse = quantise(weight.detach(), E4M3)
    arguments = (hidden, weight, torch.randint(0, 256, (64,), generator=generator), 15.0)
    eight = Quantised(rows, rows.t().contiguous(), inverse)
    expected = cross_entropy(*arguments, quantised=eight)
    actual = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")(*arguments, quantised=eight)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_between_its_products(monkeypatch: pytest.MonkeyPatch, batch: tuple, dtype: torch.dtype) -> None:
    monkeypatch.setattr(model.loss, "CPU_CHUNK_ELEMENTS", 35 * PADDED)
    hidden, weight, targets = batch
    inputs = (hidden.detach().to(dtype).requires_grad_(), weight)
    results = []
    for compiled in (False, True):
        loss = cross_entropy(*inputs, targets, 15.0, V, compiled=compiled)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
