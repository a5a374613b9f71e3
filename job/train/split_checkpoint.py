"""Checkpoints of nodes whose disks differ: the store is where the parts come together.

    rank (any node)      writes its files into the hidden folder of its attempt, and says so
    its node             puts them into the store at runs/<id>/checkpoints/<rows>/, and only then passes the word on
    the first node       has heard of all parts: puts the manifest, and with that the checkpoint exists

No node's disk ever has all of it, so none has a sealed folder: what was put is removed, and a node that needs the checkpoint (to go on
from it, or to evaluate it) pulls it whole. Every write goes through the attempt's fence (job/store/fence.py), on every node.
"""

from __future__ import annotations

import collections
import contextlib
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from job.errors import DataError
from job.run.uploader import put_events, remove_older
from job.store.attempt import Attempt
from job.store.checkpoint_folder import KIND, Keeper, folder_of, folders, parts_folder
from job.store.fence import run_key
from job.store.sealed import MANIFEST, is_sealed, open_sealed, write_manifest
from job.store.stores import Store, pull_sealed, push_sealed

FINISH_SECONDS = 60.0
"""that manifests of whole checkpoints have to reach the store when training has ended"""


def key_of(run: Path, rows: int) -> str:
    """Where the store has the checkpoint."""
    return f"{run_key(run.name)}/checkpoints/{folder_of(run, rows).name}"


def publish(store: Store, run: Path, attempt: int, part: dict[str, Any]) -> None:
    """Put one rank's files where the checkpoint will be; what was put is removed here."""
    folder, key = parts_folder(run, part["rows"], attempt), key_of(run, part["rows"])
    for name, entry in part["files"].items():
        store.put_file(f"{key}/{name}", folder / name, entry["sha256"])
        (folder / name).unlink()


def fetch(store: Store, run: Path, rows: int) -> None:
    """Make the checkpoint stand on this disk as the store has it, and no other."""
    folder, key = folder_of(run, rows), key_of(run, rows)
    _keep_only(folder)
    if is_sealed(folder) and (folder / MANIFEST).read_bytes() == store.get(f"{key}/{MANIFEST}"):
        with contextlib.suppress(DataError):
            open_sealed(folder, kind=KIND)
            return
    pull_sealed(store, key, folder, kind=KIND)


def share(store: Store, run: Path, rows: int) -> None:
    """Make the store have a checkpoint that this disk has, which keeps no other."""
    push_sealed(store, key_of(run, rows), folder_of(run, rows))
    _keep_only(folder_of(run, rows))


def _keep_only(folder: Path) -> None:
    for other in folders(folder.parents[1]):
        if other != folder:
            shutil.rmtree(other)


class SplitKeeper(Keeper):
    """Seals in the store instead of on this disk, in a thread: the supervisor waits for no store."""

    def __init__(
        self, run: Path, attempt: Attempt, store: Store, *, world_size: int, final_rows: int, minutes: float
    ) -> None:
        super().__init__(run, attempt, world_size=world_size, final_rows=final_rows, minutes=minutes)
        self._store = store
        self._sealed: collections.deque[list[dict[str, Any]]] = collections.deque()
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None

    def check(self) -> None:
        self._take_sealed()
        if self._error:
            raise self._error

    def _take_sealed(self) -> None:
        while self._sealed:
            self._record(self._sealed.popleft())

    def end(self) -> None:
        for thread in self._threads:
            thread.join(FINISH_SECONDS)
        super().end()
        if sys.exc_info()[0] is None:  # else there is a better reason to end
            self.check()
        else:
            self._take_sealed()

    def _seal(self, parts: list[dict[str, Any]]) -> None:
        self._attempt.check_newest()
        self._threads.append(threading.Thread(target=self._put_manifest, args=(parts,), daemon=True))
        self._threads[-1].start()

    def _put_manifest(self, parts: list[dict[str, Any]]) -> None:
        rows = parts[0]["rows"]
        folder = parts_folder(self._run, rows, self._attempt.number)
        try:
            write_manifest(folder, kind=KIND, **self._manifest(parts))
            put_events(self._store, self._run, self._attempt.number)
            self._store.put(
                f"{key_of(self._run, rows)}/{MANIFEST}", (folder / MANIFEST).read_bytes(), "application/json"
            )
            shutil.rmtree(folder)
            remove_older(self._store, f"{run_key(self._run.name)}/checkpoints", rows, self._final_rows)
        except BaseException as error:
            self._error = error
            return
        self._sealed.append(parts)
