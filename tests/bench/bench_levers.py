"""What an H100's step moves and costs, counted without one (tests/model/hopper_costs.py), what each lever
(`model/fp8_passes.py`) leaves out of it (hopper_levers.py), and what those that change numbers do to a small model's
loss.

The loss: a d2 in fp8 by torchao's CPU path, T 256, 200 steps of 2,048 tokens of Python's documentation on two gloo
ranks, each arm with the weights, rows and seeds of the arm without levers; nats a token of held-out rows. Two runs
that differ by rounding drift apart by as much as the standard error says. 24 runs, about 130 CPU seconds each.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from helpers import load, on_ranks
from model import fp8
from model.config import LEVERS, GPTConfig
from model.gpt import GPT
from model.optimizer import Optimizer
from model.scaling import RULES, derive
from model.schedule import Schedule

TESTS = Path(__file__).resolve().parents[1]
SEEDS, STEPS, TOKENS, T, VOCAB = (0, 1, 2), 200, 2048, 256, 512
TRANSPORT = "bf16 transport"
ALONE = ("bounded_scales", "joint_qkv", "relu_root", "norm_output", "wide_gradients")
"""which change numbers"""
ARMS = {"none": (), "frontier": LEVERS, **{lever: ("shared_input", lever) for lever in ALONE}, TRANSPORT: ()}


@pytest.mark.parametrize("command", [("hopper_costs.py", "frontier"), ("hopper_levers.py",)], ids=" ".join)
def test_counts(command: tuple[str, ...]) -> None:
    script, *presets = command
    assert subprocess.run([sys.executable, TESTS / "model" / script, *presets], check=False).returncode == 0


def held_out_loss(rank: int, world: int, arm: str, seed: int, rows: np.ndarray, held_out: np.ndarray) -> float:
    """Nats a token after training on `rows` (n, T + 1) in their order; of rank 0."""
    torch.set_num_threads(1)
    with load(TESTS / "model" / "test_fp8_training.py").fast_products():
        config = GPTConfig.for_depth(2, VOCAB, T)
        model = GPT(config, torch.bfloat16)
        model.init_weights(seed)
        fp8.apply(model, TOKENS // world, levers=ARMS[arm])
        specs = derive(config, RULES["head"], ratio=None, steps=STEPS, batch_tokens=TOKENS).specs
        transport = torch.bfloat16 if arm in (TRANSPORT, "frontier") else None
        optimizer = Optimizer(
            model.groups(), specs, dist.group.WORLD, polar_dtype=torch.float32, transport_dtype=transport
        )
        schedule = Schedule.for_generation(STEPS, "head")
        for step, block in enumerate(torch.from_numpy(rows.astype(np.int64)).split(TOKENS // T)):
            mine = block.chunk(world)[rank]
            optimizer.begin_overlap()
            model.loss(mine[:, :-1], mine[:, 1:]).backward()
            optimizer.step(schedule.at(step))
        if rank:
            return 0.0
        scored = torch.from_numpy(held_out.astype(np.int64))
        return model.token_losses(scored[:, :-1], scored[:, 1:])[0].mean().item()


def test_losses(tmp_path: Path) -> None:
    texts = load(TESTS / "bench" / "bench_row_order.py")
    shape = dataclasses.replace(texts.SMALL, vocab_size=VOCAB, steps=STEPS)
    text = texts.embedded()
    packer = texts.Packer(text, texts.tokenizer_of(text, VOCAB), shape)
    held_out, losses = packer.validation_rows()["uniform"], {arm: [] for arm in ARMS}
    for arm, seed in itertools.product(ARMS, SEEDS):
        folder = tmp_path / f"{arm}-{seed}"
        folder.mkdir()
        rows = packer.train_rows("shard", seed)
        losses[arm] += on_ranks(2, folder, held_out_loss, arm, seed, rows, held_out, seconds=3600)[:1]
        print(f"{arm}, seed {seed}: {losses[arm][-1]:.4f}", flush=True)
    print("\n| lever | nats more than without, by seed | mean | standard error |\n|---|---|---:|---:|")
    for arm in list(ARMS)[1:]:
        found = [with_it - without for with_it, without in zip(losses[arm], losses["none"], strict=True)]
        error = statistics.stdev(found) / len(found) ** 0.5
        print(f"| {arm} | {', '.join(f'{x:+.4f}' for x in found)} | {statistics.mean(found):+.4f} | {error:.4f} |")
