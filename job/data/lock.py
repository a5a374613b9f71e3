"""Who prepares a set: one process of a machine at a time (sealing a folder sweeps what other writers left of it)."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from job.errors import StorageError
from job.reporter import Reporter
from job.store.sealed import storage_errors

LOCK_SECONDS = 0.2


@contextlib.contextmanager
def alone(root: Path, reporter: Reporter) -> Iterator[None]:
    """Make the folder `root` and hold its lock: processes that prepare the same set do so one after the other."""
    try:
        with storage_errors(root):
            root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        there = next(path for path in (root, *root.parents) if path.is_file())
        raise StorageError(f"{root} cannot be made: {there} is a file, not a folder; choose another --out") from error
    with _lock_file(root) as file:
        waited, said = LOCK_SECONDS, 0.0
        while not _locked(file):
            if waited >= 2 * said:  # a log has a line for each, and a wait can be long
                reporter.progress(f"waiting for the process that prepares {root.name}", waited, waited, "s")
                said = max(waited, 1.0)
            time.sleep(LOCK_SECONDS)
            waited += LOCK_SECONDS
        yield


def is_being_made(root: Path) -> bool:
    """Whether some process of this machine is preparing the set."""
    with _lock_file(root) as file:
        return not _locked(file)


def _lock_file(root: Path) -> IO[bytes]:
    file = root.with_name(f"{root.name}.lock")
    with storage_errors(file):
        return open(file, "ab")


def _locked(file: IO[bytes]) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
