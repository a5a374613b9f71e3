"""Weights that differ between ranks are noticed before a checkpoint is sealed, and the odd rank is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import on_ranks
from job.errors import OddReplica
from job.train import loop
from job.train.replicas import check_replicas, fingerprint


def small(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)).to(dtype)


def flip(model: torch.nn.Module, place: int, bit: int) -> None:
    """One bit of one element of the weights, counted over all parameters."""
    for parameter in model.parameters():
        if place < parameter.numel():
            integers = {2: torch.int16, 4: torch.int32}[parameter.element_size()]
            flat = parameter.data.view(integers).view(-1)
            flat[place] ^= torch.tensor(
                1 << bit if bit < 8 * parameter.element_size() - 1 else -1 << bit, dtype=integers
            )
            return
        place -= parameter.numel()


@given(st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 211), st.integers(0, 31))
def test_any_one_bit_changes_the_fingerprint(dtype: torch.dtype, place: int, bit: int) -> None:
    model = small(dtype)
    before = fingerprint(model).item()
    flip(model, place, bit % (8 * dtype.itemsize))
    assert fingerprint(model).item() != before
    flip(model, place, bit % (8 * dtype.itemsize))
    assert fingerprint(model).item() == before


def test_an_owners_exact_weights_are_those_that_were_sent_rounded() -> None:
    exact, sent = small(), small()
    for parameter in sent.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert fingerprint(exact) != fingerprint(sent)
    assert fingerprint(exact, torch.bfloat16) == fingerprint(sent, torch.bfloat16)
    flip(sent, 100, 20)
    assert fingerprint(exact, torch.bfloat16) != fingerprint(sent, torch.bfloat16)


def odd_ranks(rank: int, world: int, odd: int | None) -> list[int]:
    model = small()
    if rank == odd:
        flip(model, 100, 3)
    try:
        check_replicas(model, 40)
    except OddReplica as error:
        assert str(error) == "its weights before step 40 differ from those of the other ranks"
        return error.ranks
    return []


@pytest.mark.parametrize(
    ("world", "odd", "named"), [(3, None, []), (3, 1, [1]), (2, 0, [0, 1])], ids=["none", "majority", "no majority"]
)
def test_all_ranks_know_which_one_is_odd(tmp_path: Path, world: int, odd: int | None, named: list[int]) -> None:
    assert on_ranks(world, tmp_path, odd_ranks, odd) == [named] * world


def test_nothing_is_saved_then(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(_model: object, step: int, _sent_as: object) -> None:
        raise OddReplica([1], step)

    monkeypatch.setattr(loop, "check_replicas", odd)
    saved: list[int] = []
    writer = SimpleNamespace(has=lambda step: False, save=saved.append)
    recipe = SimpleNamespace(comm=SimpleNamespace(bf16=False))
    flushed = SimpleNamespace(flush=lambda: None)
    run = SimpleNamespace(metrics=flushed, writer=writer, model=None, step=40, recipe=recipe)
    with pytest.raises(OddReplica):
        loop.save(run)
    assert not saved
