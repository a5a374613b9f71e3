"""The last collectives of a rank that stands still, from torch's own recorder, on gloo."""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from helpers import on_ranks
from job.train.context import StopSignal
from job.train.flight_record import last_collectives


def waiting(rank: int, world: int) -> str:
    numbers = torch.ones(4)
    dist.all_reduce(numbers)
    if rank == 1:
        time.sleep(1.0)
        dist.all_reduce(numbers)
        return ""
    work = dist.all_reduce(numbers, async_op=True)
    told = last_collectives()
    work.wait()
    return told


def test_one_that_waits_is_not_over(tmp_path: Path) -> None:
    told, _ = on_ranks(2, tmp_path, waiting)
    assert told.splitlines() == [
        "collective 1 gloo:all_reduce [[4]]: over",
        "collective 2 gloo:all_reduce [[4]]: scheduled",
    ]


def test_without_a_group_there_are_none() -> None:
    assert last_collectives() == ""


def test_while_torch_is_being_imported_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed", ModuleType("torch.distributed"))
    assert last_collectives() == ""


def test_a_stop_is_heard_after_an_answer_that_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fails() -> None:
        raise RuntimeError("no record")

    killed: list[tuple] = []
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"do": "beat"}\n{"do": "stop"}\n'))
    monkeypatch.setattr(os, "killpg", lambda *called: killed.append(called))
    signals = StopSignal(fails)
    signals._listen()
    assert signals.take() == 2 and len(killed) == 1, "after the last word comes the end"
    assert "no record" in capsys.readouterr().err
