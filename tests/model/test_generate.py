"""Sampling from a model."""

from __future__ import annotations

import math

import pytest
import torch

from model.config import ConfigError, GPTConfig
from model.generate import ENDED, Decoder, Sampling, draw, generate
from model.gpt import GPT

SHORT, T = 4, 16  # the short window is 4 of 16


def random_model(generation: str) -> GPT:
    """Five layers of which two have a long window; every parameter random, so that nothing is without effect."""
    shape = {"width": 64, "head_dim": 32, "window_divisor": 4, "window_tile": 1}
    model = GPT(GPTConfig.for_depth(5, 50, T, generation, **shape))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model("head")


def continued(model: GPT, ids: list[int], tokens: int, sampling: Sampling) -> list[int]:
    return [token for (token,) in generate(model, [ids], tokens, sampling)]


@pytest.mark.parametrize("generation", ["feb", "head"])
def test_cached_logits_are_those_of_the_whole_sequence(generation: str) -> None:
    """Prompts shorter and longer than a window, then on until both windows are crossed, and the trained context."""
    model = random_model(generation)
    idx = torch.randint(50, (3, 4 * T), generator=torch.Generator().manual_seed(0))
    lengths = [1, 3 * SHORT, T + 2]
    decoder = Decoder(model, [row[:n].tolist() for row, n in zip(idx, lengths, strict=True)], most=4 * T)
    naive = model.logits(idx)
    for step in range(2 * T):
        for row, length in enumerate(lengths):
            expected = naive[row, length - 1 + step]
            assert (decoder.logits[row] - expected).abs().max() <= 1e-5 * expected.abs().max()
        decoder.append([idx[row, length + step].item() for row, length in enumerate(lengths)])


def test_the_cache_is_bounded_by_the_windows(model: GPT) -> None:
    decoder = Decoder(model, [[1, 2]], most=1000)
    assert [layer.size(3) for layer in decoder._cache._layers] == [SHORT + 1] * 3 + [T + 1] * 2


def test_temperature_0_takes_the_most_probable(model: GPT) -> None:
    prompt = [3, 1, 4]
    out = continued(model, prompt, 6, Sampling(temperature=0))
    for n, token in enumerate(out):
        assert token == model.logits(torch.tensor([[*prompt, *out[:n]]]))[0, -1].argmax()
    assert out == continued(model, prompt, 6, Sampling(temperature=0, seed=1))


def test_a_sequence_becomes_the_same_whatever_stands_beside_it(model: GPT) -> None:
    prompts = [[7], [3, 1, 4, 1, 5, 9], [2, 6]]
    sampling = Sampling(temperature=2.0, top_k=20, seed=3)
    together = list(zip(*generate(model, prompts, 9, sampling), strict=True))
    first_alone = continued(model, prompts[0], 9, sampling)
    two = list(zip(*generate(model, prompts[:2], 9, sampling), strict=True))
    assert list(together[0]) == first_alone and together[:2] == two
    assert first_alone != continued(model, prompts[0], 9, Sampling(temperature=2.0, top_k=20, seed=4))
    assert together[0] != next(zip(*generate(model, [[7], [7]], 9, Sampling(seed=5)), strict=True))


def test_a_sequence_ends_at_a_stop_token_and_the_others_go_on(model: GPT) -> None:
    free = list(zip(*generate(model, [[7], [3, 1]], 12, Sampling(temperature=0)), strict=True))
    stop = free[0][4]
    at = [row.index(stop) if stop in row else None for row in free]
    stopped = list(zip(*generate(model, [[7], [3, 1]], 12, Sampling(temperature=0), stop={stop}), strict=True))
    for row, whole, end in zip(stopped, free, at, strict=True):
        assert row == whole[: len(row)] if end is None else row[:end] == whole[:end] and set(row[end:]) == {ENDED}


def test_samples_follow_the_probabilities() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
    generator = Sampling().generator(0)
    drawn = torch.bincount(torch.tensor([draw(p, generator) for _ in range(2000)]), minlength=6) / 2000
    assert (drawn - p).abs().max() < 0.04 and drawn[[0, 2, 5]].sum() == 0


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"min_p": 0.3}, [0, 1]),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.21}, [0, 1]),
        ({"temperature": 0}, [0]),
        ({"top_k": 99, "min_p": 1.0}, [0]),
    ],
)
def test_which_tokens_pass(options: dict[str, float], left: list[int]) -> None:
    logits = torch.tensor([[math.log(p) for p in (0.5, 0.3, 0.1, 0.1)]])
    p = Sampling(**options).probabilities(logits)[0]
    assert p.nonzero().flatten().tolist() == left


def test_sampling_leaves_the_global_generator_alone(model: GPT) -> None:
    before = torch.random.get_rng_state()
    continued(model, [1], 3, Sampling())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -0.5}, "temperature is -0.5: it must not be negative"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0: it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0: it must be above 0"),
        ({"min_p": 1.5}, "min_p is 1.5: it must be between 0 and 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Sampling(**options)


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_nothing_to_continue_is_refused(model: GPT, prompts: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="nothing to continue"):
        list(generate(model, prompts, 3, Sampling()))


def test_a_temperature_near_zero_is_zero() -> None:
    logits = torch.tensor([[1.0, 14.9, 3.0]])
    cold, coldest = (Sampling(temperature).probabilities(logits) for temperature in (1e-320, 0.0))
    assert torch.equal(cold, coldest)
