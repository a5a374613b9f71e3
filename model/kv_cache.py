"""What a token's successors need of it: keys and values as far as the windows reach, and the embedding for smear.

A layer with a window of w predecessors keeps w + 1 positions, position p in slot p mod (w + 1): the new token takes the
place of the one that nobody will see again. Attention does not ask in which order keys stand, for they are rotated by
their positions already. Sequences of one batch have each their own length.

    window 3, 4 slots    after 3 tokens  0 1 2 -    after 4  0 1 2 3    after 6  4 5 2 3    the next goes to slot 2

Value embeddings and backout concern a token alone and need nothing kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import attention
from model.config import GPTConfig


class KVCache:
    """Of B sequences of at most `most` tokens: empty, then of prompts (the first pass), then a token more each pass."""

    def __init__(self, config: GPTConfig, lengths: list[int], most: int, like: Tensor) -> None:
        """lengths: of the prompts, padded on the right; like: of the device and dtype that the model computes in."""
        self.lengths = torch.tensor(lengths, device=like.device)  # (B,) tokens so far, those of the pass not counted
        self.end = max(lengths)  # positions that the pass reaches
        self._rows = torch.arange(len(lengths), device=like.device)
        self._is_empty = True
        self._last: Tensor | None = None  # (B, C) the newest tokens' embeddings
        sizes = [min(window + 1, most) for window in config.windows]
        shape = (2, len(lengths), config.heads)
        self._layers = [like.new_zeros(*shape, size, config.head_dim) for size in sizes]

    def advance(self) -> None:
        """After a pass: what it had counts from now on."""
        if not self._is_empty:
            self.lengths += 1
        self._is_empty = False
        self.end += 1

    def cos_sin(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables (1, end, 1, D / 2) -> those of the pass, (1, T, 1, D / 2) or (B, 1, 1, D / 2)."""
        if self._is_empty:
            return cos, sin
        return cos[0, self.lengths].unsqueeze(1), sin[0, self.lengths].unsqueeze(1)

    def previous_tokens(self, x: Tensor) -> Tensor:
        """(B, T, C) -> for each token the x of the one before it; zeros for a sequence's first."""
        if self._last is None:
            self._last = x[self._rows, self.lengths - 1]
            return F.pad(x, (0, 0, 1, -1))
        previous, self._last = self._last, x[:, 0]
        return previous.unsqueeze(1)

    def attention(self, layer: int) -> Callable[[Tensor, Tensor, Tensor, int, float | None], Tensor]:
        """`model.attention.attention` of one layer, which also keeps the keys and values."""
        return functools.partial(self._prompts if self._is_empty else self._token, self._layers[layer])

    def _prompts(self, kept: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
        size = kept.size(3)
        newest = torch.arange(min(size, q.size(1)), device=q.device)
        at = (self.lengths.unsqueeze(1) - 1 - newest).clamp(min=0)  # (B, n) positions; of a short prompt 0 repeatedly
        rows = self._rows.unsqueeze(1)
        for keeper, new in zip(kept, (k, v), strict=True):
            keeper[rows, :, at % size] = new[rows, at]
        return attention(q, k, v, window, scale)

    def _token(self, kept: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
        size = kept.size(3)
        for keeper, new in zip(kept, (k, v), strict=True):
            keeper[self._rows, :, self.lengths % size] = new[:, 0]
        used = min(self.end, size)
        filled = torch.arange(used, device=q.device) <= self.lengths.view(-1, 1, 1, 1)  # (B, 1, 1, used)
        keys, values = kept[:, :, :, :used]
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=filled, scale=scale)
        return out.transpose(1, 2)
