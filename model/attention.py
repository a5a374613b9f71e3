"""Causal attention with a window, B T H D in and out.

A query at position i sees the keys i - window ... i: `window` predecessors and itself (the meaning of `window_size=(window, 0)` in
the flash-attention kernels, so that weights trained with either agree). A window of T - 1 or more is full causal attention.

A short window must not cost a T x T mask. The sequence is cut into blocks as long as the window: then every key that a query may
see lies in the query's own block or in the one before it, and all blocks share one mask of (window, 2 window). Work and memory grow
with T x window; nothing is approximated.

    keys of         block b-1    block b
    query 0         x x x x x    x . . . .        the first query of a block sees the whole previous block and itself,
    query 1         . x x x x    x x . . .        each next one sees one key less there and one more here
    query 2         . . x x x    x x x . .

The first block has no predecessor and is plainly causal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None) -> Tensor:
    """softmax(scale q.k) v over the keys i - window ... i of each query i.

    q, k, v: (B, T, H, D), same number of heads; `scale` is 1/sqrt(D) unless given. Returns (B, T, H, D) in v's dtype.
    """
    T = q.size(1)
    if window >= T - 1:
        return _sdpa(q, k, v, scale, causal=True)
    first = _sdpa(q[:, :window], k[:, :window], v[:, :window], scale, causal=True)
    rest = _later_blocks(q, k, v, window, scale)
    return torch.cat([first, rest], dim=1)


def _later_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """The queries from `window` on: blocks of `window` queries against their own and the previous block's keys."""
    B, T, H, D = q.shape
    blocks = -(-T // window)  # the last one may be partly padding: no query sees a later key, so padding is never seen
    pad = blocks * window - T

    def cut(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, pad)).view(B, blocks, window, H, D) if pad else x.view(B, blocks, window, H, D)

    def with_predecessor(x: Tensor) -> Tensor:
        x = cut(x)
        return torch.cat([x[:, :-1], x[:, 1:]], dim=2).view(B * (blocks - 1), 2 * window, H, D)

    queries = cut(q)[:, 1:].reshape(B * (blocks - 1), window, H, D)
    mask = block_mask(window, q.device)
    out = _sdpa(queries, with_predecessor(k), with_predecessor(v), scale, mask=mask)
    return out.reshape(B, (blocks - 1) * window, H, D)[:, : T - window]


def block_mask(window: int, device: torch.device) -> Tensor:
    """(window, 2 window) bool: query i of a block sees the keys i ... i + window of the previous block followed by its own."""
    query = torch.arange(window, device=device).unsqueeze(1)
    key = torch.arange(2 * window, device=device).unsqueeze(0)
    return (key >= query) & (key <= query + window)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """torch's fused attention, which wants (B, H, T, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale).transpose(1, 2)
