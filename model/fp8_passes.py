"""A block's fp8 products in fewer passes over memory (`train.levers`; `model/fp8.py` has the plain way).

Half of a micro-step goes into reading and writing what lies between two products. Each lever leaves some of it out:

    shared_input     q, k, v quantise their input once, not three times; the backward pass quantises it with the scale
                     that the forward pass has found, and looks for no maximum again
    kept_weights     weights are quantised, both ways round, when they have changed: once an optimizer step
    norm_output      the gradient of q's and k's norm is worked out from the norm's output y, which attention keeps
                     anyway: dx = r (dy - y mean(dy y)), with r = 1 / rms. What went into the norm is not kept
    kept_columns     what a weight's gradient reads of a layer's input, its transpose in fp8, is made in the forward
                     pass, from fp8 (`model/fp8_transpose.py`)
    joint_qkv        q, k, v have one scale for their weights and one for their gradients: the gradients by their common
                     input are one product
    relu_root        of relu squared the output a is kept, in e4m3, and not its input; the derivative is 2 sqrt(a)
    bounded_scales   the scale of what a norm, relu squared and its derivative give comes from a bound, not a maximum
    wide_gradients   a weight's gradient leaves its product in fp32, not in bf16 to be cast

The first needs no other and is part of all. The first four change no number by more than the compiler's own choice of
where to round to bf16. Of the others the last rounds less, the rest rounds to fp8 at other points; their errors stay
those of the formats.

**Bounds.** A normalised row of d channels has the length sqrt(d), which no entry exceeds. By Cauchy and Schwarz a
product's entry is at most the length of the row times that of the weight's: |z| <= sqrt(d) |w_up|, so that relu(z)^2 is
bounded; |v| <= sqrt(d) |w_v|, and no output of a head exceeds the largest |v|, being a mean of such rows (with a value
embedding the largest is found where v is made); and |da| <= |dy| |w_down|, so that dz = 2 relu(z) da is, dy's longest
row being found where dy is quantised. These bounds are some 2^5 (z, v), 2^10 (a) and 2^18 (dz) above the root mean
square. Numbers of a floating format lose nothing by that until they come near its smallest: e4m3 has 2^15 above its
smallest normal number and e5m2 2^30.
Nothing is remembered from step to step, nothing overflows, and a resumed run computes the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.fp8_tensor import E4M3, E5M2, Copies, Quantised, matmul, scaled
from model.fp8_transpose import transposed
from model.gpt import GPT, relu_squared
from model.loss import fused

ROUNDING = {E4M3: 1 + 1 / 16, E5M2: 1 + 1 / 8}
"""by what rounding may lengthen a row"""
HEAD = 128
"""channels of a head in every published shape"""
Levers = frozenset[str]


class Products:
    """Linear layers that read one input, in fp8: their outputs, with gradients for the input and each weight.

    normalised: the input's rows have come out of a norm. values: the layer of whose outputs, for such an input, the
    input's rows are weighted means.
    """

    def __init__(self, levers: Levers, *, normalised: bool = False, values: nn.Linear | None = None) -> None:
        self.levers, self.normalised, self.values = levers, normalised, values
        self.copies: list[Copies] = []
        self.longest = Copies()

    def refresh(self, compiled: bool, *layers: nn.Linear) -> None:
        """Quantise what has changed of the layers' weights, and keep it."""
        stacks = self._stacks(layers)
        self.copies = self.copies or [Copies() for _ in stacks]
        for copies, stack in zip(self.copies, stacks, strict=True):
            copies.refresh(stack, _maybe_fused(copies_of, compiled))
        if self.values is not None and "bounded_scales" in self.levers:
            self.longest.refresh([self.values.weight], _maybe_fused(longest_row, compiled))

    def __call__(self, x: Tensor, *layers: nn.Linear, of: Tensor | None = None) -> Sequence[Tensor]:
        """x (..., D) -> one output (..., C) a layer; not in fp8 where gradients are off. of: as `model.gpt.apart`."""
        if not torch.is_grad_enabled():
            return [layer(x) for layer in layers]
        stacks = self._stacks(layers)
        copies = [each.current for each in self.copies] or [copies_of(*stack) for stack in stacks]
        bound = self._bound(x.size(-1), of) if "bounded_scales" in self.levers else None
        weights = [layer.weight for layer in layers]
        tensors = [tensor for each in copies for tensor in each]
        return _Products.apply(x, self.levers, bound, len(layers), *weights, *tensors)

    def _bound(self, width: int, of: Tensor | None) -> Tensor | float | None:
        """What no |x| exceeds, where that is known."""
        if self.normalised:
            return _norm_bound(width)
        if of is not None:
            return _largest(of.detach()).float() * ROUNDING[E4M3]
        if self.values is None:
            return None
        longest = self.longest.current if self.copies else longest_row(self.values.weight)
        return longest * (_norm_bound(width) * ROUNDING[E4M3] ** 3)

    def _stacks(self, layers: Sequence[nn.Linear]) -> list[list[Tensor]]:
        weights: list[Tensor] = [layer.weight for layer in layers]
        return [weights] if "joint_qkv" in self.levers else [[weight] for weight in weights]


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, levers: Levers, bound: Tensor | float | None, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        copies, sizes = _copies(tensors[count:]), [weight.size(0) for weight in tensors[:count]]
        x8, inverse = quantise(x.flatten(0, -2), E4M3, bound)
        x8 = stored(x8)
        parts = [(rows, c.inverse_scale) for c in copies for rows in c.rows.split(sizes[: count // len(copies)])]
        outs = [matmul(x8, inverse, rows.t(), scale, x.dtype, fast=True) for rows, scale in parts]
        ctx.save_for_backward(_kept_input(x8, levers), inverse, *tensors[count:])
        ctx.shape, ctx.dtype, ctx.levers = x.shape, x.dtype, levers
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        kept, inverse, *rest = ctx.saved_tensors
        copies = _copies(rest)
        rows = [dy.flatten(0, -2) for dy in dys]
        joint = len(copies) < len(rows)
        bound = torch.stack([_largest(dy) for dy in rows]).amax().float() if joint else None
        gradients = [_gradient(dy, bound) for dy in rows]
        operands = [(g[0], g[2]) for g in gradients]
        if joint:
            operands = [(torch.cat([g[0] for g in gradients], dim=1), gradients[0][2])]
        parts = [
            matmul(dy8, dy_inverse, copy.transposed.t(), copy.inverse_scale, ctx.dtype)
            for (dy8, dy_inverse), copy in zip(operands, copies, strict=True)
        ]
        dx = functools.reduce(torch.add, reversed(parts))  # in the order in which autograd would add
        columns = _columns(kept, ctx.levers)
        d_weights = [_d_weight(g[1], g[2], columns, inverse, ctx) for g in gradients]
        return dx.view(ctx.shape), None, None, None, *d_weights, *([None] * len(rest))


def install(model: GPT, levers: Levers) -> None:
    """Put `levers` into the blocks of a model that is in fp8."""
    blocks: list[Any] = list(model.blocks)
    for block in blocks:
        block.attn.products = Products(levers, normalised=True)
        block.attn.out_products = Products(levers, values=block.attn.v)
        block.mlp.products = MLP(levers)
        if "norm_output" in levers:
            block.attn.norm = norm
    if "kept_weights" in levers:
        model.before_loss = functools.partial(refresh, model)


def refresh(model: GPT) -> None:
    """Quantise the weights of the blocks that have changed, and keep them."""
    blocks: list[Any] = list(model.blocks)
    for attn, mlp in ((block.attn, block.mlp) for block in blocks):
        attn.products.refresh(model.compiled, attn.q, attn.k, attn.v)
        attn.out_products.refresh(model.compiled, attn.o)
        mlp.products.refresh(model.compiled, mlp.up, mlp.down)


class MLP:
    """up, relu squared, down: in fp8, as one function."""

    def __init__(self, levers: Levers) -> None:
        self.levers = levers
        self.copies: tuple[Copies, ...] = ()
        self.longest: Tensor | None = None

    def refresh(self, compiled: bool, up: nn.Linear, down: nn.Linear) -> None:
        """As `Products.refresh`."""
        self.copies = self.copies or (Copies(), Copies())
        make = _maybe_fused(copies_of, compiled)
        if self.copies[0].refresh([up.weight], make) and "bounded_scales" in self.levers:
            self.longest = _maybe_fused(longest_row, compiled)(up.weight)
        self.copies[1].refresh([down.weight], make)

    def __call__(self, x: Tensor, up: nn.Linear, down: nn.Linear) -> Tensor:
        """x (..., D), out of a norm -> (..., D); not in fp8 where gradients are off."""
        if not torch.is_grad_enabled():
            return relu_squared(x, up, down)
        if self.copies:
            copies, longest = [each.current for each in self.copies], self.longest
        else:
            copies = [copies_of(up.weight), copies_of(down.weight)]
            longest = longest_row(up.weight) if "bounded_scales" in self.levers else None
        return _MLP.apply(x, self.levers, longest, up.weight, down.weight, *copies[0], *copies[1])


@torch.no_grad()
def longest_row(weight: Tensor) -> Tensor:
    """The length of the longest row of a matrix, 0-d fp32."""
    return weight.float().square().sum(dim=1).amax().sqrt()


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, levers: Levers, longest: Tensor | None, *tensors: Tensor) -> Tensor:
        up, down = _copies(tensors[2:])
        x_bound = z_bound = a_bound = None
        if longest is not None:
            x_bound = _norm_bound(x.size(-1))
            z_bound = longest * (x_bound * ROUNDING[E4M3] ** 2 * (1 + 2**-7))
            a_bound = z_bound.square()
        x8, x_inverse = quantise(x.flatten(0, -2), E4M3, x_bound)
        x8 = stored(x8)
        z = matmul(x8, x_inverse, up.rows.t(), up.inverse_scale, x.dtype, fast=True)
        a8, a_inverse = quantise(z.relu().square(), E4M3, a_bound)
        out = matmul(a8, a_inverse, down.rows.t(), down.inverse_scale, x.dtype, fast=True)
        middle = a8 if "relu_root" in levers else z
        ctx.save_for_backward(_kept_input(x8, levers), x_inverse, middle, a_inverse, z_bound, *tensors[2:])
        ctx.shape, ctx.dtype, ctx.levers = x.shape, x.dtype, levers
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, x_inverse, middle, a_inverse, z_bound, *rest = ctx.saved_tensors
        up, down = _copies(rest)
        dy = dy.flatten(0, -2)
        longest = None if z_bound is None else longest_row(dy)
        dy8, dy8_t, dy_inverse = _gradient(dy, longest)
        da = matmul(dy8, dy_inverse, down.transposed.t(), down.inverse_scale, ctx.dtype)
        if "relu_root" in ctx.levers:
            a8, relu = middle, (middle.float() * a_inverse).sqrt()
        else:
            relu = middle.relu()
            a8, _ = quantise(relu.square(), E4M3, a_inverse * torch.finfo(E4M3).max)
        dz_bound = None
        if longest is not None:  # a column of `down` is at most sqrt(rows) times its largest entry long
            column = down.inverse_scale * (math.sqrt(down.rows.size(0)) * torch.finfo(E4M3).max)
            dz_bound = z_bound * longest * column * (2 * ROUNDING[E5M2] * ROUNDING[E4M3])
        dz8, dz8_t, dz_inverse = _gradient((2 * relu * da).to(ctx.dtype), dz_bound)
        d_down = _d_weight(dy8_t, dy_inverse, a8.t().contiguous(), a_inverse, ctx)
        dx = matmul(dz8, dz_inverse, up.transposed.t(), up.inverse_scale, ctx.dtype)
        d_up = _d_weight(dz8_t, dz_inverse, _columns(kept, ctx.levers), x_inverse, ctx)
        return dx.view(ctx.shape), None, None, d_up, d_down, *([None] * len(rest))


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, its gradient worked out from its output."""
    return _Norm.apply(x)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = (wide.square().mean(dim=-1, keepdim=True) + torch.finfo(wide.dtype).eps).rsqrt()
        y = (wide * inverse).to(x.dtype)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        wide, dy_wide = y.to(inverse.dtype), dy.to(inverse.dtype)
        return (inverse * (dy_wide - wide * (dy_wide * wide).mean(dim=-1, keepdim=True))).to(y.dtype)


def stored(x: Tensor) -> Tensor:
    """x, for all that read it: `as_strided` wants it in memory, else the compiler stores it for each product."""
    return x.as_strided(x.size(), x.stride())


def _copies(tensors: Sequence[Tensor]) -> list[Quantised]:
    size = len(Quantised._fields)
    return [Quantised(*tensors[i : i + size]) for i in range(0, len(tensors), size)]


@torch.no_grad()
def copies_of(*weights: Tensor) -> Quantised:
    """The fp8 copies of these weights stacked by rows, with one scale."""
    rows, inverse_scale = quantise(torch.cat(weights) if len(weights) > 1 else weights[0], E4M3)
    return Quantised(rows, rows.t().contiguous(), inverse_scale)


def quantise(x: Tensor, dtype: torch.dtype, bound: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
    """x in fp8 with one scale for all of it, and 1 / scale (0-d fp32). A NaN or Inf in x makes all of it NaN.

    bound: what no |x| exceeds, where that is known; else the largest is looked for. The scale is rounded as torchao's.
    """
    if bound is None:
        bound = x.abs().amax()
    elif isinstance(bound, float):
        bound = torch.full((), bound, device=x.device)
    return scaled(x, dtype, (torch.finfo(dtype).max / bound.double().clamp(min=1e-12)).float())


def _maybe_fused(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return fused(function) if compiled else function


def _kept_input(x8: Tensor, levers: Levers) -> Tensor:
    return transposed(x8) if "kept_columns" in levers else x8


def _columns(kept: Tensor, levers: Levers) -> Tensor:
    """The transpose of the input of which `_kept_input` is kept."""
    return kept if "kept_columns" in levers else kept.t().contiguous()


def _d_weight(dy8_t: Tensor, dy_inverse: Tensor, x8_t: Tensor, x_inverse: Tensor, ctx: Any) -> Tensor:
    """dy^T x, of operands that are transposed already, in fp32."""
    dtype = torch.float32 if "wide_gradients" in ctx.levers else ctx.dtype
    return matmul(dy8_t, dy_inverse, x8_t.t(), x_inverse, dtype).float()


def _largest(x: Tensor) -> Tensor:
    """max |x|, by rows of a head's usual size first: so it is found in passing where x is made."""
    return x.abs().flatten().unflatten(0, (-1, math.gcd(x.size(-1), HEAD))).amax(dim=-1).amax()


def _gradient(dy: Tensor, bound: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """dy (N, C) in e5m2, its transpose (C, N) by rows, and 1 / scale."""
    rows, inverse = quantise(dy, E5M2, bound)
    return rows, rows.t().contiguous(), inverse


def _norm_bound(width: int) -> float:
    """What no entry of a normalised row exceeds, its rounding to bf16 included."""
    return math.sqrt(width) * (1 + 2**-7)
