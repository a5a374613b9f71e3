"""Checkpoints of a run on several nodes: the store is where their parts come together.

    rank (any node)    writes its files into the hidden folder of its attempt, and says so
    its node           puts them at checkpoints/<rows>/ where disks differ, then a document at parts/<attempt>/<rows>/
    the first node     has the documents of all parts: puts the manifest, and with that the checkpoint exists

On a folder that all nodes share the files stay where they are, and the first node seals them there. Where disks differ
none has a sealed folder: what was put is removed, and a node that needs the checkpoint pulls it whole. Every write goes
through the attempt's fence.
"""

from __future__ import annotations

import collections
import contextlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job.errors import DataError
from job.run.uploader import put_events, remove_older
from job.store.attempt import Attempt
from job.store.checkpoint_folder import KIND, CheckpointManager, folder_of, folders, parts_folder, sweep_parts
from job.store.fence import run_key
from job.store.sealed import MANIFEST, is_sealed, open_sealed, write_manifest
from job.store.stores import Store, pull_sealed, push_sealed

POLL = 0.2
FINISH_SECONDS = 90.0
"""that parts and manifests have to reach the store when training has ended"""


def key_of(run: Path, rows: int) -> str:
    """Where the store has the checkpoint."""
    return f"{run_key(run.name)}/checkpoints/{folder_of(run, rows).name}"


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
    """Puts the parts of this node's ranks, in threads: the supervisor waits for no store."""

    def __init__(self, run: Path, attempt: int, store: Store, *, split: bool) -> None:
        self.run, self.attempt, self.store, self.split = run, attempt, store, split
        self._threads: list[threading.Thread] = []
        self.error: BaseException | None = None

    def start(self, work: Callable[..., None], *arguments: Any) -> None:
        """Call `work` in a thread; what it raises is raised by `check`."""
        self._threads.append(threading.Thread(target=self._guarded, args=(work, *arguments), daemon=True))
        self._threads[-1].start()

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            self.error = error

    def take(self, part: dict[str, Any]) -> None:
        self.start(self._put, part)

    def _put(self, part: dict[str, Any]) -> None:
        folder, key = parts_folder(self.run, part["rows"], self.attempt), key_of(self.run, part["rows"])
        for name, entry in part["files"].items() if self.split else ():
            self.store.put_file(f"{key}/{name}", folder / name, entry["sha256"])
            (folder / name).unlink()
        document = f"{self.documents(part['rows'])}/{min(part['files'])}.json"
        self.store.put(document, json.dumps(part).encode(), "application/json")

    def documents(self, rows: int) -> str:
        return f"{run_key(self.run.name)}/parts/{self.attempt}/{rows}"

    def due(self) -> bool:
        """Never: the first node says when a checkpoint is due."""
        return False

    def restart_clock(self) -> None:
        """There is none here."""

    def check(self) -> None:
        if self.error:
            raise self.error

    def join(self) -> None:
        """Wait for what is on its way."""
        until = time.monotonic() + FINISH_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def end(self) -> None:
        """When the ranks have ended: wait for what is on its way, then remove what became no part."""
        self.join()
        if self.split:
            sweep_parts(self.run)
        if sys.exc_info()[0] is None:  # else there is a better reason to end
            self.check()


class NodesCheckpointManager(CheckpointManager):
    """On the first node: seals what the documents of all parts say."""

    def __init__(
        self, run: Path, attempt: Attempt, uploader: PartUploader, others_ended: Callable[[], bool], **given: Any
    ) -> None:
        super().__init__(run, attempt, **given)
        self._uploader, self._others_ended = uploader, others_ended
        uploader.store.delete(uploader.store.list(f"{run_key(run.name)}/parts"))  # of attempts before this one
        self._begun: set[int] = set()
        self._sealed_before = threading.Event()
        self._sealed_before.set()
        self._ended = threading.Event()
        self._whole: collections.deque[list[dict[str, Any]]] = collections.deque()

    def take(self, part: dict[str, Any]) -> None:
        self._uploader.take(part)
        if part["rows"] not in self._begun:
            self._begun.add(part["rows"])
            before, self._sealed_before = self._sealed_before, threading.Event()
            self._uploader.start(self._collect_in_order, part["rows"], before, self._sealed_before)

    def _collect_in_order(self, rows: int, before: threading.Event, done: threading.Event) -> None:
        """In a thread: checkpoints are sealed in the order of their steps, however their parts arrive."""
        try:
            before.wait()
            self._collect(rows)
        finally:
            done.set()

    def _collect(self, rows: int) -> None:
        """Until the documents of all parts are there, or no more can come."""
        store, prefix = self._uploader.store, self._uploader.documents(rows)
        parts: dict[str, dict[str, Any]] = {}
        while len(parts) < self._world_size:
            no_more = self._ended.is_set() and self._others_ended()
            for key in sorted(store.list(prefix).keys() - parts.keys()):
                parts[key] = json.loads(store.get(key) or b"{}")
            if no_more and len(parts) < self._world_size:
                return
            time.sleep(POLL)
        whole = [parts[key] for key in sorted(parts)]
        if self._uploader.split:
            self._put_manifest(store, whole)
        self._whole.append(whole)
        store.delete(parts)

    def _put_manifest(self, store: Store, parts: list[dict[str, Any]]) -> None:
        rows = parts[0]["rows"]
        folder = parts_folder(self._run, rows, self._attempt.number)
        write_manifest(folder, kind=KIND, **self._manifest(parts))
        put_events(store, self._run, self._attempt.number)
        store.put(f"{key_of(self._run, rows)}/{MANIFEST}", (folder / MANIFEST).read_bytes(), "application/json")
        shutil.rmtree(folder)
        remove_older(store, f"{run_key(self._run.name)}/checkpoints", rows, self._final_rows)

    def check(self) -> None:
        while self._whole:
            parts = self._whole.popleft()
            self._record(parts) if self._uploader.split else self._seal(parts)
        if sys.exc_info()[0] is None:  # else there is a better reason to end
            self._uploader.check()

    def end(self) -> None:
        self._ended.set()
        self._uploader.join()
        self.check()
        super().end()
