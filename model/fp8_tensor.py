"""Tensors in fp8: a number format, one scale for all of a tensor, and products of two (`model/fp8.py` says why)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""what every dimension that a product reads is divisible by"""


class Quantised(NamedTuple):
    """An e4m3 weight for both products that read it: (V, D) and (D, V), each by rows, and 1 / scale, 0-d fp32."""

    rows: Tensor
    transposed: Tensor
    inverse_scale: Tensor


class Copies:
    """The fp8 copies of some weights, stacked by rows, or what else is worked out from them: made when a weight has
    changed and kept until one changes again.

    Every change in place of the weight itself counts its version up (a loaded checkpoint); `Optimizer.step`, which
    writes through detached tensors, counts it up by itself.
    """

    current: Any

    def __init__(self) -> None:
        self._state: list[tuple[int, int]] = []

    def refresh(self, weights: Sequence[Tensor], make: Callable[..., Any]) -> bool:
        """Whether a weight has changed; then `current` is what `make` gives for them."""
        state = [(id(weight), weight._version) for weight in weights]
        changed = self._state != state
        if changed:
            self.current, self._state = make(*weights), state
        return changed


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in fp8 with one scale for all of it, and 1 / scale (0-d fp32). A NaN or Inf in x makes all of it NaN."""
    largest = torch.finfo(dtype).max
    scale = largest / x.abs().amax().float().clamp(min=1e-12)
    return scaled(x, dtype, scale)


def scaled(x: Tensor, dtype: torch.dtype, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same with this scale."""
    largest = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-largest, largest).to(dtype), scale.reciprocal()


def matmul(
    a: Tensor, a_inverse: Tensor, b: Tensor, b_inverse: Tensor, out_dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """a (m, k) by rows times b (k, n) by columns, fp8 with inverse scales; `fast` as in the forward pass."""
    return torch._scaled_mm(a, b, a_inverse, b_inverse, out_dtype=out_dtype, use_fast_accum=fast)


def transposed(x: Tensor) -> Tensor:
    """x (m, k) in fp8 as a new tensor (k, m) by rows."""
    return x.view(torch.uint8).t().contiguous().view(x.dtype)
