"""Muon's arithmetic on a stack of same-shape matrices: one step, in place, for whoever owns the stack.

Muon (Jordan 2024) takes the momentum of a weight matrix and replaces it by the nearest semi-orthogonal matrix before it
steps: every direction that the gradient has spoken of at all is followed by the same length, where Adam follows few
directions far. The steps below are those of the published speedrun runs; two switches and two numbers tell the February
runs ("FEB") from the July state ("HEAD").

1. Momentum. m <- beta m + (1 - beta) g, an average and not a sum, so its size does not depend on beta, which the
   schedule moves; then Nesterov's look ahead, u = (1 - beta) g + beta m.
2. MuonEq (arXiv 2603.28254; HEAD). Every row of u is brought to the root-mean-square row norm. Five iterations are
   too few for a matrix whose rows differ by orders of magnitude; equal rows need fewer.
3. Cast to bfloat16 and divide by a little more than the Frobenius norm (1.02 FEB, 1.01 HEAD). The Frobenius norm
   bounds the spectral norm, so all singular values start in [0, 1) with room for rounding.
4. Polar Express (arXiv 2505.16932). Five times X <- a X + (b A + c A^2) X with A = X X^T on the short side: an odd
   polynomial of degree five applied to every singular value without ever computing one. The five coefficient triples
   differ because each is optimal for the interval that the one before leaves; the last leaves the singular values
   near 1. Only products of matrices, so bfloat16 is enough and the tensor cores do the work.
5. Muon+ (arXiv 2602.21545; HEAD). Rescale to Frobenius norm sqrt(min(rows, columns)), what an exactly semi-orthogonal
   matrix has: what five iterations missed in size, they miss no longer.
6. NorMuon (arXiv 2510.05491). The rows of a tall matrix (columns of a wide one) still differ in size. A running
   second moment, one number a row, divides them; the whole is scaled back to the Frobenius norm that it had. No bias
   correction is needed: a common factor vanishes in that rescaling.
7. Cautious decay (arXiv 2510.12402). Weight decay acts only on entries that the update already pulls towards zero (u
   W >= 0): W <- W - eta (u + wd W [u W >= 0]), with eta = lr sqrt(max(1, rows / columns)).

A zero gradient gives a zero update (no division without a floor): at initialisation the output projections are zero,
and with them the gradients of everything that they hide.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Polar Express for five iterations, safety factor 0.02, cushion 2 (arXiv 2505.16932): (a, b, c) of each iteration.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NORM_FLOOR = 1e-6
SECOND_MOMENT_FLOOR = 1e-10


class MuonScalars(NamedTuple):
    """One step's numbers for one stack, as 0-d tensors: a compiled update takes new values without recompilation."""

    momentum: Tensor
    one_minus_momentum: Tensor
    one_minus_beta2: Tensor
    eta: Tensor
    eta_decay: Tensor

    @classmethod
    def of(cls, eta: float, decay: float, momentum: float, beta2: float, dtype: torch.dtype) -> MuonScalars:
        """`eta` already has the shape's factor; `decay` is the weight decay of this step."""
        values = (momentum, 1 - momentum, 1 - beta2, eta, eta * decay)
        return cls(*(torch.tensor(value, dtype=dtype) for value in values))


def step_size(lr: float, rows: int, columns: int) -> float:
    """eta = lr sqrt(max(1, rows / columns)): a tall matrix (the MLP's input, 4d x d: factor 2) steps further."""
    return lr * math.sqrt(max(1.0, rows / columns))


def second_moment_shape(rows: int, columns: int) -> tuple[int, int]:
    """NorMuon's state for one matrix: a number a row where it is tall or square, a number a column where it is wide."""
    return (rows, 1) if rows >= columns else (1, columns)


def _frobenius(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)


def equalize_rows(u: Tensor) -> Tensor:
    """MuonEq: (K, rows, columns) with every row at the root-mean-square row norm of its matrix."""
    rows = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    return u * (_frobenius(u) / math.sqrt(u.size(-2)) / rows.clamp_min(NORM_FLOOR))


def polar_express(u: Tensor, norm_factor: float, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrices to u (K, rows, columns), nearly; computed and returned in `dtype`.

    A tall stack is iterated transposed: the Gram matrix is always the short side's.
    """
    tall = u.size(-2) > u.size(-1)
    x = (u / (_frobenius(u) * norm_factor + NORM_FLOOR)).to(dtype)
    x = x.mT.contiguous() if tall else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.mT if tall else x


def normuon(u: Tensor, second: Tensor, one_minus_beta2: Tensor) -> Tensor:
    """Divide u (K, rows, columns) by the root of its rows' (columns') second moment, updated here; restore its norm."""
    dim = -1 if second.size(-1) == 1 else -2
    mean_square = u.square().mean(dim=dim, keepdim=True)
    second.add_((mean_square - second) * one_minus_beta2)
    scale = second.clamp_min(SECOND_MOMENT_FLOOR).rsqrt()
    before = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
    after = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return u * (scale * (before / after.clamp_min(SECOND_MOMENT_FLOOR)))


def muon_update(
    weight: Tensor,
    grad: Tensor,
    momentum: Tensor,
    second: Tensor,
    scalars: MuonScalars,
    *,
    norm_factor: float,
    muon_eq: bool,
    muon_plus: bool,
    dtype: torch.dtype,
) -> None:
    """One Muon step in place on weight, momentum (K, rows, columns) and second (K, rows, 1) or (K, 1, columns).

    `dtype` is what Polar Express computes in: bfloat16 in training, wider where a test compares.
    """
    fresh = grad * scalars.one_minus_momentum
    momentum.mul_(scalars.momentum).add_(fresh)
    u = fresh + momentum * scalars.momentum
    if muon_eq:
        u = equalize_rows(u)
    u = polar_express(u, norm_factor, dtype).to(weight.dtype)
    if muon_plus:
        u = u * (math.sqrt(min(u.shape[-2:])) / _frobenius(u).clamp_min(NORM_FLOOR))
    u = normuon(u, second, scalars.one_minus_beta2)
    decaying = weight * (u * weight >= 0)
    weight.sub_(u * scalars.eta + decaying * scalars.eta_decay)
