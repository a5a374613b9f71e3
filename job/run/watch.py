"""The line of a training that somebody watches, from the events that its page is made from too."""

from __future__ import annotations

from typing import Any

from job.console import Console
from job.recipe.config import Recipe
from job.report.progress import figures, line_parts
from job.report.result import present
from job.store.attempt import Record, fold_event

MILESTONES = {"train.val": "validated", "checkpoint.sealed": "checkpoint sealed", "upload.done": "checkpoint uploaded"}


class Watch:
    """Of one attempt whose first event is in the `record`, which the others are folded into."""

    def __init__(self, record: Record, recipe: Recipe, console: Console) -> None:
        self._recipe, self._console, self._record = recipe, console, record

    def take(self, event: dict[str, Any]) -> None:
        """Show each step; at a validation, and at a checkpoint and its upload, leave a line of the same."""
        fold_event(self._record, event)
        kind = event["kind"]
        if kind == "train.start":
            self._record = present(self._record)
        elif kind == "train.step":
            self._console.show("pretrain", (event["step"] + 1) / self._record.train["steps"], self._parts)
        elif (
            kind in MILESTONES and self._record.steps and (kind != "upload.done" or "/checkpoints/" in event["folder"])
        ):
            self._console.say(f"pretrain: {', '.join(self._parts())} ({MILESTONES[kind]})")

    def _parts(self) -> list[str]:
        found = figures(self._recipe, self._record)
        assert found
        return line_parts(found)
