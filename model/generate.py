"""Sampling, plainly: the whole prefix goes through the model for every new token. Fine for a few samples of a few dozen
tokens."""

from __future__ import annotations

import torch

from model.config import ConfigError
from model.gpt import GPT


@torch.inference_mode()
def generate(model: GPT, ids: list[int], max_new_tokens: int, temperature: float = 1.0, seed: int = 0) -> list[int]:
    """`ids` continued by `max_new_tokens` sampled tokens; the prefix is included in what is returned.

    temperature 0 takes the most probable token each time; above 0, equal seeds give equal samples on equal hardware.
    """
    if not ids:
        raise ConfigError("nothing to continue: give at least one token, the one that begins a document")
    if temperature < 0:
        raise ConfigError(f"temperature is {temperature}: it must not be negative")
    device = model.head.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    out = torch.tensor([ids], device=device)
    for _ in range(max_new_tokens):
        logits = model.lm_head(model.hidden(out)[:, -1])
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            token = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
        out = torch.cat([out, token], dim=1)
    return out[0].tolist()
