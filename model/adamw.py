"""AdamW's arithmetic (Loshchilov and Hutter, arXiv 1711.05101) on one tensor, in place, as the published runs order it.

Decay first, p <- p (1 - lr wd), then the bias-corrected step. Moments are stored in the parameter's dtype (bfloat16 for
the embedding tables), the arithmetic is fp32 and cast back, without stochastic rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model.hyper import GroupSpec, StepHyper


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an update of a tensor of `dtype` computes in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


class AdamWScalars(NamedTuple):
    """One step's numbers for one group, as 0-d tensors: a compiled update takes new values without recompilation."""

    keep: Tensor
    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    step_size: Tensor
    second_correction: Tensor
    eps: Tensor

    @classmethod
    def of(cls, spec: GroupSpec, hyper: StepHyper, step: int, dtype: torch.dtype) -> AdamWScalars:
        """`step` counts from 1; the bias corrections are computed in double precision."""
        lr, (b1, b2) = spec.lr * hyper.lr_mult, spec.betas
        keep = 1 - lr * spec.weight_decay
        values = (keep, b1, 1 - b1, b2, 1 - b2, lr / (1 - b1**step), 1 / math.sqrt(1 - b2**step), spec.eps)
        return cls(*(torch.tensor(value, dtype=dtype) for value in values))


def adamw_update(p: Tensor, grad: Tensor, first: Tensor, second: Tensor, scalars: AdamWScalars) -> None:
    """One AdamW step in place on p and its moments (all of one shape)."""
    dtype = math_dtype(p.dtype)
    wide_grad, wide_p, m, v = grad.to(dtype), p.to(dtype), first.to(dtype), second.to(dtype)
    m.mul_(scalars.beta1).add_(wide_grad * scalars.one_minus_beta1)
    v.mul_(scalars.beta2).add_(wide_grad.square() * scalars.one_minus_beta2)
    denominator = (v.sqrt() * scalars.second_correction).add_(scalars.eps)
    wide_p.mul_(scalars.keep).sub_((m / denominator).mul_(scalars.step_size))
    if p.dtype != dtype:
        p.copy_(wide_p)
        first.copy_(m)
        second.copy_(v)
