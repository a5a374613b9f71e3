"""What a rank's part of a stage is given: its place in the run, whom it reports to, and the stop signal.

**All ranks stop before the same step.** Ranks run at most a collective apart, so one that stopped at once would leave
the others waiting for it, and one that began a checkpoint at once would mix two steps. The supervisor tells the first
rank of its node; the next step's all-reduce carries the signal to all ranks (job/train/step_metrics.py), and each acts
on it a fixed number of steps later, which is when the slowest reader of that all-reduce knows its sum.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job.data.prepare import Prepared
from job.recipe.config import Recipe, from_document
from job.recipe.derive import Derived, derive
from job.reporter import RankReporter
from job.store.documents import read_recipe

SIGNALS = ("go on", "checkpoint", "stop")
"""by their number in the all-reduce, where the greatest counts"""


class StopSignal:
    """Whether to go on, checkpoint or stop: what the supervisor asks for, and the step before which all ranks do it."""

    def __init__(self, answer: Callable[[], None] = lambda: None) -> None:
        """answer: what to do when the supervisor asks where this process is."""
        self._answer = answer
        self._lock = threading.Lock()
        self._asked = 0
        self._agreed: list[tuple[int, int]] = []

    def listen(self) -> None:
        """Begin to take what the supervisor says, in a thread; when it dies, so does this process group."""
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            match json.loads(line)["do"]:
                case "beat":
                    try:
                        self._answer()
                    except Exception:  # whoever listens has to hear the stop, and the end
                        traceback.print_exc()
                case asked:
                    self.ask(asked)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    def ask(self, what: str) -> None:
        """Of a node's first rank."""
        with self._lock:
            self._asked = max(self._asked, SIGNALS.index(what))

    def take(self) -> int:
        """The number for the next all-reduce."""
        with self._lock:
            asked, self._asked = self._asked, 0
            return asked

    def agreed(self, signal: int, before: int) -> None:
        """All ranks have read `signal` in an all-reduce: they act on it before step `before`."""
        if signal:
            self._agreed.append((before, signal))

    def due(self, step: int) -> str:
        """What all ranks do before `step`."""
        due = [signal for before, signal in self._agreed if before <= step]
        self._agreed = [(before, signal) for before, signal in self._agreed if before > step]
        return SIGNALS[max(due, default=0)]


@dataclasses.dataclass
class RankContext:
    """What a stage's `main(context)` is given."""

    out: Path
    run: Path | None
    recipe_file: Path
    rank: int
    world_size: int
    reporter: RankReporter
    stop_signal: StopSignal
    attempt: int = 0
    resume: Path | None = None
    """the verified checkpoint that training goes on from"""
    prepared_id: str = ""
    """the prepared set that the stage works on"""
    local_rank: int = 0
    """the rank's number on its node"""
    local_world_size: int = 1

    def recipe(self) -> Recipe:
        return from_document(self._document())

    def rows_of_the_run(self) -> int:
        """Training rows that the whole run consumes."""
        return derive(self.recipe()).rows

    @property
    def asked(self) -> str:
        """What `speedrun evaluate` was asked for (job/evaluation/rescore.py); "" for the run's own evaluation."""
        return self._document().get("asked", "")

    def _document(self) -> dict[str, Any]:
        return read_recipe(self.recipe_file.read_bytes(), self.recipe_file)

    def load(self) -> tuple[Recipe, Derived, Prepared]:
        """What the training and evaluation stages start from."""
        recipe = self.recipe()
        prepared = Prepared.open(self.out / "prepared" / self.prepared_id)
        return recipe, derive(recipe), prepared
