"""prepare: from text to a sealed tokenizer, held-out rows and training rows, once.

    prepared/<id>/tokenizer     trained on training documents
    prepared/<id>/val           rows.npy of the held-out documents of all shards; held_out.jsonl, some of their texts
    prepared/<id>/rows/00000    rows.npy of the training documents of shard 0; and so on
    prepared/<id>/set           names the row files and their totals; written last: the set is whole

The id is a hash of what the rows are made from: the text's identity, the recipe's [data], the row length and FORMAT. Each part is a
sealed folder made by one worker from one shard, so that an interrupted prepare goes on with what is missing, and equal inputs
give equal bytes on any number of workers.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from job.data.pack import PackCounts, pack, write_rows
from job.data.sources import Counts, Shard, Source, documents, open_source
from job.data.tokenizer import Tokenizer, train_tokenizer
from job.data.workers import run_tasks
from job.errors import DataError, StorageError
from job.progress import Reporter
from job.sealed import Sealed, content_id, is_sealed, open_sealed, sealing, storage_errors

if TYPE_CHECKING:
    from job.config import DataConfig

FORMAT = 1
"""Raised whenever the same inputs would give other bytes."""
REPORTED = ("train_rows", "val_rows", "train_tokens", "val_tokens", "vocab_size", "seq_len", "bytes_per_token", "crop_share")
HELD_OUT_BYTES = 2 << 20
SAMPLE_CHARS = 1 << 20
PROGRESS_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A whole prepared set. `facts`: train_rows, val_rows, train_tokens, val_tokens, vocab_size, seq_len, files, crop_share."""

    path: Path
    id: str
    made_from: dict[str, Any]
    facts: dict[str, Any]

    @classmethod
    def open(cls, path: Path, verify: bool = False) -> Prepared:
        """Open `prepared/<id>`; every size is compared, and with `verify` every hash. DataError names what is missing."""
        whole = open_sealed(path / "set", kind="prepared")
        open_sealed(path / "tokenizer", kind="tokenizer")
        open_sealed(path / "val", kind="val", verify=verify)
        for file in whole.facts["files"]:
            open_sealed(path / "rows" / file["name"], kind="rows", verify=verify)
        return cls(path, whole.id, whole.made_from, whole.facts)

    @property
    def seq_len(self) -> int:
        return self.facts["seq_len"]

    @property
    def train_rows(self) -> int:
        return self.facts["train_rows"]

    @property
    def row_files(self) -> list[Path]:
        """The .npy files of training rows in order, each (n, T+1) uint16 with n > 0."""
        return [self.path / "rows" / file["name"] / "rows.npy" for file in self.facts["files"] if file["rows"]]

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


def prepare(out: Path, data: DataConfig, seq_len: int, reporter: Reporter, workers: int) -> Prepared:
    """Make (or finish, or find) the prepared set of `data` with rows of seq_len + 1 tokens below `out`/prepared.

    Raises DataError for text that is missing, damaged or too small, StorageError when `out` cannot be written.
    """
    source = open_source(data)
    made_from = {"format": FORMAT, "text": source.identity, "data": _relevant(data), "seq_len": seq_len}
    root = Path(out) / "prepared" / content_id("prepared", made_from)
    _make_folder(root)
    tokenizer = _sealed_tokenizer(root, source, data, reporter)
    tasks = _tasks(root, source, data, seq_len)
    _run(tasks, workers, reporter)
    if not is_sealed(root / "set"):
        _seal_set(root, made_from, tokenizer, tasks)
    prepared = Prepared.open(root, verify=True)
    reporter.emit("prepare.done", id=prepared.id, **{key: prepared.facts[key] for key in REPORTED})
    return prepared


def _relevant(data: DataConfig) -> dict[str, Any]:
    """What of the recipe's [data] decides the bytes of rows, beside the text itself."""
    return {**_of_tokenizer(data), "split_long": data.split_long, "seed": data.seed}


def _of_tokenizer(data: DataConfig) -> dict[str, Any]:
    keys = ("vocab_size", "tokenizer_chars", "document_chars", "val_fraction", "max_chars")
    return {key: getattr(data, key) for key in keys}


def _make_folder(root: Path) -> None:
    try:
        with storage_errors(root):
            root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (root, *root.parents) if path.is_file())
        raise StorageError(f"{root} cannot be made: {file} is a file, not a folder; choose another --out") from error


# ---------------------------------------------------------------------------------------------------------------- tokenizer


def _sealed_tokenizer(root: Path, source: Source, data: DataConfig, reporter: Reporter) -> Sealed:
    path = root / "tokenizer"
    made_from = {"format": FORMAT, "text": source.identity, "data": _of_tokenizer(data)}
    if not is_sealed(path):
        started = time.perf_counter()
        reporter.progress("tokenizer", 0, 1, "vocabularies")
        with sealing(path, kind="tokenizer", made_from=made_from) as folder:
            tokenizer, characters = train_tokenizer(
                _training_text(source, data),
                vocab_size=data.vocab_size,
                max_chars=data.tokenizer_chars,
                document_chars=data.document_chars,
            )
            tokenizer.save(folder.path)
            bytes_per_token = _bytes_per_token(tokenizer, _training_text(source, data))
            folder.facts |= {"vocab_size": data.vocab_size, "characters": characters, "bytes_per_token": bytes_per_token}
            reporter.emit("prepare.tokenizer", **folder.facts, seconds=time.perf_counter() - started)
        reporter.progress("tokenizer", 1, 1, "vocabularies")
    return open_sealed(path, kind="tokenizer")


def _training_text(source: Source, data: DataConfig) -> Iterator[str]:
    return itertools.chain.from_iterable(
        documents(shard, data.val_fraction, held_out=False, counts=Counts()) for shard in source.shards
    )


def _bytes_per_token(tokenizer: Tokenizer, texts: Iterator[str]) -> float:
    """Of the first SAMPLE_CHARS characters of the training text."""
    characters = size = tokens = 0
    for text in texts:
        characters, size, tokens = characters + len(text), size + len(text.encode()), tokens + len(tokenizer.encode_document(text))
        if characters >= SAMPLE_CHARS:
            break
    return size / tokens


# --------------------------------------------------------------------------------------------------------------------- rows


@dataclasses.dataclass(frozen=True)
class PackTask:
    """One sealed folder of rows: the documents of `shards` on one side of the split."""

    name: str
    path: Path
    kind: str
    made_from: dict[str, Any]
    shards: tuple[Shard, ...]
    tokenizer: Path
    data: DataConfig
    seq_len: int

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)

    def run(self, advance: Callable[[int], None]) -> dict[str, Any]:
        """Encode, pack and seal; the manifest's facts."""
        started = time.perf_counter()
        tokenizer = Tokenizer.load(self.tokenizer)
        counts, packed = Counts(), PackCounts()
        with sealing(self.path, kind=self.kind, made_from=self.made_from) as folder:
            texts = _advancing(self._texts(counts), advance)
            if self.kind == "val":
                texts = _kept(texts, folder.path / "held_out.jsonl")
            rows = pack(
                map(tokenizer.encode_document, texts),
                row_tokens=self.seq_len + 1,
                bos=tokenizer.bos_id,
                split_long=self.data.split_long,
                counts=packed,
            )
            write_rows(folder.path / "rows.npy", rows, self.seq_len + 1, (self.data.seed, "stored", self.path.name))
            if self.kind == "val" and not packed.rows:
                raise self._too_small(packed)
            share = packed.cropped_tokens / max(1, packed.tokens)
            folder.facts |= {
                "shard": self.name,
                **dataclasses.asdict(packed),
                "bytes": counts.bytes,
                "skipped": counts.skipped,
                "crop_share": share,
            }
            return folder.facts | {"seconds": time.perf_counter() - started}

    def _texts(self, counts: Counts) -> Iterator[str]:
        for shard in self.shards:
            yield from documents(shard, self.data.val_fraction, held_out=self.kind == "val", counts=counts)

    def _too_small(self, packed: PackCounts) -> DataError:
        return DataError(
            f"the held-out text ({packed.documents} documents, {packed.tokens} tokens) does not fill one row of {self.seq_len + 1}"
            " tokens; give more text, a larger data.val_fraction or a smaller model.seq_len"
        )


def _tasks(root: Path, source: Source, data: DataConfig, seq_len: int) -> list[PackTask]:
    """The held-out rows, then each shard's training rows."""

    def task(part: str, kind: str, name: str, shards: tuple[Shard, ...]) -> PackTask:
        made_from = {"prepared": root.name, "part": part, "shard": name}
        return PackTask(name, root / part, kind, made_from, shards, root / "tokenizer", data, seq_len)

    rows = (task(f"rows/{index:05d}", "rows", shard.name, (shard,)) for index, shard in enumerate(source.shards))
    return [task("val", "val", "held-out", source.shards), *rows]


def _run(tasks: list[PackTask], workers: int, reporter: Reporter) -> None:
    """Do what is not sealed yet, reporting each part as it ends."""
    missing = [task for task in tasks if not is_sealed(task.path)]
    total, done = sum(task.size for task in missing), [0]

    def advance(amount: int) -> None:
        done[0] += amount
        reporter.progress("rows", min(done[0], total), total, "bytes")

    for _, facts in run_tasks(missing, workers, advance):
        keys = ("shard", "rows", "documents", "tokens", "bytes", "cropped_tokens", "crop_share", "seconds")
        reporter.emit("prepare.rows", **{key: facts[key] for key in keys})


def _advancing(texts: Iterator[str], advance: Callable[[int], None]) -> Iterator[str]:
    """`texts`, telling `advance` of their characters now and then."""
    characters = 0
    for text in texts:
        yield text
        characters += len(text)
        if characters >= PROGRESS_BYTES:
            advance(characters)
            characters = 0
    advance(characters)


def _kept(texts: Iterator[str], file: Path) -> Iterator[str]:
    """`texts`, the first HELD_OUT_BYTES of them also written to `file`, whole documents."""
    left = HELD_OUT_BYTES
    with open(file, "w", encoding="utf-8") as handle:
        for text in texts:
            size = len(text.encode())
            if size <= left:
                handle.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                left -= size
            yield text


def _seal_set(root: Path, made_from: dict[str, Any], tokenizer: Sealed, tasks: list[PackTask]) -> None:
    """Name the parts and their totals; DataError when there is not one row to train on."""
    val, *parts = [open_sealed(task.path, kind=task.kind, verify=False).facts for task in tasks]
    rows = sum(part["rows"] for part in parts)
    seq_len = made_from["seq_len"]
    if not rows:
        tokens = sum(part["tokens"] for part in parts)
        raise DataError(
            f"the training text ({tokens} tokens) does not fill one row of {seq_len + 1} tokens;"
            " give more text or a smaller model.seq_len"
        )
    totals = {
        key: sum(part[key] for part in parts) for key in ("documents", "tokens", "bytes", "cropped_tokens", "split_bos", "skipped")
    }
    with sealing(root / "set", kind="prepared", made_from=made_from) as folder:
        folder.facts |= {
            "files": [{"name": task.path.name, "rows": part["rows"]} for task, part in zip(tasks[1:], parts, strict=True)],
            "train_rows": rows,
            "train_tokens": rows * seq_len,
            "val_rows": val["rows"],
            "val_tokens": val["rows"] * seq_len,
            "vocab_size": tokenizer.facts["vocab_size"],
            "bytes_per_token": tokenizer.facts["bytes_per_token"],
            "seq_len": seq_len,
            "crop_share": totals["cropped_tokens"] / totals["tokens"],
            **totals,
        }
