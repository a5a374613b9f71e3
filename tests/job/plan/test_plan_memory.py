"""Memory before there is a GPU: static parts equal the optimizer's own, the rest agrees with what is known to fit."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from job.plan.memory import (
    ACTIVATION,
    checkpoint_bytes,
    host_memory,
    largest_batch,
    parameter_bytes,
    saved_slices,
    state_bytes,
    step_memory,
)
from model import fp8
from model.attention import attention
from model.config import LEVERS, SAME_NUMBERS, GPTConfig
from model.gpt import GPT
from model.optimizer import Optimizer, build_shards
from model.scaling import RULES, derive
from model.shards import Options

CARD = 85.5e9


def config(depth: int, generation: str = "head", vocab_size: int = 32768) -> GPTConfig:
    return GPTConfig.for_depth(depth, vocab_size, 2048, generation)


def built(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config, torch.bfloat16)


def size(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@settings(max_examples=12)
@given(st.integers(1, 9), st.sampled_from(["feb", "head"]), st.integers(300, 5000), st.integers(1, 8))
def test_static_parts_are_those_of_the_optimizer(depth: int, generation: str, vocab_size: int, ranks: int) -> None:
    c = GPTConfig.for_depth(depth, vocab_size, 64, generation)
    model = built(c)
    specs = derive(c, RULES[generation], steps=1, batch_tokens=64).specs
    assert parameter_bytes(c) == size(list(model.parameters()))
    everything = size(list(model.parameters()))
    for rank in range(ranks):
        alone = SimpleNamespace(world=ranks, rank=rank)
        shards = build_shards(model.groups(), specs, alone, Options(torch.bfloat16, None, 1 << 20))
        held = size([s.tensor for shard in shards for s in shard.state()])
        assert state_bytes(c, ranks, rank) == held
        saved = [s.tensor for shard in shards if rank == 0 or not shard.replicated for s in shard.state()]
        everything += size(saved)
        slices = [*saved, *(s.tensor for shard in shards for s in shard.weights())]
        assert sorted(saved_slices(c, ranks, rank)) == sorted(t.numel() * t.element_size() for t in slices)
    assert checkpoint_bytes(c, ranks) == everything


def test_pinned_blocks_are_powers_of_two_and_the_warm_up_copies_what_each_rank_holds() -> None:
    c = config(24)
    one, eight = host_memory(c, 1), host_memory(c, 8)
    assert one.rehearsal == checkpoint_bytes(c, 1) and eight.rehearsal > 8 * parameter_bytes(c)
    for memory, ranks in ((one, 1), (eight, 8)):
        blocks = [1 << math.ceil(math.log2(n)) for rank in range(ranks) for n in saved_slices(c, ranks, rank)]
        assert memory.pinned == sum(blocks) and memory.pinned > 1.3 * checkpoint_bytes(c, ranks)


def test_alone_a_rank_holds_all_state() -> None:
    c = config(12)
    optimizer = Optimizer(built(c).groups(), derive(c, RULES["head"]).specs)
    assert state_bytes(c, 1, 0) == size([s.tensor for s in optimizer.state_slices() if s.name != "optimizer/steps"])


@pytest.mark.parametrize(("depth", "published"), [(22, 7.9e9), (24, 9.9e9), (26, 12.2e9)])
def test_static_parts_as_published(depth: int, published: float) -> None:
    assert step_memory(config(depth), 16, 8, fp8=True).static == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("depth", "rows", "plain_loss", "fits"),
    [
        (24, 16, True, True),
        (24, 32, True, False),
        (26, 16, True, True),
        (26, 32, True, False),
        (22, 32, False, True),
        (24, 16, False, True),
        (24, 32, False, False),
        (26, 32, False, False),
    ],
)
def test_what_is_known_to_fit(depth: int, rows: int, plain_loss: bool, fits: bool) -> None:
    assert step_memory(config(depth), rows, 8, fp8=True, plain_loss=plain_loss).fits(CARD) == fits


def test_a_larger_vocabulary_fits_in_chunks_only() -> None:
    c = config(22, vocab_size=49152)
    assert step_memory(c, 32, 8, fp8=True).fits(CARD)
    assert not step_memory(c, 32, 8, fp8=True, plain_loss=True).fits(CARD)


def test_a_d12_in_bf16_as_measured() -> None:
    assert step_memory(config(12, "feb"), 32, 8, fp8=False, plain_loss=True).total == pytest.approx(34e9, rel=0.25)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 64), st.booleans())
def test_more_rows_never_take_less(depth: int, ranks: int, rows: int, fp8: bool) -> None:
    less, more = (step_memory(config(depth), r, ranks, fp8) for r in (rows, rows + 1))
    assert less.static == more.static and less.total <= more.total


def test_the_largest_batch_divides_and_fits() -> None:
    assert largest_batch(config(24), 512, 8, True, CARD).rows == 16
    assert largest_batch(config(22), 512, 8, True, CARD).rows == 32
    assert largest_batch(config(24), 24 * 8, 8, True, CARD).rows == 24
    assert largest_batch(config(12), 256, 8, True, CARD).rows == 32  # no more than there are
    assert largest_batch(config(40), 512, 8, True, 24e9) is None


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_what_the_compiler_keeps_of_a_block_is_what_the_plan_counts(precision: str) -> None:
    """Counted on a small block whose windows are whole, as the GPU's kernel sees them; copies of weights are counted
    elsewhere."""
    torch._dynamo.reset()  # other tests' compiled blocks count against the limit of this one's
    rows, T, d = 3, 256, 256
    model = GPT(GPTConfig.for_depth(4, 512, T, width=d, window_pattern="L"), torch.bfloat16)
    model.init_weights(0)
    if precision == "fp8":
        fp8.apply(model, rows * T)
    weights = {d * d, 4 * d * d}
    kept = []
    for number in (1, 2):  # with a value embedding, and without
        seen: dict[int, torch.Tensor] = {}
        x, x0, value_embed = (torch.randn(rows, T, d).bfloat16().requires_grad_() for _ in range(3))
        block = model.blocks[number]
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=seen: seen.setdefault(t.data_ptr(), t), lambda t: t
        ):
            mix = model.resid_lambdas[number], model.x0_lambdas[number]
            block(x, x0, mix, value_embed if number == 1 else None, model._rotary.tables(T, x), attention)
        shared = {x0.data_ptr(), *(p.data_ptr() for p in model.parameters())}
        kept.append(
            size([t for at, t in seen.items() if at not in shared and t.numel() not in weights]) / (rows * T * d)
        )
    print(f"{precision}: {kept[0]:.1f} and {kept[1]:.1f} bytes a token and channel")
    assert sum(kept) / 2 == pytest.approx(ACTIVATION[precision], rel=0.1)


def test_levers_keep_transposed_weights_and_other_activations() -> None:
    c = config(24)
    plain, fast, all_of_them, bf16 = (
        step_memory(c, 16, 8, fp8, levers)
        for levers, fp8 in (((), True), (SAME_NUMBERS, True), (LEVERS, True), (LEVERS, False))
    )
    assert fast.weight_copies - plain.weight_copies == 12 * c.width**2 * c.depth
    channels = 16 * 2048 * c.width * c.depth
    assert (fast.activations - plain.activations) / channels == pytest.approx(-0.9)
    assert (all_of_them.activations - plain.activations) / channels == pytest.approx(-4.9)
    assert bf16 == step_memory(c, 16, 8, fp8=False)
