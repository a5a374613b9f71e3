"""What a stage reports to: durable events for the record, progress for the eye, beats for the clock of silence."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import IO, Any, NamedTuple

LONG = 3
"""how many times longer a process may be silent while it is at something that is known to take long"""


class Doing(NamedTuple):
    """What a process is at."""

    number: int = 0
    """of beats so far: the same again means that nothing has begun since"""
    what: str = "starting"
    waits: bool = False
    """for other ranks: whoever does not wait, while others do, is the one that holds them up"""
    long: bool = True
    """known to take long (compiling, training a tokenizer): silence is allowed for longer"""


EVENTS_FD = "SPEEDRUN_EVENTS_FD"
"""the environment variable with the number of a child's end of the pipe"""


class Reporter:
    """The silent reporter; the supervisor's and the ranks' reporters override these methods."""

    def emit(self, kind: str, **fields: Any) -> None:
        """Record the durable event `kind`; fields must be JSON-able."""

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        """Show that `done` of `total` units of `stage` are finished (display only, may be dropped)."""

    def beat(self, what: str, *, waits: bool = False, long: bool = False) -> None:
        """Something begins, as `Doing` has it: the process is not silent. Costs a microsecond, so call it often."""


class RankReporter(Reporter):
    """Sends a rank's events and progress up the pipe; safe from several threads."""

    BEAT_SECONDS = 1.0
    """between two looks for a new beat"""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._doing = Doing()

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

    def beat(self, what: str, *, waits: bool = False, long: bool = False) -> None:
        self._doing = Doing(self._doing.number + 1, what, waits, long)

    def send_beats(self) -> None:
        """From now on, in a thread: once a second, what this process is at, where that is new."""
        threading.Thread(target=self._send_beats, daemon=True).start()

    def _send_beats(self) -> None:
        sent = self._doing.number
        while True:
            time.sleep(self.BEAT_SECONDS)
            if self._doing.number != sent:
                sent = self._doing.number
                self.send_beat()

    def send_beat(self) -> None:
        self.send({"doing": list(self._doing)})
