"""prepare: from text to a sealed tokenizer, held-out rows and training rows, once.

    prepared/<id>/split         hashes.npy of the validation shard's documents (named datasets only)
    prepared/<id>/tokenizer     trained on training documents
    prepared/<id>/val           rows.npy of the held-out documents; held_out.jsonl, some of their texts
    prepared/<id>/rows/00000    rows.npy of the training documents of shard 0; and so on
    prepared/<id>/begun         training can start: what precedes is sealed (named datasets only)
    prepared/<id>/set           names the row files and their totals; written last: the set is whole

The id is a hash of what the rows are made from: the text's identity, the recipe's [data], the row length and FORMAT.
Each artifact is a sealed folder made by one worker from one shard, so that an interrupted prepare goes on with what is
missing, and equal inputs give equal bytes on any number of workers.

Of a named dataset no run needs all. Its shards are fetched and packed in their order until their rows are enough for
the run that asks; how many shards that takes is estimated from the rows of those packed so far. The id does not depend
on it: a longer run adds row files to the same set, and rows that exist never move. `prepare(..., whole=False)` returns
when the first row file is sealed, for training to start while `job.run.background` makes the rest.

With a store, the dataset's commit is what the store says, and every artifact that it has under the same id is pulled
instead of made.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from job.data.documents import ByHash, ByShard, Counts, Shard, Split, document_hash, documents
from job.data.hub import HubSource
from job.data.identity import set_folder, set_inputs, tokenizer_inputs
from job.data.lock import alone
from job.data.pack import PackTask, permutation
from job.data.sources import open_source
from job.data.tokenizer import Tokenizer, bytes_per_token, check_memory, train_tokenizer
from job.data.workers import run_tasks
from job.errors import DataError
from job.recipe.config import DataConfig
from job.reporter import Reporter
from job.store.artifact_cache import Artifact, ArtifactCache
from job.store.damaged import verify_once
from job.store.sealed import Sealed, content_id, is_sealed, open_sealed, sealing
from job.store.stores import Store

LEFT_OUT_NAMED = 5
REPORTED = (
    "train_rows",
    "val_rows",
    "train_tokens",
    "val_tokens",
    "vocab_size",
    "seq_len",
    "bytes_per_token",
    "crop_share",
)
HELD_OUT = "held-out"
ASSUMED_CROP = 0.3
"""of a dataset's tokens, until its first shard is packed; less than job.data.hub.CROP_SHARE, since too few shards are
soon more"""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared set, whole or begun.

    `metadata` has train_rows, val_rows, train_tokens, val_tokens, vocab_size, seq_len, files and crop_share; of a set
    that is only begun, `files` is empty and train_rows what the run that began it needs.
    """

    path: Path
    id: str
    inputs: dict[str, Any]
    metadata: dict[str, Any]

    @classmethod
    def open(cls, path: Path, verify: bool = False) -> Prepared:
        """Open `prepared/<id>`; sizes are compared, with `verify` hashes. DataError names what is missing."""
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
        return bool(self.metadata["files"])

    @property
    def seq_len(self) -> int:
        return self.metadata["seq_len"]

    @property
    def train_rows(self) -> int:
        return self.metadata["train_rows"]

    @property
    def row_files(self) -> list[Path]:
        """The .npy files of training rows that are sealed so far, in order, each (n, T+1) uint16 with n > 0."""
        if self.is_whole:
            return [self.path / "rows" / file["name"] / "rows.npy" for file in self.metadata["files"] if file["rows"]]
        folders = itertools.takewhile(is_sealed, (self.path / "rows" / f"{index:05d}" for index in itertools.count()))
        return [path / "rows.npy" for path in folders if open_sealed(path, kind="rows", verify=False).facts["rows"]]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path / "tokenizer")

    @cached_property
    def val(self) -> np.ndarray:
        """(n, T+1) uint16, memory-mapped: rows of held-out documents."""
        return np.load(self.path / "val" / "rows.npy", mmap_mode="r")

    def val_as_packed(self, count: int) -> np.ndarray:
        """(count, T+1) uint16: the rows of held-out documents that the packer made first."""
        order = permutation(len(self.val), self.inputs["data"]["seed"], "stored", "val")  # (n,), as `write_rows` has it
        return self.val[np.argsort(order)[:count]]

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
    start. Artifacts that `store` has are pulled from there. Raises DataError for text that is missing, damaged or too
    small, StorageError when `out` cannot be written.
    """
    builder = DatasetBuilder(out, data, seq_len, reporter, workers, rows, store)
    hub = builder.hub
    reporter.emit("prepare.started", id=builder.root.name)
    if left_out := builder.source.left_out:
        named = ", ".join(left_out[:LEFT_OUT_NAMED]) + (", ..." if len(left_out) > LEFT_OUT_NAMED else "")
        reporter.emit(
            "warning", text=f"{len(left_out)} entries of the data's folders are left out, being no text: {named}"
        )
    try:
        with alone(builder.root, reporter):
            verify_once(builder.root, reporter)
            prepared = builder.build() if whole or hub is None else builder.begin()
    finally:
        if hub:
            hub.close()
    done = {key: prepared.metadata[key] for key in REPORTED}
    if data.source == "local":
        done["read"] = Counter(Path(file["name"]).suffix.lower() for file in builder.source.identity["files"])
    reporter.emit("prepare.done", id=prepared.id, **done)
    return prepared


class DatasetBuilder:
    """A prepared set being made: what it is made from, where, and the artifacts that are there."""

    def __init__(
        self,
        out: Path,
        data: DataConfig,
        seq_len: int,
        reporter: Reporter,
        workers: int,
        rows: int,
        store: Store | None,
    ) -> None:
        self.data, self.seq_len, self.reporter, self.workers = data, seq_len, reporter, workers
        self.source = open_source(data, out, store)
        self.hub = self.source.hub if isinstance(self.source, HubSource) else None
        self.rows = rows or math.inf
        text = self.source.identity
        self.inputs = set_inputs(data, seq_len, text)
        self.root = out / set_folder(self.inputs)
        self.cache = ArtifactCache(store, self.root, reporter)
        self.tokenizer = Artifact(self.root / "tokenizer", "tokenizer", tokenizer_inputs(data, text))
        val = self.source.val
        self.split = Artifact(self.root / "split", "split", {"text": text, "shard": val.name if val else None})
        if self.hub:
            self.hub.progress = lambda done, total: reporter.progress("fetch", done, total, "bytes")

    def build(self) -> Prepared:
        """Make what is missing; the whole set."""
        if not self._is_enough():
            tokenizer, tasks = self._start()
            self._seal_set(tokenizer, tasks[0], self._pack_all(tasks, tokenizer))
        return Prepared.open(self.root)

    def begin(self) -> Prepared:
        """Make tokenizer, held-out rows and the first row file; the set so far."""
        if not self._is_enough():
            tokenizer, tasks = self._start()
            self._pack(tasks[:2])
            first = _metadata(tasks[1])
            with sealing(self.root / "begun", kind="begun", made_from=self.inputs) as folder:
                rows = int(min(self.rows, first["rows"] * len(self.source.shards)))
                totals = {"train_rows": rows, "train_tokens": rows * self.seq_len, "crop_share": first["crop_share"]}
                folder.facts |= {"files": [], **totals, **self._shared_metadata(tokenizer, tasks[0])}
            # a shorter run's set: its row files are the first of this one
            shutil.rmtree(self.root / "set", ignore_errors=True)
        return Prepared.open(self.root)

    def _is_enough(self) -> bool:
        """Whether the set is sealed with all the rows that are asked for, and its artifacts are there."""
        if not is_sealed(self.root / "set"):
            return False
        metadata = open_sealed(self.root / "set", kind="prepared").facts
        parts = ["tokenizer", "val", *(f"rows/{file['name']}" for file in metadata["files"])]
        if not all(is_sealed(self.root / part) for part in parts):
            return False
        all_files = len(metadata["files"]) == len(self.source.shards)
        return not self.hub or all_files or metadata["train_rows"] >= self.rows

    def _start(self) -> tuple[Sealed, list[PackTask]]:
        """The tokenizer, and a task for every folder of rows: the held-out ones, then each shard's training rows."""
        val, shards = self.source.val, self.source.shards
        split: Split = ByShard(self.split.path / "hashes.npy") if val else ByHash(self.data.val_fraction)

        def task(part: str, kind: str, name: str, members: tuple[Shard, ...]) -> PackTask:
            inputs = {"prepared": self.root.name, "part": part, "shard": name}
            artifact = Artifact(self.root / part, kind, inputs)
            return PackTask(name, artifact, members, self.tokenizer.path, split, self.data, self.seq_len)

        held_out = task("val", "val", HELD_OUT, (val,) if val else shards)
        rows = [task(f"rows/{index:05d}", "rows", shard.name, (shard,)) for index, shard in enumerate(shards)]
        for sealed, seconds in self.cache.pull([self.tokenizer, *([self.split, held_out.artifact] if val else [])]):
            if sealed.kind == "tokenizer":
                self.reporter.emit("prepare.tokenizer", **sealed.facts, seconds=seconds, pulled=True)
            elif sealed.kind == "val":
                self._report(sealed.facts | {"seconds": seconds, "pulled": True})
        if self.hub:
            is_here = is_sealed(held_out.artifact.path) and is_sealed(self.split.path)
            wanted = [val] if val and not is_here else []
            if not is_sealed(self.tokenizer.path):
                wanted += shards[: math.ceil(self.data.tokenizer_chars / shards[0].size)]
            self.hub.want([shard.name for shard in wanted])
        if val and not is_sealed(self.split.path):
            self._seal_split(val)
        if not is_sealed(self.tokenizer.path):
            self._seal_tokenizer(split)
        return open_sealed(self.tokenizer.path, kind="tokenizer"), [held_out, *rows]

    def _seal_split(self, val: Shard) -> None:
        if self.hub:
            self.hub.wait(val.name)
        with sealing(self.split.path, kind="split", made_from=self.split.inputs) as folder:
            hashes = {document_hash(text.encode()) for text in val.texts() if text is not None}
            np.save(folder.path / "hashes.npy", np.array(sorted(hashes), dtype=np.uint64))

    def _seal_tokenizer(self, split: Split) -> None:
        started, data = time.perf_counter(), self.data
        check_memory(min(data.tokenizer_chars, sum(shard.size for shard in self.source.shards)), self.reporter)
        self.reporter.progress("tokenizer", 0, 1, "vocabularies")
        with sealing(self.tokenizer.path, kind="tokenizer", made_from=self.tokenizer.inputs) as folder:
            tokenizer, characters = train_tokenizer(
                self._training_text(split),
                vocab_size=data.vocab_size,
                max_chars=data.tokenizer_chars,
                document_chars=data.document_chars,
            )
            tokenizer.save(folder.path)
            measured = bytes_per_token(tokenizer, self._training_text(split))
            sizes = {"vocab_size": data.vocab_size, "characters": characters}
            folder.facts |= sizes | {"bytes_per_token": measured}
            self.reporter.emit("prepare.tokenizer", **folder.facts, seconds=time.perf_counter() - started)
        self.reporter.progress("tokenizer", 1, 1, "vocabularies")

    def _training_text(self, split: Split) -> Iterator[str]:
        """Training documents from the first shard on: the order is the source's, whatever has arrived."""
        for shard in self.source.shards:
            if self.hub:
                self.hub.want([shard.name])
                self.hub.wait(shard.name)
            yield from documents(shard, split, held_out=False, counts=Counts())

    # ---- rows

    def _pack_all(self, tasks: list[PackTask], tokenizer: Sealed) -> list[dict[str, Any]]:
        """Pack the held-out rows and as many shards as it takes; the metadata of those row files, in order."""
        held_out, *rows = tasks
        if not self.hub:
            self._pack(tasks)
            return [_metadata(task) for task in rows]
        kept = 1.0 if self.data.split_long else 1 - ASSUMED_CROP
        per_file = kept * rows[0].size / tokenizer.facts["bytes_per_token"] / (self.seq_len + 1)
        self._pack([held_out])
        self._pull_enough(rows)
        while True:
            made = [_metadata(task) for task in itertools.takewhile(lambda task: is_sealed(task.artifact.path), rows)]
            sums = list(itertools.accumulate(metadata["rows"] for metadata in made))
            enough = next((count for count, total in enumerate(sums, 1) if total >= self.rows), 0)
            if enough or len(made) == len(rows):
                return made[: enough or len(made)]
            if made:
                per_file = max(1.0, sums[-1] / len(made))
            missing = (self.rows - (sums[-1] if sums else 0)) / per_file
            self._pack(rows[: int(min(len(rows), len(made) + math.ceil(missing)))] if missing < len(rows) else rows)

    def _pack(self, tasks: list[PackTask]) -> None:
        """Pull what is not sealed yet, and make what cannot be pulled, reporting each artifact as it ends."""
        self._pull(tasks)
        missing = [task for task in tasks if not is_sealed(task.artifact.path)]
        hub, total = self.hub, sum(task.size for task in missing)
        if hub:
            hub.want([shard.name for task in missing for shard in task.shards], 2 * total // 3)

        def show(done: int) -> None:
            self.reporter.progress("rows", min(done, total), total, "bytes")

        def is_ready(task: PackTask) -> bool:
            return hub is None or all([hub.is_here(shard.name) for shard in task.shards])

        for _, metadata in run_tasks(missing, self.workers, show, is_ready):
            self._report(metadata)

    def _pull(self, tasks: list[PackTask]) -> None:
        for sealed, seconds in self.cache.pull([task.artifact for task in tasks]):
            self._report(sealed.facts | {"seconds": seconds, "pulled": True})

    def _pull_enough(self, tasks: list[PackTask]) -> None:
        """Pull row files in their order, no more than the run needs: a file's size says how many rows it holds."""
        total, wanted = 0, []
        for task in tasks:
            is_here = is_sealed(task.artifact.path)
            if total >= self.rows or not (is_here or self.cache.has(task.artifact)):
                break
            row_bytes = 2 * (self.seq_len + 1)
            total += _metadata(task)["rows"] if is_here else self.cache.size(task.artifact) // row_bytes
            wanted.append(task)
        self._pull(wanted)

    def _report(self, metadata: dict[str, Any]) -> None:
        keys = ("shard", "rows", "documents", "tokens", "bytes", "cropped_tokens", "crop_share", "seconds", "pulled")
        self.reporter.emit("prepare.rows", **{key: metadata[key] for key in keys if key in metadata})

    def _seal_set(self, tokenizer: Sealed, held_out: PackTask, files: list[dict[str, Any]]) -> None:
        """Name the row files and their totals; DataError when there is not one row to train on."""
        rows = sum(file["rows"] for file in files)
        if not rows:
            tokens = sum(file["tokens"] for file in files)
            raise DataError(
                f"the training text ({tokens} tokens) does not fill one row of {self.seq_len + 1} tokens;"
                " give more text or a smaller model.seq_len"
            )
        summed = ("documents", "tokens", "bytes", "cropped_tokens", "split_bos", "skipped")
        totals = {key: sum(file[key] for file in files) for key in summed}
        with sealing(self.root / "set", kind="prepared", made_from=self.inputs) as folder:
            folder.facts |= {
                "files": [{"name": f"{index:05d}", "rows": file["rows"]} for index, file in enumerate(files)],
                "train_rows": rows,
                "train_tokens": rows * self.seq_len,
                "crop_share": totals["cropped_tokens"] / totals["tokens"],
                **self._shared_metadata(tokenizer, held_out),
                **totals,
            }

    def _shared_metadata(self, tokenizer: Sealed, held_out: PackTask) -> dict[str, Any]:
        val_rows = _metadata(held_out)["rows"]
        return {
            "val_rows": val_rows,
            "val_tokens": val_rows * self.seq_len,
            "vocab_size": tokenizer.facts["vocab_size"],
            "bytes_per_token": tokenizer.facts["bytes_per_token"],
            "seq_len": self.seq_len,
        }


def _metadata(task: PackTask) -> dict[str, Any]:
    return open_sealed(task.artifact.path, kind=task.artifact.kind, verify=False).facts
