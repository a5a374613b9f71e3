"""What a stage reports to: durable events for the record, progress for the eye."""

from __future__ import annotations

import json
import os
import threading
from typing import IO, Any

EVENTS_FD = "SPEEDRUN_EVENTS_FD"
"""the environment variable with the number of a child's end of the pipe"""


class Reporter:
    """The silent reporter; the supervisor's and the ranks' reporters override both methods."""

    def emit(self, kind: str, **fields: Any) -> None:
        """Record the durable event `kind`; fields must be JSON-able."""

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        """Show that `done` of `total` units of `stage` are finished (display only, may be dropped)."""


class RankReporter(Reporter):
    """Sends a rank's events and progress up the pipe; safe from several threads."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    @classmethod
    def of_child(cls) -> RankReporter:
        """To the supervisor that started this process (job/run/processes.py)."""
        return cls(os.fdopen(int(os.environ[EVENTS_FD]), "w", encoding="utf-8"))

    def send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._pipe.write(json.dumps(message) + "\n")
            self._pipe.flush()

    def emit(self, kind: str, **fields: Any) -> None:
        self.send({"kind": kind, **fields})

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        self.send({"progress": [stage, done, total, unit]})
