"""prepare: from text to a sealed tokenizer, held-out rows and training rows, once.

    prepared/<id>/split         hashes.npy of the validation shard's documents (named datasets only)
    prepared/<id>/tokenizer     trained on training documents
    prepared/<id>/val           rows.npy of the held-out documents; held_out.jsonl, some of their texts
    prepared/<id>/rows/00000    rows.npy of the training documents of shard 0; and so on
    prepared/<id>/begun         training can start: what precedes is sealed (named datasets only)
    prepared/<id>/set           names the row files and their totals; written last: the set is whole

The id is a hash of what the rows are made from: the text's identity, the recipe's [data], the row length and FORMAT.
Each part is a sealed folder made by one worker from one shard, so that an interrupted prepare goes on with what is
missing, and equal inputs give equal bytes on any number of workers.

Of a named dataset no run needs all. Its shards are fetched and packed in their order until their rows are enough for
the run that asks; how many shards that takes is estimated from the rows of those packed so far. The id does not depend
on it: a longer run adds row files to the same set, and rows that exist never move. `prepare(..., whole=False)` returns
when the first row file is sealed, for training to start while `job.data.feed` makes the rest.

With a store, the dataset's commit is what the store says, and every part that it has under the same id is pulled
instead of made.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from job.data.lock import alone, make_folder
from job.data.memory import check_training
from job.data.pack_task import PackTask
from job.data.sources import ByHash, ByShard, Counts, Shard, Source, Split, document_hash, documents, open_source
from job.data.tokenizer import Tokenizer, bytes_per_token, train_tokenizer
from job.data.workers import run_tasks
from job.errors import DataError
from job.reporter import Reporter
from job.store.artifact_cache import Artifact, ArtifactCache
from job.store.sealed import Sealed, content_id, is_sealed, open_sealed, sealing
from job.store.stores import Store

if TYPE_CHECKING:
    from job.recipe.config import DataConfig

FORMAT = 1
"""Raised whenever the same inputs would give other bytes."""
REPORTED = ("train_rows", "val_rows", "train_tokens", "val_tokens", "vocab_size", "seq_len", "bytes_per_token")
HELD_OUT = "held-out"
ASSUMED_CROP = 0.3
"""of a dataset's tokens, until its first shard is packed; FineWeb-Edu's is 0.346 (leaderboard §6), and too few shards
are soon more"""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared set, whole or begun. `facts`: train_rows, val_rows, train_tokens, val_tokens, vocab_size, seq_len,
    files, crop_share; of a set that is only begun, `files` is empty and train_rows what the run that began it needs."""

    path: Path
    id: str
    made_from: dict[str, Any]
    facts: dict[str, Any]

    @classmethod
    def open(cls, path: Path, verify: bool = False) -> Prepared:
        """Open `prepared/<id>`; every size is compared, and with `verify` every hash. DataError names what is
        missing."""
        begun = not is_sealed(path / "set") and is_sealed(path / "begun")
        top = open_sealed(path / "begun", kind="begun") if begun else open_sealed(path / "set", kind="prepared")
        open_sealed(path / "tokenizer", kind="tokenizer")
        open_sealed(path / "val", kind="val", verify=verify)
        for file in top.facts["files"]:
            open_sealed(path / "rows" / file["name"], kind="rows", verify=verify)
        return cls(path, content_id("prepared", top.made_from), top.made_from, top.facts)

    @property
    def is_whole(self) -> bool:
        """Whether this is all of it; the row files of a set that is only begun are found by `Rows` as they come."""
        return bool(self.facts["files"])

    @property
    def seq_len(self) -> int:
        return self.facts["seq_len"]

    @property
    def train_rows(self) -> int:
        return self.facts["train_rows"]

    @property
    def row_files(self) -> list[Path]:
        """The .npy files of training rows in order, each (n, T+1) uint16 with n > 0; of a set only begun, those sealed
        so far."""
        if self.is_whole:
            return [self.path / "rows" / file["name"] / "rows.npy" for file in self.facts["files"] if file["rows"]]
        folders = itertools.takewhile(is_sealed, (self.path / "rows" / f"{index:05d}" for index in itertools.count()))
        return [path / "rows.npy" for path in folders if open_sealed(path, kind="rows", verify=False).facts["rows"]]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path / "tokenizer")

    @cached_property
    def val(self) -> np.ndarray:
        """(n, T+1) uint16, memory-mapped: rows of held-out documents."""
        return np.load(self.path / "val" / "rows.npy", mmap_mode="r")

    def held_out_documents(self) -> list[str]:
        """The first held-out documents, whole, about 2 MB at most."""
        with open(self.path / "val" / "held_out.jsonl", encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines]


def prepare(
    out: Path,
    data: DataConfig,
    seq_len: int,
    reporter: Reporter,
    workers: int,
    *,
    rows: int = 0,
    whole: bool = True,
    store: Store | None = None,
) -> Prepared:
    """Make (or finish, or find) the prepared set of `data` with rows of seq_len + 1 tokens below `out`/prepared.

    Of a named dataset, `rows` training rows are made (0: all it has); unless `whole`, only as far as training can
    start. Parts that `store` has are pulled from there. Raises DataError for text that is missing, damaged or too
    small, StorageError when `out` cannot be written.
    """
    source = open_source(data, Path(out), store)
    builder = DatasetBuilder(Path(out), source, data, seq_len, reporter, workers, rows, store)
    make_folder(builder.root)
    reporter.emit("prepare.started", id=builder.root.name)
    try:
        with alone(builder.root, reporter):
            prepared = builder.whole() if whole or source.hub is None else builder.begin()
    finally:
        if source.hub:
            source.hub.close()
    reporter.emit("prepare.done", id=prepared.id, **{key: prepared.facts[key] for key in (*REPORTED, "crop_share")})
    return prepared


class DatasetBuilder:
    """A set being made: what it is made from, where, and the parts that are there."""

    def __init__(
        self,
        out: Path,
        source: Source,
        data: DataConfig,
        seq_len: int,
        reporter: Reporter,
        workers: int,
        rows: int,
        store: Store | None,
    ) -> None:
        self.source, self.data, self.seq_len = source, data, seq_len
        self.reporter, self.workers = reporter, workers
        self.text = {"format": FORMAT, "text": source.identity, "data": self._of_tokenizer()}
        of_rows = {**self._of_tokenizer(), "split_long": data.split_long, "seed": data.seed}
        self.made_from = {"format": FORMAT, "text": source.identity, "data": of_rows, "seq_len": seq_len}
        self.root = out / "prepared" / content_id("prepared", self.made_from)
        self.rows = rows or math.inf
        self.cache = ArtifactCache(store, self.root, reporter)
        if source.hub:
            source.hub.on_progress(lambda done, total: reporter.progress("fetch", done, total, "bytes"))

    def _of_tokenizer(self) -> dict[str, Any]:
        """What of the recipe's [data] decides the tokenizer, beside the text itself."""
        keys = ["vocab_size", "tokenizer_chars", "document_chars"]
        keys += [] if self.source.hub else ["val_fraction", "max_chars"]
        return {key: getattr(self.data, key) for key in keys}

    def whole(self) -> Prepared:
        """Make what is missing; the whole set."""
        if not self._is_enough():
            tokenizer, tasks = self._start()
            parts = self._pack_all(tasks, tokenizer)
            self._seal_set(tokenizer, tasks[0], parts)
        return Prepared.open(self.root, verify=True)

    def begin(self) -> Prepared:
        """Make tokenizer, held-out rows and the first row file; the set so far."""
        if not self._is_enough():
            tokenizer, tasks = self._start()
            self._pack(tasks[:2])
            val, first = (_facts(task) for task in tasks[:2])
            with sealing(self.root / "begun", kind="begun", made_from=self.made_from) as folder:
                rows = int(min(self.rows, first["rows"] * len(self.source.shards)))
                totals = {"train_rows": rows, "train_tokens": rows * self.seq_len, "crop_share": first["crop_share"]}
                folder.facts |= {"files": [], **totals, **self._shared_facts(tokenizer, val)}
            # a shorter run's set: its row files are the first of this one
            shutil.rmtree(self.root / "set", ignore_errors=True)
        return Prepared.open(self.root)

    def _is_enough(self) -> bool:
        """Whether the set is sealed with all the rows that are asked for, and its parts are there."""
        if not is_sealed(self.root / "set"):
            return False
        facts = open_sealed(self.root / "set", kind="prepared").facts
        parts = ["tokenizer", "val", *(f"rows/{file['name']}" for file in facts["files"])]
        if not all(is_sealed(self.root / part) for part in parts):
            return False
        return not self.source.hub or facts["train_rows"] >= self.rows or len(facts["files"]) == len(self.source.shards)

    def _start(self) -> tuple[Sealed, list[PackTask]]:
        """The tokenizer, and a task for every folder of rows that the source can give: the held-out ones, then shard by
        shard."""
        self._pull_the_first()
        if self.source.hub:
            held_out = is_sealed(self.root / "val") and is_sealed(self.root / "split")
            wanted = [] if held_out or self.source.val is None else [self.source.val]
            if not is_sealed(self.root / "tokenizer"):
                wanted += self.source.shards[: math.ceil(self.data.tokenizer_chars / self.source.shards[0].size)]
            self._want(wanted)
        split = self._split()
        return self._tokenizer(split), self._tasks(split)

    def _pull_the_first(self) -> None:
        """Take from the store what all rows depend on, and the held-out rows."""
        parts = [Artifact(self.root / "tokenizer", "tokenizer", self.text)]
        if self.source.val:
            parts.append(Artifact(self.root / "split", "split", self._of_split()))
            parts.append(Artifact(self.root / "val", "val", self._of_rows("val", HELD_OUT)))
        for sealed, seconds in self.cache.pull(parts):
            if sealed.kind == "tokenizer":
                self.reporter.emit("prepare.tokenizer", **sealed.facts, seconds=seconds, pulled=True)
            elif sealed.kind == "val":
                self._report(sealed.facts | {"seconds": seconds, "pulled": True})

    def _want(self, shards: list[Shard], also_bytes: int = 0) -> None:
        if self.source.hub:
            self.source.hub.want([shard.name for shard in shards], also_bytes)

    # ---- split and tokenizer

    def _split(self) -> Split:
        val = self.source.val
        if val is None:
            return ByHash(self.data.val_fraction)
        path = self.root / "split"
        if not is_sealed(path):
            if self.source.hub:
                self.source.hub.wait(val.name)
            with sealing(path, kind="split", made_from=self._of_split()) as folder:
                hashes = {document_hash(text.encode()) for text in val.texts() if text is not None}
                np.save(folder.path / "hashes.npy", np.array(sorted(hashes), dtype=np.uint64))
        return ByShard(open_sealed(path, kind="split").path / "hashes.npy")

    def _of_split(self) -> dict[str, Any]:
        return {"text": self.source.identity, "shard": self.source.val.name if self.source.val else None}

    def _tokenizer(self, split: Split) -> Sealed:
        path = self.root / "tokenizer"
        if not is_sealed(path):
            started = time.perf_counter()
            characters = min(self.data.tokenizer_chars, sum(shard.size for shard in self.source.shards))
            check_training(characters, self.reporter)
            self.reporter.progress("tokenizer", 0, 1, "vocabularies")
            with sealing(path, kind="tokenizer", made_from=self.text) as folder:
                tokenizer, characters = train_tokenizer(
                    self._training_text(split),
                    vocab_size=self.data.vocab_size,
                    max_chars=self.data.tokenizer_chars,
                    document_chars=self.data.document_chars,
                )
                tokenizer.save(folder.path)
                measured = bytes_per_token(tokenizer, self._training_text(split))
                sizes = {"vocab_size": self.data.vocab_size, "characters": characters}
                folder.facts |= sizes | {"bytes_per_token": measured}
                self.reporter.emit("prepare.tokenizer", **folder.facts, seconds=time.perf_counter() - started)
            self.reporter.progress("tokenizer", 1, 1, "vocabularies")
        return open_sealed(path, kind="tokenizer")

    def _training_text(self, split: Split) -> Iterator[str]:
        """Training documents from the first shard on: the order is the source's, whatever has arrived."""
        for shard in self.source.shards:
            if self.source.hub:
                self._want([shard])
                self.source.hub.wait(shard.name)
            yield from documents(shard, split, held_out=False, counts=Counts())

    # ---- rows

    def _tasks(self, split: Split) -> list[PackTask]:
        """The held-out rows, then each shard's training rows."""

        def task(part: str, kind: str, name: str, shards: tuple[Shard, ...]) -> PackTask:
            tokenizer, made_from = self.root / "tokenizer", self._of_rows(part, name)
            return PackTask(name, self.root / part, kind, made_from, shards, tokenizer, split, self.data, self.seq_len)

        held_out = (self.source.val,) if self.source.val else self.source.shards
        shards = enumerate(self.source.shards)
        rows = (task(f"rows/{index:05d}", "rows", shard.name, (shard,)) for index, shard in shards)
        return [task("val", "val", HELD_OUT, held_out), *rows]

    def _of_rows(self, part: str, shard: str) -> dict[str, Any]:
        return {"prepared": self.root.name, "part": part, "shard": shard}

    def _pack(self, tasks: list[PackTask]) -> None:
        """Pull what is not sealed yet, and make what cannot be pulled, reporting each part as it ends."""
        self._pull(tasks)
        missing = [task for task in tasks if not is_sealed(task.path)]
        hub, total, done = self.source.hub, sum(task.size for task in missing), 0
        if hub:
            self._want([shard for task in missing for shard in task.shards], 2 * total // 3)

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            self.reporter.progress("rows", min(done, total), total, "bytes")

        def is_ready(task: PackTask) -> bool:
            return hub is None or all([hub.is_here(shard.name) for shard in task.shards])

        for _, facts in run_tasks(missing, self.workers, advance, is_ready):
            self._report(facts)

    def _pull(self, tasks: list[PackTask]) -> None:
        for sealed, seconds in self.cache.pull([task.artifact for task in tasks]):
            self._report(sealed.facts | {"seconds": seconds, "pulled": True})

    def _pull_enough(self, tasks: list[PackTask]) -> None:
        """Pull row files in their order, no more than the run needs: a file's size says how many rows it holds."""
        total, wanted = 0, []
        for task in tasks:
            if total >= self.rows or not (is_sealed(task.path) or self.cache.has(task.artifact)):
                break
            row_bytes = 2 * (self.seq_len + 1)
            total += _facts(task)["rows"] if is_sealed(task.path) else self.cache.size(task.artifact) // row_bytes
            wanted.append(task)
        self._pull(wanted)

    def _report(self, facts: dict[str, Any]) -> None:
        keys = ("shard", "rows", "documents", "tokens", "bytes", "cropped_tokens", "crop_share", "seconds", "pulled")
        self.reporter.emit("prepare.rows", **{key: facts[key] for key in keys if key in facts})

    def _pack_all(self, tasks: list[PackTask], tokenizer: Sealed) -> list[dict[str, Any]]:
        """Pack the held-out rows and as many shards as it takes; the facts of those row files, in order."""
        if not self.source.hub:
            self._pack(tasks)
            return [_facts(task) for task in tasks[1:]]
        val, *rows = tasks
        kept = 1.0 if self.data.split_long else 1 - ASSUMED_CROP
        per_file = kept * rows[0].size / tokenizer.facts["bytes_per_token"] / (self.seq_len + 1)
        self._pack([val])
        self._pull_enough(rows)
        while True:
            made = [_facts(task) for task in itertools.takewhile(lambda task: is_sealed(task.path), rows)]
            sums = list(itertools.accumulate(facts["rows"] for facts in made))
            enough = next((count for count, total in enumerate(sums, 1) if total >= self.rows), 0)
            if enough or len(made) == len(rows):
                return made[: enough or len(made)]
            if made:
                per_file = max(1.0, sums[-1] / len(made))
            missing = (self.rows - (sums[-1] if sums else 0)) / per_file
            self._pack(rows[: int(min(len(rows), len(made) + math.ceil(missing)))] if missing < len(rows) else rows)

    def _seal_set(self, tokenizer: Sealed, val_task: PackTask, parts: list[dict[str, Any]]) -> None:
        """Name the parts and their totals; DataError when there is not one row to train on."""
        rows = sum(part["rows"] for part in parts)
        if not rows:
            tokens = sum(part["tokens"] for part in parts)
            raise DataError(
                f"the training text ({tokens} tokens) does not fill one row of {self.seq_len + 1} tokens;"
                " give more text or a smaller model.seq_len"
            )
        summed = ("documents", "tokens", "bytes", "cropped_tokens", "split_bos", "skipped")
        totals = {key: sum(part[key] for part in parts) for key in summed}
        with sealing(self.root / "set", kind="prepared", made_from=self.made_from) as folder:
            folder.facts |= {
                "files": [{"name": f"{index:05d}", "rows": part["rows"]} for index, part in enumerate(parts)],
                "train_rows": rows,
                "train_tokens": rows * self.seq_len,
                "crop_share": totals["cropped_tokens"] / totals["tokens"],
                **self._shared_facts(tokenizer, _facts(val_task)),
                **totals,
            }

    def _shared_facts(self, tokenizer: Sealed, val: dict[str, Any]) -> dict[str, Any]:
        return {
            "val_rows": val["rows"],
            "val_tokens": val["rows"] * self.seq_len,
            "vocab_size": tokenizer.facts["vocab_size"],
            "bytes_per_token": tokenizer.facts["bytes_per_token"],
            "seq_len": self.seq_len,
        }


def _facts(task: PackTask) -> dict[str, Any]:
    return open_sealed(task.path, kind=task.kind, verify=False).facts
