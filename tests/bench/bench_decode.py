"""Tokens per second of generation on this CPU: a d4 after 512 tokens, with the cache against all of them each time.

Both are greedy and in fp32; the configurations take turns, and the best of their rounds counts.
"""

from __future__ import annotations

import time

import torch

from model.config import GPTConfig
from model.generate import Decoder
from model.gpt import GPT

V, T, ROUNDS = 8192, 512, 2
CACHED, NAIVE = 24, 1  # tokens a round


def cached(model: GPT, idx: torch.Tensor) -> float:
    """Seconds a token, the prompt's pass not counted."""
    decoder = Decoder(model, idx.tolist(), T + CACHED + 1)
    began = time.perf_counter()
    for _ in range(CACHED):
        decoder.append(decoder.logits.argmax(dim=-1).tolist())
    return (time.perf_counter() - began) / CACHED


@torch.inference_mode()
def naive(model: GPT, idx: torch.Tensor) -> float:
    began = time.perf_counter()
    for _ in range(NAIVE):
        token = model.lm_head(model.hidden(idx)[:, -1]).argmax(dim=-1, keepdim=True)
        idx = torch.cat([idx, token], dim=1)
    return (time.perf_counter() - began) / NAIVE


def test_decode() -> None:
    model = GPT(GPTConfig.for_depth(4, V, T))
    model.init_weights(0)
    model.freeze()
    print(f"\n{'batch':>5} {'cached, tokens/s':>17} {'naive, tokens/s':>16} {'times':>6}")
    for batch in (1, 16):
        idx = torch.randint(V, (batch, T), generator=torch.Generator().manual_seed(0))
        rounds = [(cached(model, idx), naive(model, idx)) for _ in range(ROUNDS)]
        fast, slow = (batch / min(seconds) for seconds in zip(*rounds, strict=True))
        print(f"{batch:>5} {fast:>17,.0f} {slow:>16,.0f} {fast / slow:>6.1f}")
