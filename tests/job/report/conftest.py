"""Synthetic run folders for the report's tests: real attempts, events and sealed folders, a clock set by the test."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.evaluation.bundle import Task
from job.evaluation.ledger import Answer, folder_of, make_ledger, seal_answers, seal_ledger
from job.store import attempt as attempts
from job.store.attempt import Attempt
from job.store.documents import hashed
from job.store.sealed import sealing

SEQ_LEN, BATCH_ROWS = 256, 32
VERSIONS = {"python": "3.11.2", "torch": "2.13.0+cpu"}
PROVENANCE = {"commit": "12ab34", "image": None, "lock": "f" * 64, "driver": "580.1", "gpus": ["NVIDIA H100"] * 8}
CPU = {"model": "Imaginary CPU", "cores": 2, "bf16": True}
MACHINE = {"host": "here", "versions": VERSIONS, "cpu": CPU, "provenance": PROVENANCE}
DERIVED = {"total_parameters": 7340114, "flops_per_token": 27132336}

TASKS = (
    ("word_choice", "multiple_choice", 3, 0.25, 10, 20),
    ("which_subject", "schema", 0, 0.5, 8, 20),
    ("next_word", "language_modeling", 0, 0.0, 3, 20),
)
"""(label, kind, shots, baseline, right answers, items)"""


class Clock:
    """time.time() and time.monotonic() of the attempts, turned by hand."""

    def __init__(self, monkeypatch: Any, start: float = 1_700_000_000.0) -> None:
        self.now = start
        monkeypatch.setattr(attempts.time, "time", lambda: self.now)
        monkeypatch.setattr(attempts.time, "monotonic", lambda: self.now)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@dataclasses.dataclass
class SyntheticRun:
    """A run folder below `out` and the clock of its attempts."""

    out: Path
    clock: Clock
    run_id: str = "smoke"
    steps: int = 200
    loss_at: Callable[[int], float] = lambda step: 3.2 + 5.1 * math.exp(-step / 40)
    bpb_at: Callable[[int], float] = lambda step: 1.6 + 2.0 * math.exp(-step / 60)
    tasks: tuple[tuple[str, str, int, float, int, int], ...] = TASKS

    def __post_init__(self) -> None:
        self.path = self.out / "runs" / self.run_id
        self.path.mkdir(parents=True)
        recipe = {
            "model": {"depth": 4, "seq_len": SEQ_LEN},
            "data": {"paths": [], "split_long": True},
            "train": {"steps": self.steps},
        }
        sources = {f"{section}.{key}": "preset smoke" for section, entries in recipe.items() for key in entries}
        derived = {name: {"value": value, "why": "so it is", "source": "a test"} for name, value in DERIVED.items()}
        derived["steps"] = {"value": self.steps, "why": "the number of optimizer steps", "source": "asked for"}
        document = {"schema": 1, "run_id": self.run_id, "preset": "smoke", "evidence": "measured", "recipe": recipe}
        document |= {"sources": sources | {"data.paths": "default", "train.steps": "-o"}, "derived": derived}
        (self.path / "recipe.json").write_text(json.dumps(hashed(document)))

    def start(self) -> Attempt:
        attempt = Attempt.claim(self.path)
        attempt.emit("attempt.started", argv=["smoke", "--run-id", self.run_id], **MACHINE)
        return attempt

    def prepare(self, attempt: Attempt, seconds: float = 20.0) -> None:
        attempt.emit("stage.started", stage="prepare")
        self.clock.pass_(seconds)
        attempt.emit("prepare.done", id="feedc0de", train_rows=5000, val_rows=250, vocab_size=4096, seq_len=SEQ_LEN)
        attempt.emit("stage.done", stage="prepare", seconds=seconds)
        with sealing(
            self.out / "prepared" / "feedc0de" / "tokenizer", kind="tokenizer", made_from={"text": "x"}
        ) as folder:
            (folder.path / "tokenizer.json").write_text("{}")

    def pretrain(
        self, attempt: Attempt, first: int = 0, last: int | None = None, every: int = 50, ms: float = 500.0
    ) -> None:
        """Steps `first` ... `last` - 1 (to the end, sealing the final checkpoint, when `last` is None)."""
        stop = self.steps if last is None else last
        attempt.emit("stage.started", stage="pretrain")
        shape = {"steps": self.steps, "batch_rows": BATCH_ROWS, "params": 7340114, "flops_per_token": 27132336}
        machine = {"world_size": 1, "device": "cpu", "dtype": "bfloat16", "threads": 2}
        attempt.emit("train.start", step=first, rows=first * BATCH_ROWS, **shape, **machine)
        for step in range(first, stop):
            self.clock.pass_(ms / 1000)
            done = {"rows": (step + 1) * BATCH_ROWS}
            attempt.emit(
                "train.step",
                step=step,
                **done,
                loss=self.loss_at(step),
                lr_mult=1.0,
                ms=ms,
                tokens=BATCH_ROWS * SEQ_LEN,
            )
            if (step + 1) % every == 0 and step + 1 < self.steps:
                attempt.emit(
                    "train.val", step=step + 1, **done, bpb=self.bpb_at(step + 1), nats=1.0, bytes=1, tokens=65536
                )
        if last is None:
            self.checkpoint(attempt, stop)
            attempt.emit("stage.done", stage="pretrain", seconds=1.0)

    def checkpoint(self, attempt: Attempt, step: int) -> None:
        rows = step * BATCH_ROWS
        with sealing(self.path / "checkpoints" / f"{rows:015d}", kind="checkpoint", made_from={"rows": rows}) as folder:
            (folder.path / "rank-00000.safetensors").write_bytes(b"weights")
        attempt.emit("checkpoint.sealed", step=step, rows=rows, folder=f"{rows:015d}", bytes=7, seconds=0.1)

    def evaluate(
        self,
        attempt: Attempt,
        *,
        bpb: float = 1.7,
        packed: float | None = None,
        bigram: float | None = 2.25,
        core: bool = False,
        cap: int | None = None,
        **made_from: Any,
    ) -> None:
        attempt.emit("stage.started", stage="evaluate")
        with sealing(self.path / "eval" / "bpb", kind="bpb", made_from={"weights": "w"}) as folder:
            folder.facts |= {"bpb": bpb, "nats": 1.0, "bytes": 1, "tokens": 65536, "bigram_bpb": bigram}
            folder.facts |= {"packed_bpb": packed} if packed else {}
        self.clock.pass_(30.0)
        tasks = [scored(*task) for task in self.tasks]
        made_from = {"bundle": "c0c0c0c0c0c0c0c0" if core else "b0b0b0b0b0b0b0b0", "cap": cap} | made_from
        ledger = make_ledger("core" if core else "smoke_score", tasks, made_from)
        folder = folder_of(self.path / "eval", ledger.made_from)
        for task, answers, seconds in tasks:
            seal_answers(folder, task.label, made_from | {"task": task.label}, answers, seconds)
        seal_ledger(folder, ledger)
        attempt.emit("stage.done", stage="evaluate", seconds=30.0)

    def whole(self) -> SyntheticRun:
        """One attempt from the first stage to the last."""
        attempt = self.start()
        self.prepare(attempt)
        self.pretrain(attempt)
        self.evaluate(attempt)
        attempt.emit("sample", prompt="def main(", text="args):\n    return 0")
        attempt.emit("attempt.ended", exit_code=0, reason="done")
        attempt.close()
        return self


def scored(label: str, kind: str, shots: int, baseline: float, right: int, n: int) -> tuple[Task, list[Answer], float]:
    task = Task(label, kind, shots, " ", baseline, f"{label}.jsonl", ())
    return task, [Answer(i + 1, 0, 0, i < right, 0.5) for i in range(n)], 1.5


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def make_run(tmp_path, clock) -> Callable[..., SyntheticRun]:
    """make_run(run_id=..., steps=..., loss_at=..., bpb_at=...)"""
    return lambda **fields: SyntheticRun(tmp_path, clock, **fields)


@pytest.fixture
def run(make_run) -> SyntheticRun:
    return make_run()
