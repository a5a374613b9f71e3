"""An evaluation bundle: tasks, their examples and their random baselines, from a folder, a .zip or a .tar.zst.

    core.yaml                 icl_tasks: label, dataset_uri, num_fewshot, icl_task_type, continuation_delimiter (a space when absent)
    eval_meta_data.csv        "Eval Task" and "Random baseline" (per cent) of each label
    eval_data/<dataset_uri>   one JSON example a line
    MANIFEST.json             optional: the SHA-256 of each file of eval_data

Archives are read in memory (CORE is 48 MB), never unpacked, and may hold everything below a folder `eval_bundle/`. Whatever is wrong
is a DataError that names the file and, where there is one, the line. Whether a bundle is CORE itself, and not merely of its format, is
decided by `Bundle.is_core`: every file has the SHA-256 of `core_v1.py`.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from job.core_eval.core_v1 import CORE_SHA256
from job.errors import DataError
from job.sealed import canonical_json

MULTIPLE_CHOICE = "multiple_choice"
SCHEMA = "schema"
LANGUAGE_MODELING = "language_modeling"
KINDS = (MULTIPLE_CHOICE, SCHEMA, LANGUAGE_MODELING)
OPTIONS_KEY = {MULTIPLE_CHOICE: "choices", SCHEMA: "context_options"}
TEXT_KEYS = {MULTIPLE_CHOICE: ("query",), SCHEMA: ("continuation",), LANGUAGE_MODELING: ("context", "continuation")}

TOP_FOLDER = "eval_bundle/"
MAX_UNPACKED_BYTES = 2 << 30
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
RESERVED = ("bpb", "items", "ledger")  # folders that stand beside the tasks' own

Files = Callable[[str], bytes | None]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task. `examples[i]` is line i + 1 of `file`; `baseline` is the accuracy of a random guesser, between 0 and 1."""

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    file: str
    examples: tuple[dict[str, Any], ...] = dataclasses.field(repr=False)
    origin: str = ""

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
        """What the score of this bundle may be called: "core" for CORE's own files, "smoke_score" for anything else."""
        return "core" if self.is_core else "smoke_score"

    @property
    def baselines(self) -> dict[str, float]:
        return {task.label: task.baseline for task in self.tasks}

    def require_core(self) -> Bundle:
        """This bundle, or DataError naming the first file that is not the one CORE's published scores were made with."""
        for name in sorted(CORE_SHA256.keys() | self.files.keys()):
            if self.files.get(name) != CORE_SHA256.get(name):
                reason = "is missing" if name not in self.files else "differs" if name in CORE_SHA256 else "does not belong to it"
                raise DataError(
                    f"{self.path} is another version than the published CORE bundle ({name} {reason}); get eval_bundle.zip"
                )
        return self


def open_bundle(path: Path | str) -> Bundle:
    """Read and check a whole bundle: every line is parsed, every gold is in range, every hash of MANIFEST.json holds.

    Raises DataError (exit 11), naming file and line.
    """
    path = Path(path)
    read = _rooted(_reader(path))
    hashes: dict[str, str] = {}

    def need(name: str) -> bytes:
        data = read(name)
        if data is None:
            raise DataError(f"{path}: {name} is missing; a bundle has core.yaml, eval_meta_data.csv and eval_data/")
        hashes[name] = hashlib.sha256(data).hexdigest()
        return data

    entries = _task_entries(path, need("core.yaml"))
    baselines = _baselines(path, need("eval_meta_data.csv"))
    examples: dict[tuple[str, str], tuple[dict[str, Any], ...]] = {}
    tasks = []
    for entry in entries:
        head = _task_head(path, entry, baselines)
        key = (head["file"], head["kind"])
        if key not in examples:
            examples[key] = _examples(path, *key, need(head["file"]))
        tasks.append(Task(**head, examples=examples[key], origin=str(path)))
    _check_labels(path, tasks)
    _check_manifest(path, read("MANIFEST.json"), hashes)
    return Bundle(path, tuple(tasks), dict(sorted(hashes.items())))


# ---- containers ---------------------------------------------------------------------------------------------------------------


def _reader(path: Path) -> Files:
    if path.is_dir():
        return lambda name: (path / name).read_bytes() if (path / name).is_file() else None
    if not path.is_file():
        raise DataError(f"{path} is not there; a bundle is a folder, a .zip or a .tar.zst")
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == ZSTD_MAGIC:
            return _read_tar_zst(path).get
        if zipfile.is_zipfile(path):
            return _read_zip(path).get
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path} is damaged or truncated ({error}); get the bundle again") from error
    raise DataError(f"{path} is neither a folder nor a readable .zip or .tar.zst; get the bundle again")


def _read_zip(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        _check_members(path, [(member.filename, member.file_size) for member in members])
        return {member.filename: archive.read(member) for member in members}


def _read_tar_zst(path: Path) -> dict[str, bytes]:
    import zstandard

    try:
        with (
            open(path, "rb") as raw,
            zstandard.ZstdDecompressor().stream_reader(raw) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            return _read_members(path, archive)
    except zstandard.ZstdError as error:
        raise DataError(f"{path} is damaged or truncated ({error}); get the bundle again") from error


def _read_members(path: Path, archive: tarfile.TarFile) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    total = 0
    for member in archive:
        if member.isdir():
            continue
        total += member.size
        _check_members(path, [(member.name, total)])
        content = archive.extractfile(member) if member.isfile() else None
        if content is None:
            raise DataError(f"{path}: {member.name} is not a plain file; a bundle holds no links or devices")
        files[member.name.removeprefix("./")] = content.read()
    return files


def _check_members(path: Path, members: list[tuple[str, int]]) -> None:
    for name, _ in members:
        if _leaves(name):
            raise DataError(f"{path}: the member {name!r} leaves the archive; do not trust this file")
    if sum(size for _, size in members) > MAX_UNPACKED_BYTES:
        raise DataError(f"{path} unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB; this is not an evaluation bundle")


def _leaves(name: str) -> bool:
    return name.startswith("/") or "\\" in name or ":" in name or ".." in PurePosixPath(name).parts


def _rooted(read: Files) -> Files:
    """`read` below eval_bundle/ where core.yaml is there and not at the top."""
    if read("core.yaml") is None and read(TOP_FOLDER + "core.yaml") is not None:
        return lambda name: read(TOP_FOLDER + name)
    return read


# ---- core.yaml, eval_meta_data.csv, MANIFEST.json -----------------------------------------------------------------------------


def _text(path: Path, name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: {name}, line {line} is not UTF-8; get the bundle again") from None


def _task_entries(path: Path, data: bytes) -> list[dict[str, Any]]:
    try:
        document = yaml.safe_load(_text(path, "core.yaml", data))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise DataError(f"{path}: core.yaml{line} is not YAML; get the bundle again") from None
    entries = document.get("icl_tasks") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: core.yaml has no list icl_tasks of tasks; get the bundle again")
    return entries


def _baselines(path: Path, data: bytes) -> dict[str, float]:
    baselines = {}
    reader = csv.DictReader(io.StringIO(_text(path, "eval_meta_data.csv", data)))
    for row in reader:
        try:
            percent = float(row["Random baseline"])
            label = row["Eval Task"]
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{path}: eval_meta_data.csv, line {reader.line_num} lacks an 'Eval Task' or a number 'Random baseline'; get the bundle again"
            ) from None
        baselines[label] = percent / 100
    return baselines


def _task_head(path: Path, entry: dict[str, Any], baselines: dict[str, float]) -> dict[str, Any]:
    """The fields of Task that core.yaml and the baselines give."""
    label, uri, shots = entry.get("label"), entry.get("dataset_uri"), entry.get("num_fewshot")
    where = f"{path}: core.yaml, task {label!r}"
    if not isinstance(label, str) or not LABEL.fullmatch(label) or label in RESERVED:
        raise DataError(f"{where}: the label must be letters, digits, '_', '.' or '-', and none of {', '.join(RESERVED)}")
    if entry.get("icl_task_type") not in KINDS:
        raise DataError(f"{where} has the unknown task type {entry.get('icl_task_type')!r}; known are {', '.join(KINDS)}")
    if not isinstance(uri, str) or _leaves(uri):
        raise DataError(f"{where}: dataset_uri {uri!r} is not a path below eval_data/")
    if not (isinstance(shots, list) and len(shots) == 1 and type(shots[0]) is int and shots[0] >= 0):
        raise DataError(f"{where}: num_fewshot {shots!r} is not a list of one number, such as [10]")
    delimiter = entry.get("continuation_delimiter", " ")
    if not isinstance(delimiter, str):
        raise DataError(f"{where}: continuation_delimiter {delimiter!r} is not a text")
    if not 0 <= baselines.get(label, -1) < 1:
        raise DataError(
            f"{path}: eval_meta_data.csv gives no random baseline from 0 to below 100 for {label!r}; get the bundle again"
        )
    return {
        "label": label,
        "kind": entry["icl_task_type"],
        "shots": shots[0],
        "delimiter": delimiter,
        "baseline": baselines[label],
        "file": f"eval_data/{uri}",
    }


def _check_labels(path: Path, tasks: list[Task]) -> None:
    labels = [task.label for task in tasks]
    for label in labels:
        if labels.count(label) > 1:
            raise DataError(f"{path}: core.yaml has the task {label!r} twice; get the bundle again")


def _check_manifest(path: Path, data: bytes | None, hashes: dict[str, str]) -> None:
    """Compare what was read with MANIFEST.json, where the bundle has one."""
    if data is None:
        return
    try:
        expected = {f"eval_data/{task['file']}": task["sha256"] for task in json.loads(data)["tasks"]}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: MANIFEST.json has no list of tasks with file and sha256; get the bundle again") from None
    for name, sha256 in expected.items():
        if name in hashes and hashes[name] != sha256:
            raise DataError(f"{path}: {name} is not the file that MANIFEST.json names (SHA-256 differs); get the bundle again")


# ---- examples -----------------------------------------------------------------------------------------------------------------


def _examples(path: Path, file: str, kind: str, data: bytes) -> tuple[dict[str, Any], ...]:
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise DataError(f"{path}: {file} has no line; get the bundle again")
    examples = []
    for number, line in enumerate(lines, start=1):
        try:
            example = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: {file}, line {number} is not JSON ({error}); get the bundle again") from None
        problem = _problem(kind, example)
        if problem:
            raise DataError(f"{path}: {file}, line {number}: {problem}; correct the line or get the bundle again")
        examples.append(example)
    return tuple(examples)


def _problem(kind: str, example: Any) -> str | None:
    """What is wrong with an example of this kind, or None."""
    if not isinstance(example, dict):
        return "a JSON object is wanted"
    for key in TEXT_KEYS[kind]:
        if not isinstance(example.get(key), str):
            return f"{key!r} is not a text"
    if kind != MULTIPLE_CHOICE and not example["continuation"].strip():
        return "the continuation tokenises to nothing (it is empty)"
    if kind == LANGUAGE_MODELING:
        return None
    options, gold = example.get(OPTIONS_KEY[kind]), example.get("gold")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(option, str) for option in options):
        return f"{OPTIONS_KEY[kind]!r} is not a list of two texts or more"
    if kind == MULTIPLE_CHOICE and not all(option.strip() for option in options):
        return "a choice's continuation tokenises to nothing (it is empty)"
    if type(gold) is not int or not 0 <= gold < len(options):
        return f"gold {gold!r} is out of range: there are {len(options)} options, counted from 0"
    return None
