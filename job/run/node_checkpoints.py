"""Checkpoints of a run whose nodes have disks of their own: their parts come together in the store.

    rank (any node)    writes its files and part-<rank>.json into the hidden folder of its attempt
    its node           puts the files at checkpoints/<rows>/, then part-<rank>.json at parts/<attempt>/<rows>/
    the first node     finds all of these there: puts the manifest, and with that the checkpoint exists

No disk has a sealed folder: what was put is removed, and a node that needs the checkpoint pulls it whole. Every write
goes through the attempt's fence. On a folder that all nodes share, the first one seals as on one node.
"""

from __future__ import annotations

import collections
import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from job.errors import DataError
from job.run.uploader import put_events, remove_older
from job.store.attempt import Attempt
from job.store.checkpoint_folder import (
    KIND,
    CheckpointManager,
    folder_of,
    folders,
    key_of,
    parts_folder,
    read_part,
    sweep_parts,
    written_parts,
)
from job.store.fence import run_key
from job.store.sealed import MANIFEST, is_sealed, open_sealed, write_manifest
from job.store.stores import Store, pull_sealed, push_sealed

POLL = 0.2
FINISH_SECONDS = 90.0
"""that parts and manifests have to reach the store when training has ended"""


def parts_key(run: Path, attempt: int) -> str:
    return f"{run_key(run.name)}/parts/{attempt}"


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


class PartUploader:
    """Puts the parts that this node's ranks have written, in a thread: the supervisor waits for no store."""

    def __init__(
        self, run: Path, attempt: int, store: Store, after_each_look: Callable[[], None] = lambda: None
    ) -> None:
        self.run, self.attempt, self.store, self._after_each_look = run, attempt, store, after_each_look
        self._ended = threading.Event()
        self._error: BaseException | None = None
        sweep_parts(run)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            ended = False
            while not ended:
                ended = self._ended.wait(POLL)
                for folder, parts in written_parts(self.run, self.attempt):
                    for part in parts:
                        self._put(folder, part.name, read_part(part))
                self._after_each_look()
        except BaseException as error:
            self._error = error

    def _put(self, folder: Path, name: str, part: dict[str, Any]) -> None:
        for file, entry in part["files"].items():
            self.store.put_file(f"{key_of(self.run, part['rows'])}/{file}", folder / file, entry["sha256"])
            (folder / file).unlink()
        document = f"{parts_key(self.run, self.attempt)}/{part['rows']:015d}/{name}"
        self.store.put(document, json.dumps(part).encode(), "application/json")

    def check(self) -> None:
        """Several times a second: raise what the thread failed with."""
        if self._error:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """When the ranks have ended: put what they have still written, and remove what became no part."""
        self._ended.set()
        self._thread.join(FINISH_SECONDS)
        sweep_parts(self.run)
        if error is None:
            self.check()


class SplitCheckpointManager(CheckpointManager):
    """On the first node: puts the manifest when the parts of all nodes are in the store."""

    def __init__(
        self, run: Path, attempt: Attempt, store: Store, others_ended: Callable[[], bool], **given: Any
    ) -> None:
        super().__init__(run, attempt, **given)
        store.delete(store.list(f"{run_key(run.name)}/parts"))  # of attempts before this one
        self._others_ended = others_ended
        self._whole: collections.deque[list[dict[str, Any]]] = collections.deque()
        self._uploader = PartUploader(run, attempt.number, store, self._seal_in_store)

    def _seal_in_store(self) -> None:
        """In the uploader's thread."""
        store, sets = self._uploader.store, collections.defaultdict(list)
        if not any((self._run / "checkpoints").glob(".*.tmp-*")):
            return
        for key in sorted(store.list(parts_key(self._run, self._attempt.number))):
            sets[key.rpartition("/")[0]].append(key)
        for keys in sets.values():
            if len(keys) == self._world_size:
                self._put_manifest(store, [json.loads(store.get(key) or b"{}") for key in keys])
                store.delete(keys)

    def _put_manifest(self, store: Store, parts: list[dict[str, Any]]) -> None:
        rows = parts[0]["rows"]
        folder = parts_folder(self._run, rows, self._attempt.number)
        write_manifest(folder, kind=KIND, **self._manifest(parts))
        put_events(store, self._run, self._attempt.number)
        store.put(f"{key_of(self._run, rows)}/{MANIFEST}", (folder / MANIFEST).read_bytes(), "application/json")
        shutil.rmtree(folder)
        remove_older(store, self._run, rows, self._final_rows)
        self._whole.append(parts)

    def check(self) -> None:
        while self._whole:
            self._record(self._whole.popleft())
        self._uploader.check()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """When this node's ranks have ended: wait for the parts of the others."""
        until = time.monotonic() + FINISH_SECONDS
        while not self._others_ended() and time.monotonic() < until:
            time.sleep(POLL)
        self._uploader.__exit__(kind, error, traceback)
        super().__exit__(kind, error, traceback)
