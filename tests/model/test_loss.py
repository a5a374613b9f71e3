"""The chunked loss against the plain one, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import model.loss
from model.loss import capped_logits, cross_entropy, token_losses

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
    monkeypatch.setattr(model.loss, "CHUNK_ELEMENTS", rows * PADDED)
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
    monkeypatch.setattr(model.loss, "CHUNK_ELEMENTS", 8 * PADDED)
    hidden, weight, targets = batch
    low = hidden.detach().bfloat16().requires_grad_()
    loss = cross_entropy(low, weight, targets, 15.0, V)
    loss.backward()
    expected = torch.autograd.grad(plain(hidden, weight, targets, 15.0, V), (hidden, weight))
    assert loss.dtype == torch.float32 and low.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert (low.grad.float() - expected[0]).norm() <= 0.03 * expected[0].norm()
    assert (weight.grad - expected[1]).norm() <= 0.03 * expected[1].norm()


def test_token_losses_are_the_same_numbers(monkeypatch: pytest.MonkeyPatch, batch: tuple) -> None:
    monkeypatch.setattr(model.loss, "CHUNK_ELEMENTS", 8 * PADDED)
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


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else [out]
        self.elements = max([self.elements, *(x.numel() for x in tensors if isinstance(x, Tensor))])
        return out


def test_the_logits_of_a_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.loss, "CHUNK_ELEMENTS", 16 * 512)
    hidden, weight = torch.randn(1024, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    targets = torch.zeros(1024, dtype=torch.int64)
    with Largest() as largest:
        cross_entropy(hidden, weight, targets, 15.0).backward()
        token_losses(hidden, weight, targets, 15.0)
    assert largest.elements <= max(16 * 512, 1024 * 8)
