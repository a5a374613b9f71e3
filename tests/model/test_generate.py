"""Sampling from a model."""

from __future__ import annotations

import pytest
import torch

from model.config import ConfigError, GPTConfig
from model.generate import generate
from model.gpt import GPT


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(GPTConfig.for_depth(2, 50, 8))
    model.init_weights(0)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model


def test_temperature_0_takes_the_most_probable(model: GPT) -> None:
    out = generate(model, [3, 1, 4], 9, temperature=0)  # longer than the context that the model was made for
    assert out[:3] == [3, 1, 4] and len(out) == 12
    for t in range(3, 12):
        assert out[t] == model.logits(torch.tensor([out[:t]]))[0, -1].argmax()
    assert out == generate(model, [3, 1, 4], 9, temperature=0, seed=1)


def test_equal_seeds_give_equal_samples(model: GPT) -> None:
    first, again, other = (generate(model, [7], 20, temperature=2.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert all(0 <= token < 50 for token in first + other)


def test_samples_follow_the_probabilities(model: GPT) -> None:
    probabilities = (model.logits(torch.tensor([[5]]))[0, -1] / 3.0).softmax(-1)
    drawn = torch.tensor([generate(model, [5], 1, temperature=3.0, seed=seed)[1] for seed in range(300)])
    frequencies = torch.bincount(drawn, minlength=50) / 300
    assert (frequencies - probabilities).abs().max() < 0.1


def test_sampling_leaves_the_global_generator_alone(model: GPT) -> None:
    before = torch.random.get_rng_state()
    generate(model, [1], 3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bad_requests_are_refused(model: GPT) -> None:
    with pytest.raises(ConfigError, match="nothing to continue"):
        generate(model, [], 3)
    with pytest.raises(ConfigError, match=r"temperature is -0.5"):
        generate(model, [1], 3, temperature=-0.5)
