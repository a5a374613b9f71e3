"""Attention in blocks against attention by definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import attention, block_mask
from tensors import Largest


def by_definition(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """One T x T mask: key s is seen by query t when t - window <= s <= t."""
    T = q.size(1)
    t = torch.arange(T)
    seen = (t[None, :] <= t[:, None]) & (t[None, :] >= t[:, None] - window)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def qkv(B: int, T: int, H: int, D: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(B, T, H, D, generator=generator, dtype=dtype, requires_grad=True) for _ in range(3)]


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 40),
    window=st.integers(1, 45),
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    scale=st.sampled_from([None, 0.7]),
)
def test_blocks_agree_with_the_definition(T: int, window: int, B: int, H: int, scale: float | None) -> None:
    inputs = qkv(B, T, H, 4)
    expected = by_definition(*inputs, window, scale or 0.5)
    actual = attention(*inputs, window, scale)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    direction = torch.randn(actual.shape, dtype=actual.dtype, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * direction).sum(), inputs)
    got = torch.autograd.grad((actual * direction).sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes(dtype: torch.dtype) -> None:
    inputs = [x.detach().to(dtype) for x in qkv(2, 300, 2, 32)]
    expected = by_definition(*(x.double() for x in inputs), 128, 1 / math.sqrt(32))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(attention(*inputs, 128).double(), expected, rtol=0, atol=tolerance)


def test_a_short_window_costs_no_square_mask() -> None:
    inputs = qkv(1, 2048, 1, 8, torch.float32)
    with Largest() as largest:
        attention(*inputs, 64).sum().backward()
    assert (
        largest.elements <= 2 * 2048 * 8
    )  # keys with their predecessors; the mask is 64 x 128, a square one would be 2048 x 2048


def test_the_mask_of_a_block() -> None:
    assert block_mask(2, torch.device("cpu")).int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
