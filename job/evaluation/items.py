"""A bundle's items as tokens, sealed by task: made once, before a GPU is needed, and shared by all ranks and runs.

    <folder>/<label>/tokens.npy    each item's prefix, then its suffixes: uint16, or int32 for vocabularies above 65,536
    <folder>/<label>/items.npy     (n, 4) int64: line, gold, number of options, tokens of the prefix
    <folder>/<label>/rows.npy      (options of all items, 2) int64: tokens of the suffix, start of the scored tokens

The prompts of one item differ in their last few tokens only, so a shared prefix is stored once; tokens are read
through a memory map. A folder is another bundle's, tokenizer's or cap's when its id says so, and is then made again.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from job.data.workers import run_tasks
from job.evaluation.bundle import Bundle, Task
from job.evaluation.prompts import Encoder, Item, check_cap, items_of
from job.reporter import Reporter
from job.store.artifact_cache import Artifact, ArtifactCache
from job.store.sealed import content_id, is_sealed, open_sealed, sealing

KIND = "eval_items"
SPAWN_PAYS = 100_000
"""examples, each with its shots, below which one process is faster than several: about five seconds of work"""
VERSION = 1


def items_folder(prepared: Path, bundle: str, cap: int | None) -> Path:
    """The folder, below that of a prepared set, of the tokens of the items of a bundle by its id."""
    return prepared / "items" / f"{bundle}-{cap or 'all'}"


class TaskItems(Sequence[Item]):
    """The items of one task, in scoring order, read from its sealed folder."""

    def __init__(self, folder: Path) -> None:
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self._items = np.load(folder / "items.npy")
        self._rows = np.load(folder / "rows.npy")
        self._first_row = np.concatenate([[0], np.cumsum(self._items[:, 2])])
        suffixes = np.concatenate([[0], np.cumsum(self._rows[:, 0])])
        self._first_token = np.concatenate([[0], np.cumsum(self._items[:, 3])]) + suffixes[self._first_row]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        line, gold, _, shared = (int(value) for value in self._items[i])
        rows = self._rows[self._first_row[i] : self._first_row[i + 1]]
        tokens = np.array(self._tokens[self._first_token[i] : self._first_token[i + 1]], dtype=np.int32)
        suffixes = np.split(tokens[shared:], np.cumsum(rows[:-1, 0]))
        return Item(line, gold, tokens[:shared], tuple(suffixes), tuple(int(start) for start in rows[:, 1]))


def save_items(items: Iterable[Item], folder: Path) -> None:
    """Write the three files of `TaskItems` into `folder`."""
    heads, rows, tokens = [], [], []
    for item in items:
        heads.append((item.line, item.gold, len(item.suffixes), len(item.prefix)))
        rows += [(len(suffix), start) for suffix, start in zip(item.suffixes, item.starts, strict=True)]
        tokens += [item.prefix, *item.suffixes]
    flat = np.concatenate(tokens)
    np.save(folder / "tokens.npy", flat.astype(np.uint16 if flat.max() < 1 << 16 else np.int32))
    np.save(folder / "items.npy", np.array(heads, dtype=np.int64))
    np.save(folder / "rows.npy", np.array(rows, dtype=np.int64))


@dataclasses.dataclass(frozen=True)
class EncodeTask:
    """The work of one process: seal the items of one task."""

    task: Task
    tokenizer: Encoder
    cap: int | None
    max_tokens: int | None
    folder: Path
    made_from: dict[str, Any]

    @property
    def work(self) -> int:
        """Examples to encode, shots included."""
        return min(len(self.task.examples), self.cap or sys.maxsize) * (self.task.shots + 1)

    def run(self, advance: Callable[[int], None]) -> None:
        with sealing(self.folder, kind=KIND, made_from=self.made_from) as unsealed:
            save_items(items_of(self.task, self.tokenizer, self.cap, self.max_tokens), unsealed.path)
        advance(1)


def seal_items(
    bundle: Bundle,
    tokenizer: Encoder,
    folder: Path,
    *,
    tokenizer_id: str,
    cap: int | None,
    max_tokens: int | None = None,
    workers: int = 1,
    reporter: Reporter,
    cache: ArtifactCache | None = None,
) -> dict[str, TaskItems]:
    """The items of every task by label; `folder/<label>` is sealed where it was not.

    They are pulled from `cache` where that has them, or made by one process per task where that pays, the largest
    first. Raises UsageError for a cap not above a task's shots; DataError, naming file and line, for an example that
    cannot be scored.
    """
    check_cap(bundle, cap)
    made_from: dict[str, Any] = {"bundle": bundle.id, "tokenizer": tokenizer_id}
    made_from |= {"cap": cap, "max_tokens": max_tokens, "version": VERSION}
    tasks = [
        EncodeTask(task, tokenizer, cap, max_tokens, folder / task.label, {**made_from, "task": task.label})
        for task in bundle.tasks
    ]
    if cache:
        for _ in cache.pull([Artifact(task.folder, KIND, task.made_from) for task in tasks]):
            pass

    def is_made(task: EncodeTask) -> bool:
        wanted = content_id(KIND, task.made_from)
        return is_sealed(task.folder) and open_sealed(task.folder, kind=KIND, verify=False).id == wanted

    missing = sorted((task for task in tasks if not is_made(task)), key=lambda task: -task.work)
    found = len(tasks) - len(missing)

    def show(done: int) -> None:
        reporter.progress("tokenise", found + done, len(tasks), "tasks")

    for _ in run_tasks(missing, workers if sum(task.work for task in missing) > SPAWN_PAYS else 1, show):
        pass
    return {task.task.label: TaskItems(open_sealed(task.folder, kind=KIND).path) for task in tasks}
