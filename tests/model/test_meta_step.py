"""Whole steps of the published sizes with the GPU's choices, on the meta device: every operation legal by CUDA's rules.

Meta tensors have shapes, strides and dtypes, and no numbers. torch's meta functions apply the rules of the CUDA
kernels where they have them (`_scaled_mm`: sixteen, rows times columns); the attention kernel's are checked here.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.float8.float8_training_tensor import Float8TrainingTensor

import model.loss
from model import fp8
from model.config import GPTConfig
from model.gpt import GPT
from model.hyper import StepHyper
from model.optimizer import Optimizer
from model.scaling import RULES, derive

VOCAB, T = 32_768, 2048


class CudaRules(TorchDispatchMode):
    """Counts the operations; the attention kernel's arguments are checked; the largest fp32 tensor of a micro-step is
    kept."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.windows: list[tuple[int, int]] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, Float8TrainingTensor) for kind in types):
            return NotImplemented  # it takes itself apart: the operations on its numbers and scales come by later
        name = func.name()
        self.calls[name] += 1
        if name == "torch_attn::_varlen_attn":
            self.check_attention(*args)
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                assert x.device.type == "meta" or x.dim() == 0, f"{name} made a tensor on {x.device}"
                self.largest = max(self.largest, x.numel())
        return out

    def check_attention(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor, *rest: object
    ) -> None:
        for x in (q, k, v):
            assert x.dtype == torch.bfloat16 and x.stride(-1) == 1 and x.dim() == 3
            assert x.size(-1) % 8 == 0 and x.size(-1) <= 256 and x.shape == q.shape
        assert starts.dtype == key_starts.dtype == torch.int32 and starts.is_contiguous()
        self.windows.append((rest[2], tuple(rest[4])))


EVERY = [(depth, rows, generation) for depth in (22, 24, 26) for rows in (8, 16, 32) for generation in ("head", "feb")]
QUICK = (24, 8, "head")
PAIRWISE = [(22, 8, "head"), (22, 16, "feb"), (24, 32, "feb"), (26, 32, "head"), (26, 8, "feb")]
"""With QUICK: each depth in both generations, and each number of rows; rows only decide how many chunks the loss
has."""


def case(depth: int, rows: int, generation: str) -> object:
    chosen = (depth, rows, generation)
    slow = [] if chosen == QUICK else [pytest.mark.slow]
    return pytest.param(*chosen, marks=slow if chosen in (QUICK, *PAIRWISE) else [*slow, pytest.mark.by_hand])


@pytest.mark.parametrize(("depth", "rows", "generation"), [case(*each) for each in EVERY])
def test_a_step_is_legal(monkeypatch: pytest.MonkeyPatch, depth: int, rows: int, generation: str) -> None:
    monkeypatch.setattr(model.loss, "BLOCK_ELEMENTS", model.loss.LOSS_CHUNK_ELEMENTS)  # a chunk is one, as on a GPU
    config = GPTConfig.for_depth(depth, VOCAB, T, generation)
    with torch.device("meta"):
        gpt = GPT(config, compute_dtype=torch.bfloat16)
        ids = torch.empty(rows, T, dtype=torch.int64)
    in_fp8 = len(fp8.apply(gpt, rows * T, generation))
    with CudaRules() as seen:
        gpt.loss(ids, ids).backward()
    assert seen.calls["torch_attn::_varlen_attn"] == seen.calls["torch_attn::_varlen_attn_backward"] == depth
    full, short = (True, (-1, 0)), (False, (config.windows[0], 0))
    assert seen.windows == [short if window < T - 1 else full for window in config.windows]
    chunks = len(model.loss._chunks(torch.empty(rows * T, 0, device="meta"), gpt.head.weight))
    assert seen.calls["aten::_scaled_mm"] == 3 * (in_fp8 - 1) + 3 * chunks
    left_in_bf16 = len(fp8.layers(gpt, generation)[1]) if generation == "head" else len(config.value_embed_layers)
    assert seen.calls["aten::mm"] + seen.calls["aten::bmm"] <= 3 * left_in_bf16
    assert seen.largest <= max(model.loss.LOSS_CHUNK_ELEMENTS, 4 * config.width * rows * T, VOCAB * config.width)
    for name, parameter in gpt.named_parameters():
        assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == parameter.dtype, name


def test_the_update_of_a_d24_is_legal() -> None:
    config = GPTConfig.for_depth(24, VOCAB, T)
    with torch.device("meta"):
        gpt = GPT(config, compute_dtype=torch.bfloat16)
    specs = derive(config, RULES["head"], ratio=8.0, steps=None, batch_tokens=1 << 20).specs
    optimizer = Optimizer(gpt.groups(), specs)
    for parameter in gpt.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step(StepHyper())
    assert optimizer.nonfinite.device.type == "meta" and len(optimizer.nonfinite) == len(optimizer.flagged)
