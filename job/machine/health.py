"""Whether the run of this container is well, for the image's HEALTHCHECK: `python -m job.machine.health`.

A run appends to its event file whenever something happens (a step, a task, a row file). So the file that a process of
this container holds open says where the run is and, by its age, whether anything still happens there; nothing has to be
configured. Exit 0: well, or there is no run. Exit 1, with one sentence: no event for SPEEDRUN_QUIET_SECONDS (default
1800; a compilation or a row file may take a while).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

QUIET = 1800.0
"""seconds without an event after which a run is not well"""


def open_event_files(proc: Path = Path("/proc")) -> Iterator[Path]:
    """The event files of runs (`.../events/N.jsonl`) that some process we may look into holds open."""
    for descriptors in proc.glob("[0-9]*/fd"):
        try:
            targets = [Path(os.readlink(each)) for each in descriptors.iterdir()]
        except OSError:  # ended meanwhile, or another user's
            continue
        yield from (
            path for path in targets if path.suffix == ".jsonl" and path.parent.name == "events" and path.stem.isdigit()
        )


def complaint(limit: float, files: Iterator[Path]) -> str | None:
    """What is wrong, in a sentence; None when a run has lately said something or none is there."""
    ages = {path: time.time() - path.stat().st_mtime for path in files if path.exists()}
    if not ages or min(ages.values()) <= limit:
        return None
    path, age = min(ages.items(), key=lambda entry: entry[1])
    return f"no event for {age:.0f} s in {path}: the run may hang; its logs are in {path.parent.parent / 'logs'}"


if __name__ == "__main__":
    found = complaint(float(os.environ.get("SPEEDRUN_QUIET_SECONDS", QUIET)), open_event_files())
    sys.exit(found)
