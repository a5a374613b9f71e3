"""The transpose of a tensor in fp8, as an operator that the compiler neither takes apart nor computes again.

The weight's gradient reads a layer's input by columns (`model/fp8.py`). Left to the compiler, that copy is made in the
backward pass once more from what lies before the norm, in kernels that write single bytes far apart. Here it is made
once, from one byte a number, by tiles; on a GPU by Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model import fp8_tensor

TILE = 128


@torch.library.custom_op("speedrun::transposed", mutates_args=())
def transposed(x: Tensor) -> Tensor:
    """x (N, C) in fp8 as a new tensor (C, N) by rows."""
    if x.device.type != "cuda":
        return fp8_tensor.transposed(x)
    import triton

    from model.fp8_transpose_kernel import transpose_kernel

    out = x.new_empty(x.size(1), x.size(0))
    grid = triton.cdiv(x.size(0), TILE), triton.cdiv(x.size(1), TILE)
    transpose_kernel[grid](x.view(torch.uint8), out.view(torch.uint8), *x.shape, TILE=TILE, num_warps=8)
    return out


@transposed.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.size(1), x.size(0))
