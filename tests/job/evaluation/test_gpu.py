"""Scoring on a GPU, as far as it can be known without one: shapes, dtypes, devices, memory, and that nothing waits."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from job.evaluation import score, stage
from job.evaluation.batches import plan_batches, tensors_of
from job.evaluation.prompts import Item
from job.machine import host
from job.recipe.config import resolve
from model.config import GPTConfig
from model.gpt import GPT

VOCAB = 32_768
WAITS = ("aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::equal")
BF16, FP32 = 2, 4


class OnDevice(TorchDispatchMode):
    """Every tensor is on the device (meta stands for it) and none is asked for a number; `largest` tensor in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert name not in WAITS, f"{name} waits for the GPU"
        self.kernels += name == "torch_attn::_varlen_attn"
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                assert x.device.type == "meta" or x.dim() == 0, f"{name} made a tensor on {x.device}"
                self.largest = max(self.largest, x.numel() * x.element_size())
        return out


def items_of_length(rng: np.random.Generator, count: int, options: int, shared: int) -> list[Item]:
    prefixes = [rng.integers(1, VOCAB, shared) for _ in range(count)]
    rows = [[np.concatenate([prefix, rng.integers(1, VOCAB, 5 + r)]) for r in range(options)] for prefix in prefixes]
    return [Item.of_rows(i, 0, texts, [shared] * options) for i, texts in enumerate(rows)]


@pytest.mark.parametrize(
    ("options", "shared", "sharing"), [(4, 2700, True), (1, 2700, False), (2, 2, False), (4, 90, True)]
)
def test_a_d24_scores_long_and_short_items_on_its_device_without_waiting(options, shared, sharing):
    with torch.device("meta"):
        model = GPT(GPTConfig.for_depth(24, VOCAB, 2048), compute_dtype=torch.bfloat16)
    model.freeze()
    items = items_of_length(np.random.default_rng(1), 40, options, shared)
    (batch, *_) = plan_batches(items, score.GPU_TOKEN_BUDGET, share_prefix=True)
    assert (batch.prefix > 0) == sharing and batch.cost <= score.GPU_TOKEN_BUDGET
    tensors = tensors_of([items[i] for i in batch.items], batch, "meta")
    with OnDevice() as seen:
        found = score.Forward(model)(*tensors)
    assert [x.shape for x in found] == [tensors[1].shape] * 3 and found[0].dtype == torch.float32
    assert seen.kernels == 24
    assert seen.largest <= max(BF16 * 4 * 1536 * batch.cost, FP32 * VOCAB * score.HEAD_ROWS, BF16 * VOCAB * 1536)


def test_frozen_weights_are_in_the_compute_dtype_and_answer_alike():
    config = GPTConfig(depth=3, vocab_size=300, seq_len=32, width=32, head_dim=16, window_tile=8)
    model, ids = GPT(config, compute_dtype=torch.bfloat16), torch.arange(80).view(2, 40)
    model.init_weights(2)
    before = model.logits(ids)
    model.freeze()
    assert torch.equal(model.logits(ids), before)
    assert {p.dtype for name, p in model.named_parameters() if p.dim() == 2} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


def test_the_stage_puts_the_model_on_its_device_in_bf16_and_names_the_kernel(monkeypatch):
    """A model of a checkpoint that another machine's GPU would take; the meta device is what the mock has for one."""
    config = GPTConfig(depth=2, vocab_size=300, seq_len=32, width=32, head_dim=16, window_tile=8)
    monkeypatch.setattr(stage.checkpoint, "load_weights", lambda model, sealed: None)
    assert stage.load(config, None, torch.device("meta"), "fp32").wte.weight.device.type == "meta"
    assert host.compute_dtype("auto", gpu=True) == host.compute_dtype("bf16") == torch.bfloat16
    assert host.compute_dtype("fp32", gpu=True) == torch.float32
    recipe = resolve("smoke", {}, ["train.fp8=true"])
    asked = []

    def kernels(recipe, machine, *, prove_on):
        asked.append(recipe.train.fp8)
        return {"attention": "attention: FlashAttention 3 (unversioned)", "fp8": "off"}

    monkeypatch.setattr(stage, "choose_kernels", kernels)
    monkeypatch.setattr(stage, "machine_of", lambda device: None)
    assert stage.choose_backend(torch.device("cpu"), recipe) == "cpu"
    gpu = types.SimpleNamespace(type="cuda")
    assert stage.choose_backend(gpu, recipe) == "cuda, attention: FlashAttention 3 (unversioned)"
    assert asked == [False, False], "an evaluation needs no fp8"
