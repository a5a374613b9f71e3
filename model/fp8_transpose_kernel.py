"""`model/fp8_transpose.py`'s kernel: a module of its own, since Triton comes with torch's CUDA builds alone."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def transpose_kernel(x, out, rows, columns, TILE: tl.constexpr):
    """x (rows, columns), bytes -> out (columns, rows); a program moves one tile, stored to the transposed places."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    inside = (row < rows) & (column < columns)
    tl.store(out + column * rows + row, tl.load(x + row * columns + column, mask=inside), mask=inside)
