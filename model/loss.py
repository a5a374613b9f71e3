"""Head, softcap and cross-entropy together, without ever holding the logits of a batch.

The logits are the largest tensor of the whole model: 32 rows of 2048 tokens over 32,768 words are 8.6 GB in fp32, and a plain
implementation holds four or five tensors of that size at once (logits, capped logits, log-probabilities, their gradients). None of
them has to exist. The loss of one token needs only its own row, so rows are taken in chunks of at most `CHUNK_ELEMENTS` logits:
for each chunk the loss AND the gradients are computed, and the logits are dropped before the next.

Working out the gradient already in the forward pass costs no recomputation: the backward pass of a mean is known up to one factor,
the gradient that arrives from above, and only that factor is applied later. Kept in between are the gradients that must exist
anyway: one of the size of `hidden`, one of the size of `weight` (in at least fp32, so that adding up chunks loses nothing).

With z = h W^T, t = tanh(z / c), logits l = c t and p = softmax(l), for the right word y:

    nll = -log p[y]        d nll / d l = p - onehot(y)        d l / d z = 1 - t^2

Rows of `weight` from `vocab_size` on are padding (the matrix products like multiples of 64): their logits are -inf after the cap,
so they have no probability and no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25  # logits per chunk: 128 MiB in fp32, 1024 rows at a vocabulary of 32,768


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, vocab_size: int | None = None) -> Tensor:
    """Mean of -log p(target) in nats, fp32 scalar; gradients for `hidden` and `weight`.

    hidden: (N, D) after the final norm, in the compute dtype. weight: (at least vocab_size, D), any dtype; it is cast to hidden's.
    targets: (N,) int64 in [0, vocab_size). `vocab_size` None means every row of `weight` is a word.
    """
    vocab_size = vocab_size or weight.size(0)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _CrossEntropy.apply(hidden, weight, targets, softcap, vocab_size)
    return token_losses(hidden, weight, targets, softcap, vocab_size)[0].mean()


@torch.no_grad()
def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """-log p(target) of each row in nats, (N,) fp32, and the word of highest logit, (N,) int64. Arguments as `cross_entropy`."""
    vocab_size = vocab_size or weight.size(0)
    weight = weight.to(hidden.dtype)
    nll, greedy = [], []
    for rows in _chunks(hidden.size(0), weight.size(0)):
        logits = capped_logits(hidden[rows], weight, softcap, vocab_size)
        greedy.append(logits.argmax(dim=-1))
        nll.append(_nll(logits.log_softmax(dim=-1), targets[rows]))
    return torch.cat(nll), torch.cat(greedy)


def capped_logits(hidden: Tensor, weight: Tensor, softcap: float, vocab_size: int) -> Tensor:
    """c tanh(h W^T / c): (N, D), (V, D) -> (N, vocab_size); the product in hidden's dtype, everything after it in at least fp32."""
    z = (hidden @ weight.to(hidden.dtype).mT)[..., :vocab_size]
    return softcap * torch.tanh(z.to(_wide(z)) / softcap)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, vocab_size: int) -> Tensor:
        cast = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=_wide(weight))
        total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
        for rows in _chunks(hidden.size(0), weight.size(0)):
            loss, dz = _loss_and_gradient(hidden[rows], cast, targets[rows], softcap, vocab_size)
            total += loss
            d_hidden[rows] = dz @ cast
            d_weight += dz.mT @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total / hidden.size(0)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        factor = d_loss / d_hidden.size(0)
        return d_hidden * factor.to(d_hidden.dtype), (d_weight * factor).to(ctx.weight_dtype), None, None, None


def _loss_and_gradient(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, vocab_size: int) -> tuple[Tensor, Tensor]:
    """One chunk's summed loss and the gradient of that sum by z = h W^T, in hidden's dtype, over all rows of `weight`."""
    z = hidden @ weight.mT
    t = z.to(_wide(z)).div_(softcap).tanh_()
    logits = t * softcap
    logits[:, vocab_size:] = -torch.inf
    logp = logits.log_softmax(dim=-1)
    loss = _nll(logp, targets).sum()
    dz = logp.exp_()
    dz.scatter_add_(1, targets.unsqueeze(1), torch.full_like(dz[:, :1], -1.0))
    dz.mul_(t.square_().neg_().add_(1.0))
    return loss, dz.to(hidden.dtype)


def _nll(logp: Tensor, targets: Tensor) -> Tensor:
    return -logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _chunks(rows: int, words: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // words)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
