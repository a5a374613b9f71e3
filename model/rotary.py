"""Rotary position embedding: tables of angles that grow with the sequence, and the turning of heads by them."""

from __future__ import annotations

import torch
from torch import Tensor


class Rotary:
    """cos and sin of position x frequency, made when first needed and longer when a longer sequence comes."""

    def __init__(self, head_dim: int, base: float, length: int) -> None:
        self.head_dim, self.base, self.length = head_dim, base, length
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def tables(self, T: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin: each (1, T, 1, head_dim / 2), on `like`'s device and in its dtype."""
        key = (like.device, like.dtype)
        if key not in self._tables or self._tables[key][0].size(1) < T:
            with torch.inference_mode(False):  # training may follow, with the same tables
                self._tables[key] = self._make(max(T, self.length), like.device, like.dtype)
        cos, sin = self._tables[key]
        return cos[:, :T], sin[:, :T]

    def _make(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        channel = torch.arange(0, self.head_dim, 2, dtype=wide, device=device)
        position = torch.arange(length, dtype=wide, device=device)
        angle = torch.outer(position, 1.0 / self.base ** (channel / self.head_dim))[None, :, None, :]
        return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of each head by minus the angle of their position; x: (B, T, H, D)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
