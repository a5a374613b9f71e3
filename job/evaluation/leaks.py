"""How many training documents share a run of 13 words with an item of the evaluation, by task.

Thirteen words in common is the rule of GPT-3's report (Brown et al. 2020, appendix C). A word is a longest run of
letters and digits, capitals as small letters, whatever stands between (bytes beyond ASCII count as letters). An item
is its question with each of its answers; one of fewer than 13 words cannot be found, and is counted. Documents are
counted, not removed: the published runs trained on them too.

Words and runs are hashed to 64 bits, a few hundred kilobytes of text at a time; with some million runs of the
evaluation, less than one document in a million is counted by a collision.
"""

from __future__ import annotations

import dataclasses
import shutil
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from job.data.documents import ByHash, ByShard, Counts, Shard, Split, batches, documents
from job.data.hub import HubSource
from job.data.prepare import Prepared
from job.data.sources import open_source
from job.data.workers import run_tasks
from job.errors import DataError
from job.evaluation.bundle import Bundle, Task
from job.recipe.config import DataConfig
from job.reporter import Reporter
from job.store.artifact_cache import Artifact, ArtifactCache
from job.store.sealed import Sealed, is_sealed, open_sealed, sealing

WORDS = 13
BATCH_CHARS = 1 << 19
FILTER_BITS = 25
MOST_TASKS = 64
LOOKED_AT = 24
"""bytes of a word that are looked at, beside its length"""
MASKS = np.array([(1 << 8 * count) - 1 for count in range(8)] + [(1 << 64) - 1], dtype=np.uint64)
BY_WORD = np.array([pow(0x9E3779B97F4A7C15, power, 1 << 64) for power in range(1, WORDS + 1)], dtype=np.uint64)
LETTERS = bytes(
    byte if byte >= 128 else ord(chr(byte).lower()) if chr(byte) in string.ascii_letters + string.digits else 0
    for byte in range(256)
)


def word_runs(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (n,) uint64 of the runs of 13 words of all texts, and the index of the text that each is from."""
    encoded = [text.encode() for text in texts]
    joined = b" " + b" ".join(encoded) + b" "
    letters = joined.translate(LETTERS) + bytes(LOOKED_AT)
    inside = np.frombuffer(letters, np.uint8) != 0
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    if len(starts) < WORDS:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    word = _hash_words(letters, starts, ends - starts)
    run = sum(word[offset : len(word) - WORDS + 1 + offset] * BY_WORD[offset] for offset in range(WORDS))
    borders = np.cumsum([1, *(len(text) + 1 for text in encoded)])
    text_of_word = np.searchsorted(borders, starts, side="right") - 1
    whole = text_of_word[: len(run)] == text_of_word[WORDS - 1 :]
    return run[whole], text_of_word[: len(run)][whole]


def _hash_words(letters: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(n,) uint64: of the first LOOKED_AT bytes of each word and its length."""
    eight = np.ndarray((len(letters) - 7,), "<u8", letters, strides=(1,))
    word = lengths.astype(np.uint64)
    for offset in range(0, LOOKED_AT, 8):
        at = np.flatnonzero(lengths > offset) if offset else slice(None)
        part = eight[starts[at] + offset] & MASKS[np.minimum(lengths[at] - offset, 8)]
        mixed = (word[at] ^ part) * BY_WORD[0]
        word[at] = mixed ^ (mixed >> np.uint64(29))
    return word * BY_WORD[1]


def item_texts(task: Task) -> Iterator[str]:
    """Every example of `task` as the texts that training might have seen: the question with each answer."""
    for example in task.examples:
        yield from map(" ".join, task.options(example))


def index_of(bundle: Bundle) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Sorted hashes of the runs of all items, for each its tasks as bits, and by task the texts without one."""
    count = len(bundle.tasks)
    if count > MOST_TASKS:
        raise DataError(f"{bundle.path} has {count} tasks; training text is compared with at most {MOST_TASKS}")
    found, without = [], []
    for task in bundle.tasks:
        texts = list(item_texts(task))
        runs, text = word_runs(texts)
        found.append(np.unique(runs))
        without.append(len(texts) - len(np.unique(text)))
    runs, which = np.unique(np.concatenate(found), return_inverse=True)
    tasks = np.zeros(len(runs), np.uint64)
    bits = np.uint64(1) << np.arange(count, dtype=np.uint64)
    np.bitwise_or.at(tasks, which, np.repeat(bits, [len(part) for part in found]))
    return runs, tasks, without


class Finder:
    """Counts the documents that hold a run of the index, by task."""

    def __init__(self, runs: np.ndarray, tasks: np.ndarray, task_count: int) -> None:
        self._runs, self._tasks = runs, tasks
        self._may = np.zeros(1 << FILTER_BITS, bool)
        self._may[runs >> np.uint64(64 - FILTER_BITS)] = True
        self.by_task = np.zeros(task_count, np.int64)
        self.any = self.documents = 0

    def look(self, texts: list[str]) -> None:
        runs, text = word_runs(texts)
        maybe = np.flatnonzero(self._may[runs >> np.uint64(64 - FILTER_BITS)])
        runs, text = runs[maybe], text[maybe]
        at = np.minimum(np.searchsorted(self._runs, runs), len(self._runs) - 1)
        same = self._runs[at] == runs
        tasks = np.zeros(len(texts), np.uint64)
        np.bitwise_or.at(tasks, text[same], self._tasks[at[same]])
        bits = np.uint64(1) << np.arange(len(self.by_task), dtype=np.uint64)
        self.by_task += np.count_nonzero(tasks[:, None] & bits, axis=0)
        self.any += int(np.count_nonzero(tasks))
        self.documents += len(texts)


@dataclasses.dataclass(frozen=True)
class LeakTask:
    """The training documents of one shard; its result is (documents, documents with a run, by task)."""

    shard: Shard
    split: Split
    index: Path
    task_count: int

    def run(self, advance: Callable[[int], None]) -> tuple[int, int, list[int]]:
        with np.load(self.index) as index:
            finder = Finder(index["runs"], index["tasks"], self.task_count)
        for batch in batches(documents(self.shard, self.split, held_out=False, counts=Counts()), BATCH_CHARS):
            finder.look(batch)
            advance(sum(map(len, batch)))
        return finder.documents, finder.any, finder.by_task.tolist()


def seal_leaks(
    prepared: Prepared,
    out: Path,
    data: DataConfig,
    bundle: Bundle,
    reporter: Reporter,
    workers: int,
    cache: ArtifactCache | None = None,
) -> Sealed | None:
    """`leaks-<bundle>` beside the rows of a whole set: its training documents that share a run with each task's items.

    Taken from `cache` where that has it. Else None without `workers` to count with, or (with a warning) without the
    text, where the rows were pulled.
    """
    path = prepared.path / f"leaks-{bundle.id}"
    files = len(prepared.metadata["files"])
    made_from = {"prepared": prepared.id, "bundle": bundle.id, "files": files}
    if is_sealed(path) and open_sealed(path, kind="leaks").made_from != made_from:
        shutil.rmtree(path)
    if cache and not is_sealed(path):
        for _ in cache.pull([Artifact(path, "leaks", made_from)]):
            pass
    if not is_sealed(path):
        if not workers:
            return None
        source = open_source(data, out)
        split = ByShard(prepared.path / "split" / "hashes.npy") if source.val else ByHash(data.val_fraction)
        shards = source.shards[:files]
        if isinstance(source, HubSource):
            source.hub.close()
            if not all((source.hub.folder / shard.name).is_file() for shard in shards):
                text = "leaks were not counted: the rows were pulled, and their text is not here"
                reporter.emit("warning", text=text)
                return None
        with sealing(path, kind="leaks", made_from=made_from) as folder:
            folder.facts |= _count(folder.path / "index.npz", shards, split, bundle, reporter, workers)
    sealed = open_sealed(path, kind="leaks")
    reporter.emit("prepare.leaks", bundle=bundle.id, **sealed.facts)
    return sealed


def _count(
    index: Path, shards: tuple[Shard, ...], split: Split, bundle: Bundle, reporter: Reporter, workers: int
) -> dict[str, Any]:
    runs, tasks, without = index_of(bundle)
    np.savez(index, runs=runs, tasks=tasks)
    total = sum(shard.size for shard in shards)

    def show(done: int) -> None:
        reporter.progress("leaks", min(done, total), total, "bytes")

    work = [LeakTask(shard, split, index, len(bundle.tasks)) for shard in shards]
    results = [result for _, result in run_tasks(work, workers, show)]
    index.unlink()
    by_task = np.sum([counts for _, _, counts in results], axis=0).tolist()
    labels = [task.label for task in bundle.tasks]
    return {
        "words": WORDS,
        "documents": sum(count for count, _, _ in results),
        "shared": sum(count for _, count, _ in results),
        "by_task": dict(zip(labels, by_task, strict=True)),
        "texts_too_short": dict(zip(labels, without, strict=True)),
    }
