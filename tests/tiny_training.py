"""A run so small that a test trains it in its own process: its recipe, and a rank's reporter without a pipe."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from job.console import Console
from job.recipe.config import Recipe, resolve
from job.reporter import RankReporter
from job.store.checkpoint_folder import CheckpointManager

STEPS = 14
QUIET = Console(-1)
CPU = torch.device("cpu")


def recipe_of(corpus: Path, **train: object) -> Recipe:
    """A d1 on 32 tokens: 8 rows a step in two micro-steps of one rank, more steps than the corpus has rows for."""
    values = {"steps": STEPS, "total_batch_size": 256, "device_batch_size": 4, "threads": 1, "dtype": "fp32"} | train
    overrides = [f"train.{key}={value}" for key, value in values.items()]
    overrides += ["model.depth=1", "model.seq_len=32", "data.vocab_size=300", "data.val_fraction=0.2"]
    return resolve("smoke", {"data.source": ("--data", "local"), "data.paths": ("--data", (str(corpus),))}, overrides)


class InProcess(RankReporter):
    """A rank's reporter without a pipe: messages go to a list, and at each the manager looks for parts, twice (it seals
    what was whole at the look before)."""

    def __init__(self, manager: CheckpointManager | None = None) -> None:
        super().__init__(io.StringIO())
        self.manager, self.events = manager, []

    def send(self, message: dict[str, Any]) -> None:
        self.events.append(message)
        if self.manager:
            self.manager.check()
            self.manager.check()

    def losses(self) -> list[float]:
        return [e["loss"] for e in self.events if e.get("kind") == "train.step"]
