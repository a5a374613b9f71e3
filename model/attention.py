"""Causal attention with a window, (B, T, H, D) in and out.

A query at position i sees the keys i - window ... i, as `window_size=(window, 0)` means in the flash-attention kernels,
so that weights trained with either agree. A window of T - 1 or more is full causal attention.

**Windowed SDPA**, on a CPU and in fp32: a short window must not cost a T x T mask. The sequence is cut into blocks as
long as the window: every key that a query may see lies in the query's own block or in the one before it, and all blocks
share one mask of (window, 2 window). Nothing is approximated; the first block has no predecessor and is plainly causal.

    keys of         block b-1    block b
    query 0         x x x x x    x . . . .        the first query of a block sees the whole previous block and itself,
    query 1         . x x x x    x x . . .        each next one sees one key less there and one more here
    query 2         . . x x x    x x x . .

**On a GPU**, in 16 bits, torch's `varlen_attn` takes the window, with the rows of a batch as sequences of one length.
Which kernel stands behind that call is chosen once per process (`model/kernels.py`). A package's kernel is compiled
when it is first called, by each rank, and has to agree with windowed SDPA before anything is trained with it (`prove`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import Backend, BackendError, why_it_failed

PROOF_LENGTH, PROOF_BOUND = 256, 0.03
"""T of the proof, also a window that sees everything; and what bf16 may be wrong by, of the largest value"""


def attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None) -> Tensor:
    """softmax(scale q.k) v over the keys i - window ... i of each query i.

    q, k, v: (B, T, H, D), same number of heads; `scale` is 1/sqrt(D) unless given. Returns (B, T, H, D) in v's dtype.
    """
    T = q.size(1)
    if q.device.type != "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        return _kernel(q, k, v, window, scale)
    if window >= T - 1:
        return _sdpa(q, k, v, scale, causal=True)
    first = _sdpa(q[:, :window], k[:, :window], v[:, :window], scale, causal=True)
    rest = _later_blocks(q, k, v, window, scale)
    return torch.cat([first, rest], dim=1)


def _kernel(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """Through the flash-attention kernel: the rows of the batch one after another, each a sequence of T."""
    from torch.nn.attention.varlen import varlen_attn  # two seconds of imports, with the compiler's, that no CPU needs

    B, T, _, _ = q.shape
    starts = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    seen = (-1 if window >= T - 1 else window, 0)
    queries, keys, values = (x.flatten(0, 1) for x in (q, k, v))  # (B T, H, D)
    out = varlen_attn(queries, keys, values, starts, starts, T, T, scale=scale, window_size=seen)
    assert isinstance(out, Tensor)  # a tuple only where more than the output is asked for
    return out.view_as(q)


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

    queries = cut(q)[:, 1:].reshape(B * (blocks - 1), window, H, D)  # all blocks but the first
    mask = block_mask(window, q.device)  # (window, 2 window)
    out = _sdpa(queries, with_predecessor(k), with_predecessor(v), scale, mask=mask)
    return out.reshape(B, (blocks - 1) * window, H, D)[:, : T - window]


def block_mask(window: int, device: torch.device) -> Tensor:
    """(window, 2 window) bool: query i of a block sees the keys i ... i + window of the previous block and its own."""
    query = torch.arange(window, device=device).unsqueeze(1)
    key = torch.arange(2 * window, device=device).unsqueeze(0)
    return (key >= query) & (key <= query + window)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """torch's fused attention, which wants (B, H, T, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale).transpose(1, 2)


# ---- whether a package's kernel is right


def prove(backend: Backend, device: torch.device, gradients: bool) -> None:
    """Whether a package's kernel, compiled for `device` by this call, gives the blocks' outputs, and gradients if these
    are wanted; BackendError if not."""
    if not backend.packaged:
        return
    instead = "install it again or say -o train.attention=fa2"
    try:
        worst = max(disagreement(device, window, gradients) for window in (64, PROOF_LENGTH))
    except Exception as error:
        raise BackendError(f"{backend.name} fails on this GPU: {why_it_failed(error)}; {instead}") from error
    if not worst < PROOF_BOUND:
        raise BackendError(f"{backend.name} computes something else on this GPU, wrong by {worst:.1%}; {instead}")


def disagreement(device: torch.device, window: int, gradients: bool) -> float:
    """Largest difference between attention in bf16 on `device` and in fp32 on the CPU, in the output and perhaps the
    three gradients, each relative to the largest value there."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(2, PROOF_LENGTH, 2, 128, generator=generator).bfloat16() for _ in range(4))

    def computed(where: torch.device, dtype: torch.dtype) -> list[Tensor]:
        queries, keys, values = inputs = [x.to(where, dtype).requires_grad_(gradients) for x in (q, k, v)]
        out = attention(queries, keys, values, window)
        found = torch.autograd.grad(out, inputs, weight.to(where, dtype)) if gradients else ()
        return [x.float().cpu() for x in (out, *found)]

    pairs = zip(computed(device, torch.bfloat16), computed(torch.device("cpu"), torch.float32), strict=True)
    return max(
        ((mine - right).abs().max() / right.abs().max()).nan_to_num(nan=float("inf")).item() for mine, right in pairs
    )
