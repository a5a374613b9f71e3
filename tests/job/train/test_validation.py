from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from job.errors import DivergedError
from job.reporter import Reporter
from job.train.ranks import Ranks
from job.train.validation import bits_per_byte

V, T = 64, 12


class OneOf(Ranks):
    """Rank `rank` of `size`, whose peers' values are already known."""

    def __init__(self, rank: int, size: int, everyone: list | None = None) -> None:
        self.rank, self.size, self.everyone = rank, size, everyone

    def all_gather(self, value):
        if self.everyone is None:
            raise Mine(value)
        return self.everyone


class Mine(Exception):
    """What one rank had to say."""


class Table:
    """A bigram table as a model: the loss of a target is that of its row of logits, whatever stands around it."""

    def __init__(self) -> None:
        self.logits = torch.randn(V, V, generator=torch.Generator().manual_seed(2)) * 3

    def token_losses(self, idx, targets):
        logp = self.logits.log_softmax(-1)[idx]
        return -logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), logp.argmax(-1)


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(1).integers(0, V, (37, T + 1)).astype(np.uint16)


@pytest.fixture
def token_bytes() -> np.ndarray:
    bytes_of = np.random.default_rng(5).integers(1, 9, V).astype(np.int32)
    bytes_of[-9:] = 0
    return bytes_of


def measure(rows, token_bytes, ranks=None, block_rows=5):
    return bits_per_byte(Table(), rows, token_bytes, block_rows=block_rows, ranks=ranks or Ranks(), reporter=Reporter())


def test_it_is_nats_over_ln_2_bytes_of_the_targets_that_are_text(rows, token_bytes):
    logp = Table().logits.double().log_softmax(-1).numpy()
    nats = count = 0.0
    for row in rows:
        for previous, target in itertools.pairwise(row):
            if token_bytes[target]:
                nats -= logp[previous, target]
                count += token_bytes[target]
    found = measure(rows, token_bytes)
    assert found["bytes"] == count and found["nats"] == pytest.approx(nats, rel=1e-6)
    assert found["bpb"] == pytest.approx(nats / math.log(2) / count, rel=1e-6)
    assert (found["tokens"], found["val_rows"]) == (37 * T, 37)


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16])
def test_any_number_of_ranks_gives_the_same_number_to_the_last_bit(rows, token_bytes, size):
    everyone = []
    for rank in range(size):
        with pytest.raises(Mine) as said:
            measure(rows, token_bytes, OneOf(rank, size))
        everyone.append(said.value.args[0])
    for rank in range(size):
        assert measure(rows, token_bytes, OneOf(rank, size, everyone)) == measure(rows, token_bytes)


def test_the_size_of_a_block_changes_rounding_only(rows, token_bytes):
    one, many = measure(rows, token_bytes, block_rows=1), measure(rows, token_bytes, block_rows=64)
    assert one["bytes"] == many["bytes"] and one["bpb"] == pytest.approx(many["bpb"], rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_its_rows(rows, token_bytes, value):
    model = Table()
    rows[:, :] %= V - 1
    rows[22, 3], model.logits[V - 1] = V - 1, value
    with pytest.raises(DivergedError, match="validation, rows 20 to 24: the model's loss is NaN or infinite"):
        bits_per_byte(model, rows, token_bytes, block_rows=5, ranks=Ranks(), reporter=Reporter())
