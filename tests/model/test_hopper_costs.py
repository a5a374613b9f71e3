"""What hopper_costs.py makes of operations: bytes by what they read and write, FLOPs of products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers import load

HERE = Path(__file__).parent


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(HERE))
    return load(HERE / "hopper_costs.py")


def moved(costs: ModuleType, function: Callable[[], object]) -> dict[str, int]:
    seen: dict = {}
    with costs.watching(seen):
        function()
    return {name: sum(kernel.bytes for kernel in kernels) for name, kernels in seen.items()}


def test_what_is_not_compiled_counts_what_it_reads_and_writes(costs: ModuleType) -> None:
    x, y, table = torch.ones(4, 8), torch.ones(4, 8), torch.ones(100, 8)
    row, ids = torch.ones(8), torch.zeros(5, dtype=torch.int64)
    assert moved(costs, lambda: x.add_(y)) == {"add_": 3 * 128}
    assert moved(costs, lambda: x.copy_(y)) == {"copy_": 2 * 128}
    assert moved(costs, lambda: x.t()[1:].detach()) == {}
    assert moved(costs, lambda: x.mul(row.expand(4, 8))) == {"mul": 2 * 128 + 32}
    assert moved(costs, lambda: torch.nn.functional.embedding(ids, table)) == {"embedding": 2 * 160 + 40}


def test_flops_of_products_and_of_attention(costs: ModuleType) -> None:
    seen: dict = {}
    with costs.watching(seen):
        torch.ones(4, 8) @ torch.ones(8, 16)
    assert seen["mm"][0].flops == {"bf16": 2 * 4 * 8 * 16}
    q = torch.empty(2048, 3, 64, device="meta")

    def flops(name: str, window: int) -> int:
        return costs._flops(name, (q, q, [window, 0]), {}, None)["attention"]

    pairs = sum(min(513, i + 1) for i in range(2048))
    assert flops("torch_attn._varlen_attn", 512) == 4 * pairs * 3 * 64
    assert flops("torch_attn._varlen_attn_backward", 512) == 10 * pairs * 3 * 64
    assert flops("torch_attn._varlen_attn", -1) == 4 * 2048 * 2049 // 2 * 3 * 64
