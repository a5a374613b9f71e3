"""What a person sees while a stage runs: a live line on a terminal, plain lines elsewhere; all on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

PLAIN_EVERY = 10.0
"""seconds between plain progress lines of one stage"""


class Console:
    """Progress and messages; `verbosity` -1 says errors only, 0 the normal, 1 every event as well."""

    def __init__(self, verbosity: int = 0) -> None:
        self.verbosity = verbosity
        self._live: Any = None
        self._task: tuple[str, Any] | None = None
        self._started: dict[str, tuple[float, float]] = {}
        self._printed: dict[str, float] = {}
        self.printed = time.monotonic()
        """when anything was last shown"""

    def say(self, text: str) -> None:
        if self.verbosity >= 0:
            self._print(text)

    def detail(self, text: str) -> None:
        if self.verbosity >= 1:
            self._print(text)

    def error(self, text: str) -> None:
        self.close()
        print(text, file=sys.stderr, flush=True)

    def _print(self, text: str) -> None:
        self.printed = time.monotonic()
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        if self.verbosity < 0 or total <= 0:
            return
        if sys.stderr.isatty():
            self._show_live(stage, done, total, unit)
        else:
            self._show_plain(stage, done, total, unit)

    def _show_live(self, stage: str, done: float, total: float, unit: str) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if self._live is None:
            columns = [
                TextColumn("{task.description:>20}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(compact=True),
            ]
            self._live = Progress(*columns, console=RichConsole(stderr=True), transient=True)
            self._live.start()
        if self._task is None or self._task[0] != stage:
            if self._task:
                self._live.remove_task(self._task[1])
            self._task = (stage, self._live.add_task(stage, total=total, rate=""))
        self.printed = time.monotonic()
        self._live.update(self._task[1], completed=done, total=total, rate=self._rate(stage, done, unit)[0])

    def _rate(self, stage: str, done: float, unit: str) -> tuple[str, float]:
        began, first = self._started.setdefault(stage, (time.monotonic(), done))
        elapsed = time.monotonic() - began
        per_second = (done - first) / elapsed if elapsed > 0 else 0.0
        return (f"{per_second:,.0f} {unit}/s" if per_second >= 10 else f"{per_second:.2f} {unit}/s"), per_second

    def _show_plain(self, stage: str, done: float, total: float, unit: str) -> None:
        rate, per_second = self._rate(stage, done, unit)
        now = time.monotonic()
        if done < total and now - self._printed.get(stage, 0.0) < PLAIN_EVERY:
            return
        self._printed[stage] = now
        left = f", {(total - done) / per_second:.0f} s left" if per_second > 0 and done < total else ""
        self._print(f"{stage}: {done:,.0f} of {total:,.0f} {unit} ({100 * done / total:.0f} %), {rate}{left}")

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = self._task = None
