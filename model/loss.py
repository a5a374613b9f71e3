"""Head, softcap and cross-entropy together, without ever holding the logits of a batch.

The logits are the largest tensor of the whole model: 32 rows of 2048 tokens over 32,768 words are 8.6 GB in fp32, and a
plain implementation holds four or five tensors of that size at once. The loss of a token needs only its own row, so
rows are taken in chunks of at most `LOSS_CHUNK_ELEMENTS` logits: for each chunk the loss AND the gradients are
computed, and the logits are dropped before the next. That costs no recomputation: the gradient of a mean is known up to
one factor, which the backward pass applies. Kept in between are the gradients that must exist anyway: one of the size
of `hidden`, one of the size of `weight` (in at least fp32, so that adding up chunks loses nothing).

With z = h W^T, t = tanh(z / c), logits l = c t and p = softmax(l), for the target y:

    nll = -log p[y]        d nll / d l = p - onehot(y)        d l / d z = 1 - t^2

so that away from the target dz = p (1 - t^2). The target's factor, p[y] - 1 = -(1 - e^-nll), is worked out in full
precision: rounded to bf16, p[y] near 1 would have lost just the part that remains to be learned. No l is above the cap,
so no row's maximum is needed before e^l; and with s = sigmoid(2 z / c), an eighth of a tanh's time on a CPU, t = 2 s -
1 and 1 - t^2 = 4 s (1 - s).

**Chunks.** Every chunk adds a whole (V, D) to the weight's gradient, so few large chunks are better: at V 32,768 and D
1536 it moves 0.6 GB, 0.2 ms of an H100, and 2048 rows take 0.33 ms in fp8 at best (estimated). Within one, arithmetic
that is not compiled goes block by block (BLOCK_ELEMENTS), so that fp32 numbers stay in a cache, in place where the
dtype allows.

**In fp8** (`quantised`) the three products run as in any fp8 layer (`model/fp8.py`): h and W in e4m3, dz in e5m2. h is
quantised once a micro-step, W once per optimizer step, and the weight's gradient is added up in fp32. dz is never
larger than 1, so its scale is a constant. Where no gradient is wanted the loss is not in fp8.

**Padding.** Logits of the rows of `weight` from `vocab_size` on are -inf: their probability and gradient are 0,
exactly.

**Compiled.** A caller that is not compiled says `compiled=True`: the loop stays a loop, and the arithmetic between the
products becomes one kernel over the logits instead of a dozen passes (and one that adds up the rows' losses). There the
target's number is selected and not scattered into dz: a scatter wants all of dz in memory, in fp32, seven times the
bytes (counted as in `tests/model/hopper.md`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import fp8_tensor
from model.config import LOSS_CHUNK_ELEMENTS
from model.fp8_tensor import Quantised
from model.kernels import Fp8Error

CPU_CHUNK_ELEMENTS = 1 << 23
BLOCK_ELEMENTS = 1 << 20  # logits that are fp32 at a time where nothing is compiled
GRADIENT_SCALE = float(1 << 15)  # of dz in e5m2, whose largest is 57,344: |dz| is at most 1


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    vocab_size: int | None = None,
    *,
    quantised: Quantised | None = None,
    compiled: bool = False,
) -> Tensor:
    """Mean of -log p(target) in nats, fp32 scalar; gradients for `hidden` and `weight`.

    hidden: (N, D) after the final norm, in the compute dtype. weight: (at least vocab_size, D), any dtype; it is cast
    to hidden's. targets: (N,) int64 in [0, vocab_size). `vocab_size` None means every row of `weight` is a word.
    quantised: `weight` in fp8; the products with gradients then are too. Raises Fp8Error unless N is a multiple of 16.
    """
    vocab_size = vocab_size or weight.size(0)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        if quantised is not None and hidden.size(0) % fp8_tensor.MULTIPLE:
            raise Fp8Error(
                f"{hidden.size(0)} tokens cannot be computed in fp8: give a multiple of {fp8_tensor.MULTIPLE}"
            )
        return _CrossEntropy.apply(hidden, weight, targets, softcap, vocab_size, quantised, compiled)
    return token_losses(hidden, weight, targets, softcap, vocab_size)[0].mean()


@torch.no_grad()
def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """-log p(target) of each row, nats, (N,) fp32, and the likeliest word, (N,) int64. Arguments: `cross_entropy`'s."""
    vocab_size = vocab_size or weight.size(0)
    weight = weight.to(hidden.dtype)
    nll, greedy = [], []
    for rows in _chunks(hidden, weight):
        logits = capped_logits(hidden[rows], weight, softcap, vocab_size)  # (rows, vocab_size)
        greedy.append(logits.argmax(dim=-1))
        nll.append(F.cross_entropy(logits, targets[rows], reduction="none"))
    return torch.cat(nll), torch.cat(greedy)


def capped_logits(hidden: Tensor, weight: Tensor, softcap: float, vocab_size: int) -> Tensor:
    """c tanh(h W^T / c): (N, D), (V, D) -> (N, vocab_size); product in hidden's dtype, the rest in at least fp32."""
    z = (hidden @ weight.to(hidden.dtype).mT)[..., :vocab_size]
    return _capped(z, softcap)[1]


def _capped(z: Tensor, softcap: float, into: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """s = sigmoid(2 z / c) and c tanh(z / c) = c (2 s - 1), in at least fp32; the latter in `into`, which may be z."""
    half = (z.to(_wide(z)) * (2 / softcap)).sigmoid_()
    return half, torch.add(half.new_full((), -softcap), half, alpha=2 * softcap, out=into)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float,
        vocab_size: int,
        quantised: Quantised | None,
        compiled: bool,
    ) -> Tensor:
        products = _Products(hidden, weight) if quantised is None else _Fp8Products(hidden, quantised, compiled)
        loss_and_gradient = fused(_loss_and_gradient) if compiled else _in_blocks
        d_hidden = torch.empty_like(hidden)  # (N, D)
        d_weight = torch.zeros_like(weight, dtype=_wide(weight))  # (V, D)
        total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
        for rows in _chunks(hidden, weight):
            loss, dz = loss_and_gradient(
                products.logits(rows), targets[rows], softcap, vocab_size, products.gradient_dtype
            )
            total += loss
            products.add_gradients(rows, dz, d_hidden, d_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total / hidden.size(0)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        factor = d_loss / d_hidden.size(0)
        gradients = d_hidden * factor.to(d_hidden.dtype), (d_weight * factor).to(ctx.weight_dtype)
        return *gradients, None, None, None, None, None


class _Products:
    """The head's three matrix products, chunk by chunk, in hidden's dtype."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden, self.weight = hidden, weight.to(hidden.dtype)
        self.gradient_dtype = hidden.dtype

    def logits(self, rows: slice) -> Tensor:
        return self.hidden[rows] @ self.weight.mT

    def add_gradients(self, rows: slice, dz: Tensor, d_hidden: Tensor, d_weight: Tensor) -> None:
        """What the chunk's `dz` says about its rows of hidden, and about weight."""
        d_hidden[rows] = dz @ self.weight
        d_weight += dz.mT @ self.hidden[rows]


class _Fp8Products:
    """The same in fp8; results in hidden's dtype."""

    gradient_dtype = fp8_tensor.E5M2

    def __init__(self, hidden: Tensor, weight: Quantised, compiled: bool) -> None:
        self.dtype, self.weight = hidden.dtype, weight
        quantise, self.transposed = fp8_tensor.quantise, fp8_tensor.transposed
        if compiled:
            quantise, self.transposed = fused(quantise), fused(self.transposed)
        self.hidden, self.inverse = quantise(hidden, fp8_tensor.E4M3)
        self.gradient_inverse = torch.full_like(self.inverse, 1 / GRADIENT_SCALE)

    def logits(self, rows: slice) -> Tensor:
        weight = self.weight
        return fp8_tensor.matmul(
            self.hidden[rows], self.inverse, weight.rows.t(), weight.inverse_scale, self.dtype, fast=True
        )

    def add_gradients(self, rows: slice, dz: Tensor, d_hidden: Tensor, d_weight: Tensor) -> None:
        """What the chunk's `dz`, in e5m2, says about its rows of hidden, and about weight."""
        inverse = self.gradient_inverse
        d_hidden[rows] = fp8_tensor.matmul(
            dz, inverse, self.weight.transposed.t(), self.weight.inverse_scale, self.dtype
        )
        columns = self.transposed(self.hidden[rows]).t()
        d_weight += fp8_tensor.matmul(self.transposed(dz), inverse, columns, self.inverse, self.dtype)


def _loss_and_gradient(
    z: Tensor, targets: Tensor, softcap: float, vocab_size: int, dtype: torch.dtype, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Summed loss of some rows and the gradient of that sum by z = h W^T (rows, all rows of `weight`).

    The gradient comes in `dtype`; in e5m2 it is GRADIENT_SCALE times itself. Not compiled, two fp32 tensors of z's size
    exist at a time, one of them `into` where that is given (it may be z).
    """
    half, logits = _capped(z, softcap, into)
    logits[:, vocab_size:] = -torch.inf
    right = targets.unsqueeze(-1)  # (rows, 1)
    right_logit, right_half = logits.gather(-1, right), half.gather(-1, right)
    p = logits.exp_()
    total = p.sum(dim=-1, keepdim=True)
    nll = total.log() - right_logit
    right_dz = torch.expm1(-nll) * (4 * right_half * (1 - right_half))
    dz = p.mul_(half.addcmul_(half, half, value=-1)).mul_(4 / total)
    if into is None and torch.compiler.is_compiling():  # what is scattered into has to be in memory, all of it, in fp32
        dz = torch.where(torch.arange(z.size(1), device=z.device) == right, right_dz, dz)
    else:
        dz.scatter_(1, right, right_dz)
    return nll.sum(), (dz * GRADIENT_SCALE if dtype == fp8_tensor.E5M2 else dz).to(dtype)


def _in_blocks(
    z: Tensor, targets: Tensor, softcap: float, vocab_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`_loss_and_gradient` of a chunk, some rows at a time, so that what is fp32 stays in a cache. z is used up."""
    in_place = z.dtype == dtype == _wide(z)
    dz = z if z.dtype == dtype else torch.empty_like(z, dtype=dtype)
    total = torch.zeros((), dtype=_wide(z), device=z.device)
    for rows in _slices(z.size(0), max(1, BLOCK_ELEMENTS // z.size(1))):
        into = z[rows] if in_place else None
        loss, gradient = _loss_and_gradient(z[rows], targets[rows], softcap, vocab_size, dtype, into)
        if into is None:
            dz[rows] = gradient
        total += loss
    return total, dz


@functools.cache
def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, once."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Rows of each chunk: a multiple of 16, which fp8's products need, where a chunk has that many."""
    step = max(1, (CPU_CHUNK_ELEMENTS if hidden.device.type == "cpu" else LOSS_CHUNK_ELEMENTS) // weight.size(0))
    return _slices(hidden.size(0), step - step % fp8_tensor.MULTIPLE if step > fp8_tensor.MULTIPLE else step)


def _slices(rows: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, rows, step)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
