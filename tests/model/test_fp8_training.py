"""A d4 trained in fp8 by torchao's CPU path ends where bf16 ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import fp8
from model.gpt import GPT, GPTConfig
from model.optimizer import Optimizer
from model.scaling import RULES, derive
from model.schedule import Schedule

V, T, B, STEPS = 128, 64, 4, 200
LR_SCALE = 2.0  # of the rule, which is careful with batches this small
CONFIG = GPTConfig.for_depth(4, V, T, "feb", width=128, head_dim=64)


def text(rows: int, seed: int) -> Tensor:
    """(rows, T + 1) of a language in which each word has four successors: 1.39 nats a token for who knows it."""
    successors = torch.randint(0, V, (V, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(0, V, (rows,), generator=generator)]
    for _ in range(T):
        words.append(successors[words[-1], torch.randint(0, 4, (rows,), generator=generator)])
    return torch.stack(words, dim=1)


def final_loss(seed: int, in_fp8: bool) -> float:
    """Nats a token on held-out rows after STEPS steps with the schedule running down to its end."""
    model = GPT(CONFIG, compute_dtype=torch.bfloat16)
    model.init_weights(seed)
    if in_fp8:
        assert len(fp8.apply(model, B * T, "feb")) == 6 * 4 + 1
    rules = RULES["feb"]
    slower = rules.changed(lrs={name: LR_SCALE * group.lr for name, group in rules.groups.items()})
    specs = derive(CONFIG, slower, ratio=None, steps=STEPS, batch_tokens=B * T).specs
    optimizer, schedule = Optimizer(model.groups(), specs), Schedule.for_generation(STEPS, "feb")
    for step in range(STEPS):
        rows = text(B, seed=1000 * seed + step)
        model.loss(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step(schedule.at(step))
    held_out = text(64, seed=999_999)
    return model.token_losses(held_out[:, :-1], held_out[:, 1:])[0].mean().item()


@pytest.mark.slow
def test_200_steps_in_fp8_end_within_a_hundredth_of_a_nat_of_bf16() -> None:
    losses = {in_fp8: [final_loss(seed, in_fp8) for seed in (1, 2, 3)] for in_fp8 in (False, True)}
    bf16, eight = (sum(losses[in_fp8]) / 3 for in_fp8 in (False, True))
    assert bf16 < 4.0, "a model that has learned something"
    assert abs(eight - bf16) < 0.01, losses
