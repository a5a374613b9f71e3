"""What a person sees while a stage runs: live rows on a terminal, plain lines elsewhere; all on stderr."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any

PLAIN_EVERY = 30.0
"""seconds between plain progress lines of one stage"""
LIVE_EVERY = 0.1
"""seconds between two states of a live row"""
BAR = 10, 40
"""columns of a bar, least and most"""


class Console:
    """Progress and messages; `verbosity` -1 says errors only, 0 the normal, 1 every event as well."""

    def __init__(self, verbosity: int = 0) -> None:
        self.verbosity = verbosity
        self._live: Any = None
        self._shown: tuple[str, float, Sequence[str]] = "", 0.0, ()
        self._started: dict[str, tuple[float, float]] = {}
        self._said: dict[str, float] = {}
        self.printed = time.monotonic()
        """when anything was last shown"""

    def say(self, text: str) -> None:
        if self.verbosity >= 0:
            self._print(text)

    def detail(self, text: str) -> None:
        if self.verbosity >= 1:
            self._print(text)

    def _print(self, text: str) -> None:
        self.printed = time.monotonic()
        if on_terminal():
            width = shutil.get_terminal_size().columns
            text = "\n".join(row for line in text.split("\n") for row in wrapped(line, width) or [""])
        if self._live:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        if total <= 0:
            return
        began, first = self._started.setdefault(stage, (time.monotonic(), done))
        elapsed = time.monotonic() - began
        if done >= total:
            del self._started[stage]
        rate = (done - first) / elapsed if elapsed > 0 else 0.0
        words = [f"{done:,.0f} of {total:,.0f} {unit} ({100 * done / total:.0f} %)"]
        words += [f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2f} {unit}/s"] if rate > 0 else []
        words += [f"{(total - done) / rate:.0f} s left"] if rate > 0 and done < total else []
        self.show(stage, done / total, lambda: words)

    def show(self, stage: str, share: float, words: Callable[[], Sequence[str]]) -> None:
        """That `share` of `stage` is done, and what is to be said of it, the most important first; `words` is asked
        only when it is shown."""
        if self.verbosity < 0:
            return
        now = time.monotonic()
        if on_terminal():
            if stage != self._shown[0] or share >= 1 or now - self.printed >= LIVE_EVERY:
                self.printed = now
                self._shown = stage, share, words()
                if self._live is None:
                    from rich.console import Console as RichConsole
                    from rich.live import Live

                    self._live = Live(console=RichConsole(stderr=True), auto_refresh=False)
                    self._live.start()
                self._live.update(self._rows(), refresh=True)
        elif now - self._said.get(stage, float("-inf")) >= PLAIN_EVERY:
            self._said[stage] = now
            self._print(f"{stage}: {', '.join(words())}")

    def _rows(self) -> Any:
        """Stage, bar and words in one row where they fit, else the words after the first in a second row."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        stage, share, words = self._shown
        room = self._live.console.width - 1 - len(stage) - 2
        rows = ["  ".join(words)]
        if len(rows[0]) + BAR[0] > room:
            rows = [words[0], "  ".join(words[1:])]
        first = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=1.0, completed=share, width=max(1, min(BAR[1], room - len(rows[0]))))
        first.add_row(stage, bar, Text(rows[0], no_wrap=True, overflow="ellipsis"))
        return Group(first, *(Text(f"  {row}", no_wrap=True, overflow="ellipsis") for row in rows[1:]))

    def close(self) -> None:
        """The live rows stay as they are, and what follows begins in a row of its own."""
        if self._live:
            self._live.stop()
            self._live = None


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width`, but for paths and addresses, which stay whole."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def on_terminal() -> bool:
    """Whether stderr is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
