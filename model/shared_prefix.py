"""Rows that hold one prefix and several continuations of it.

The options of a multiple-choice question need not repeat the prefix that they share: a row may hold it once and then
all suffixes. `SharedPrefix` says of every column where it stands in its own sequence, and a query in a suffix sees the
prefix and its own suffix, through the same window as ever. The prefix columns are plain causal attention; only the few
suffix queries need a mask.

    columns    0 1 2 3 4 | 5 6 7 | 8 9           a prefix of 4 tokens and a column of padding, a suffix of 3, one of 2
    position   0 1 2 3 - | 4 5 6 | 4 5
    suffix     0 0 0 0 - | 1 1 1 | 2 2
    previous   - 0 1 2 - | 3 5 6 | 3 8           the column of the token before, in its own sequence
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import attention


@dataclass(frozen=True)
class SharedPrefix:
    """Rows of a prefix and suffixes that each continue it.

    prefix: the columns before this one hold prefixes (and padding), the others suffixes (and padding). position: (B, T)
    int64, each token's place in its own sequence. suffix: (B, T) int64, 0 for the prefix, 1 and up for suffixes, -1 for
    padding. previous: (B, T) int64, the column of the token before; any column for a sequence's first token.
    """

    prefix: int
    position: Tensor
    suffix: Tensor
    previous: Tensor
    _masks: dict[int, Tensor] = field(default_factory=dict, init=False)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None) -> Tensor:
        """`model.attention.attention` within each sequence; all (B, T, H, D). Padding sees padding only."""
        P = self.prefix
        prefix = attention(q[:, :P], k[:, :P], v[:, :P], window, scale)
        queries, keys, values = (x.transpose(1, 2) for x in (q[:, P:], k, v))
        suffixes = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.mask(window), scale=scale)
        return torch.cat([prefix, suffixes.transpose(1, 2)], dim=1)

    def mask(self, window: int) -> Tensor:
        """(B, 1, T - prefix, T) bool: which columns each suffix query sees; made once per window."""
        if window not in self._masks:
            query, key = self.position[:, self.prefix :, None], self.position[:, None, :]
            own, other = self.suffix[:, self.prefix :, None], self.suffix[:, None, :]
            seen = ((other == 0) & (own > 0) | (other == own)) & (key <= query) & (key >= query - window)
            self._masks[window] = seen.unsqueeze(1)
        return self._masks[window]

    def cos_sin(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables (1, T, 1, D / 2) of positions -> those of the columns, (B, T, 1, D / 2)."""
        return cos[0, self.position], sin[0, self.position]

    def previous_tokens(self, x: Tensor) -> Tensor:
        """(B, T, C) -> for each column the x of the token before it; zeros where there is none."""
        return x.take_along_dim(self.previous.unsqueeze(-1), dim=1) * (self.position > 0).unsqueeze(-1)
