"""Who prepares a set: one process of a machine at a time."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.errors import StorageError
from job.reporter import Reporter
from job.store.sealed import storage_errors

LOCK_SECONDS = 0.2


@contextlib.contextmanager
def alone(root: Path, reporter: Reporter) -> Iterator[None]:
    """Hold the set's lock: two processes that prepare the same set do so one after the other."""
    with open(_lock(root), "ab") as handle:
        waited, said = LOCK_SECONDS, 0.0
        while not _locked(handle):
            if waited >= 2 * said:  # a log has a line for each, and a wait can be long
                reporter.progress(f"waiting for the process that prepares {root.name}", waited, waited, "s")
                said = max(waited, 1.0)
            time.sleep(LOCK_SECONDS)
            waited += LOCK_SECONDS
        yield


def make_folder(root: Path) -> None:
    """Where the set is made; StorageError when that cannot be."""
    try:
        with storage_errors(root):
            root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (root, *root.parents) if path.is_file())
        raise StorageError(f"{root} cannot be made: {file} is a file, not a folder; choose another --out") from error


def is_being_made(root: Path) -> bool:
    """Whether some process of this machine is preparing the set."""
    with open(_lock(root), "ab") as handle:
        return not _locked(handle)


def _lock(root: Path) -> Path:
    return root.with_name(f"{root.name}.lock")


def _locked(handle: Any) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
