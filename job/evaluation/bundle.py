"""An evaluation bundle: tasks, their examples and their random baselines, from a folder, a .zip or a .tar.zst.

    core.yaml                 icl_tasks: label, dataset_uri, num_fewshot, icl_task_type, continuation_delimiter
    eval_meta_data.csv        "Eval Task" and "Random baseline" (per cent) of each label
    eval_data/<dataset_uri>   one JSON example a line

The delimiter is a space when absent. Archives are read in memory (CORE is 48 MB), never unpacked, and may hold
everything below a folder `eval_bundle/`. Only two bundles are ever read: CORE, each of whose files must have the
SHA-256 of `core_v1.py` before it is parsed, and the smoke bundle that this program has written. So the parser is a
plain one.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import yaml

from job.errors import DataError
from job.evaluation.core_v1 import CORE_SHA256
from job.store.documents import canonical_json

MULTIPLE_CHOICE = "multiple_choice"
SCHEMA = "schema"
LANGUAGE_MODELING = "language_modeling"

TOP_FOLDER = "eval_bundle/"
MAX_UNPACKED_BYTES = 2 << 30
MAX_ENTRIES = 10_000
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

Files = Callable[[str], bytes | None]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task. `examples[i]` is line i + 1 of `file`; `baseline` is a random guesser's accuracy, between 0 and 1."""

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    file: str
    examples: tuple[dict[str, Any], ...] = dataclasses.field(repr=False)
    origin: str = ""

    def options(self, example: dict[str, Any]) -> list[tuple[str, str]]:
        """(context, continuation) of each option of `example`; language_modeling has one."""
        if self.kind == LANGUAGE_MODELING:
            return [(example["context"], example["continuation"])]
        if self.kind == SCHEMA:
            return [(context, example["continuation"]) for context in example["context_options"]]
        return [(example["query"], choice) for choice in example["choices"]]

    def where(self, index: int) -> str:
        """How messages name example `index`: the bundle, the file, the line."""
        return f"{self.origin}: {self.file}, line {index + 1}"


@dataclasses.dataclass(frozen=True)
class Bundle:
    """The tasks in core.yaml's order; `files` maps each file that the answers depend on to its SHA-256."""

    path: Path
    tasks: tuple[Task, ...]
    files: Mapping[str, str]

    @property
    def id(self) -> str:
        """16 hex digits; the same for a folder, a zip and a tar.zst of the same files."""
        return hashlib.sha256(canonical_json(dict(self.files)).encode()).hexdigest()[:16]

    @property
    def is_core(self) -> bool:
        return dict(self.files) == CORE_SHA256

    @property
    def metric_name(self) -> str:
        """The score's name: "core" for CORE's own files, "smoke_score" for anything else."""
        return "core" if self.is_core else "smoke_score"


def open_bundle(path: Path | str, *, only_core: bool = False) -> Bundle:
    """Read a whole bundle; DataError for a missing, damaged or (with `only_core`) other file than CORE's."""
    path = Path(path)
    read, hashes = _reader(path), {}
    below = read("core.yaml") is None and read(TOP_FOLDER + "core.yaml") is not None
    top = TOP_FOLDER if below else ""

    def need(name: str) -> bytes:
        data = read(top + name)
        if data is None:
            raise DataError(f"{path}: {name} is missing; a bundle has core.yaml, eval_meta_data.csv and eval_data/")
        hashes[name] = hashlib.sha256(data).hexdigest()
        if only_core and hashes[name] != CORE_SHA256.get(name):
            other = f"another version than the published CORE bundle ({name} differs)"
            raise DataError(f"{path} is {other}; get eval_bundle.zip")
        return data

    try:
        tasks = _parse(path, need)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # yaml's, csv's and json's own, and whatever a wrong shape makes of them
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path} is no evaluation bundle ({reason}); get the bundle again") from error
    return Bundle(path, tasks, dict(sorted(hashes.items())))


def _parse(path: Path, need: Callable[[str], bytes]) -> tuple[Task, ...]:
    entries = yaml.safe_load(need("core.yaml"))["icl_tasks"]
    rows = csv.DictReader(io.StringIO(need("eval_meta_data.csv").decode()))
    percent = {row["Eval Task"]: float(row["Random baseline"]) for row in rows}
    files = dict.fromkeys(f"eval_data/{entry['dataset_uri']}" for entry in entries)
    examples = {file: tuple(map(json.loads, need(file).splitlines())) for file in files}
    return tuple(
        Task(
            label=entry["label"],
            kind=entry["icl_task_type"],
            shots=entry["num_fewshot"][0],
            delimiter=entry.get("continuation_delimiter", " "),
            baseline=percent[entry["label"]] / 100,
            file=(file := f"eval_data/{entry['dataset_uri']}"),
            examples=examples[file],
            origin=str(path),
        )
        for entry in entries
    )


def _reader(path: Path) -> Files:
    """The function from a file's name to its bytes, or None."""
    if path.is_dir():
        return lambda name: (path / name).read_bytes() if (path / name).is_file() else None
    if not path.is_file():
        raise DataError(f"{path} is not there; a bundle is a folder, a .zip or a .tar.zst")
    try:
        return _read_archive(path).get
    except (DataError, MemoryError):
        raise
    except Exception as error:  # zipfile's, tarfile's, pyarrow's and the decompressors' own
        broken = f"{path} is neither a folder nor a readable .zip or .tar.zst ({error})"
        raise DataError(f"{broken}; get the bundle again") from error


def _read_archive(path: Path) -> dict[str, bytes]:
    with open(path, "rb") as file:
        if file.read(len(ZSTD_MAGIC)) == ZSTD_MAGIC:
            return _read_tar_zst(path)
    check_size(path, path.stat().st_size, "has")  # and with it its list of entries, which zipfile reads at once
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_entries(path, len(members))
        check_size(path, sum(member.file_size for member in members))
        return {member.filename: archive.read(member) for member in members}


def _read_tar_zst(path: Path) -> dict[str, bytes]:
    import pyarrow as pa

    class Bounded:
        """The stream as tarfile reads it, its headers included: never more than a bundle has."""

        total = 0

        def read(self, size: int) -> bytes:
            piece = stream.read(size)
            self.total += len(piece)
            check_size(path, self.total)
            return piece

    files: dict[str, bytes] = {}
    with (
        pa.CompressedInputStream(path, "zstd") as stream,
        tarfile.open(fileobj=cast(IO[bytes], Bounded()), mode="r|") as archive,
    ):
        for count, member in enumerate(archive, 1):
            _check_entries(path, count)
            if member.isfile() and (content := archive.extractfile(member)):
                files[member.name.removeprefix("./")] = content.read()
    return files


def _check_entries(path: Path, count: int) -> None:
    if count > MAX_ENTRIES:
        raise DataError(f"{path} has more than {MAX_ENTRIES:,} entries; this is not an evaluation bundle")


def check_size(source: Path | str, total: int, verb: str = "unpacks to") -> None:
    """DataError where `source` has more bytes than any bundle."""
    if total > MAX_UNPACKED_BYTES:
        raise DataError(f"{source} {verb} more than {MAX_UNPACKED_BYTES >> 30} GiB; this is not an evaluation bundle")
