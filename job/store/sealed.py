"""Sealed folders: a result exists when its manifest does.

Every result (a tokenizer, a row file, a checkpoint, a task's answers, a report) is a folder of files plus
`manifest.json`, written last. The writer works in a temporary sibling, hashes and fsyncs each file, writes the
manifest, and renames the folder into place: whatever is killed leaves a whole folder or a `.name.tmp-*` that the next
writer sweeps.

    with sealing(path, kind="tokenizer", made_from={...}) as folder:
        (folder.path / "tokenizer.json").write_bytes(...)
        folder.facts["vocab_size"] = 4096

    sealed = open_sealed(path, kind="tokenizer")     # DataError unless every byte is what the manifest says
    sealed.path, sealed.id, sealed.facts, sealed.made_from

The id is a hash of `made_from` (and the kind), known before the folder is made: equal inputs are made once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from job.errors import DataError, StorageError
from job.store.documents import HASH, canonical_json, hashed, read_document

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Sealed:
    """A verified folder: where it is, what it was made from, and what its maker noted about it."""

    path: Path
    kind: str
    id: str
    made_from: dict[str, Any]
    facts: dict[str, Any]
    files: dict[str, dict[str, Any]]

    def verify(self) -> Sealed:
        """Hash every file against the manifest; DataError names the first one that differs."""
        with ThreadPoolExecutor(4) as pool:
            hashes = pool.map(sha256_file, [self.path / name for name in self.files])
        for (name, entry), found in zip(self.files.items(), hashes, strict=True):
            if found != entry["sha256"]:
                raise DataError(
                    f"{self.path / name} is not the file that was sealed (SHA-256 differs); delete {self.path} and run"
                    " again"
                )
        return self


@dataclasses.dataclass
class Unsealed:
    """A folder being written: put files under `path`, notes for readers in `facts`."""

    path: Path
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def content_id(kind: str, made_from: Mapping[str, Any]) -> str:
    """The id of what `made_from` makes: 16 hex digits of SHA-256 over kind and inputs."""
    return hashlib.sha256(canonical_json([SCHEMA, kind, made_from]).encode()).hexdigest()[:16]


def is_content_id(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomic_write(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a reader sees the old bytes or the new, never a part."""
    with storage_errors(path):
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync(path.parent)


def fsync(path: Path) -> None:
    """Of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write below `path` into StorageError with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(
                f"the disk is full: writing {path} failed; free some space and run the same command again (what was"
                " sealed is kept)"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"{path} cannot be written ({error.strerror}); give user {os.getuid()} write permission or choose"
                " another --out"
            ) from error
        raise


@contextlib.contextmanager
def sealing(path: Path, *, kind: str, made_from: Mapping[str, Any]) -> Iterator[Unsealed]:
    """Make the sealed folder `path`; on any exception nothing of it remains.

    An older folder of the same name is replaced. Raises StorageError when the disk is full or refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        temporary.mkdir()
        try:
            folder = Unsealed(temporary)
            yield folder
            seal_written(temporary, path, kind=kind, made_from=made_from, facts=folder.facts, files=_hashed(temporary))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _hashed(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `folder`, each fsynced."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        fsync(file)
        files[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": sha256_file(file)}
    return files


def write_manifest(
    folder: Path,
    *,
    kind: str,
    made_from: Mapping[str, Any],
    facts: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write `folder`'s manifest, replacing an older one whole."""
    manifest = {
        "schema": SCHEMA,
        "kind": kind,
        "id": content_id(kind, made_from),
        "made_from": dict(made_from),
        "facts": dict(facts),
        "files": dict(files),
    }
    atomic_write(folder / MANIFEST, json.dumps(hashed(manifest), indent=1, ensure_ascii=False).encode())


def seal_written(
    written: Path,
    path: Path,
    *,
    kind: str,
    made_from: Mapping[str, Any],
    facts: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
) -> None:
    """Seal as `path` the sibling folder `written`, whose `files` their writers have hashed and fsynced."""
    with storage_errors(path):
        write_manifest(written, kind=kind, made_from=made_from, facts=facts, files=files)
        _replace_folder(written, path)
        fsync(path.parent)


def _replace_folder(new: Path, old: Path) -> None:
    if old.exists():
        aside = old.with_name(f".{old.name}.tmp-replaced-{os.getpid()}")
        os.replace(old, aside)
        os.replace(new, old)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(new, old)


def sweep(path: Path) -> None:
    """Remove what killed writers of `path` left beside it."""
    for leftover in path.parent.glob(f".{path.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def is_sealed(path: Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def open_sealed(path: Path, *, kind: str, verify: bool = True) -> Sealed:
    """Open a sealed folder; DataError, naming the file, unless it is of this kind and what its manifest says.

    Sizes are always compared, hashes unless `verify` is False.
    """
    path = Path(path)
    remedy = f"delete {path} and run again"
    try:
        manifest = read_manifest((path / MANIFEST).read_bytes(), path / MANIFEST, remedy)
    except FileNotFoundError:
        raise DataError(
            f"{path} is not there or was never sealed (no {MANIFEST}); run the stage that makes it again"
        ) from None
    except OSError as error:
        raise DataError(f"{path / MANIFEST} cannot be read ({error}); {remedy}") from error
    if manifest["kind"] != kind:
        raise DataError(f"{path} holds a {manifest['kind']}, not a {kind}; point to the right folder")
    for name, entry in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["size"]:
            found = "is missing" if size is None else f"has {size} bytes, not {entry['size']}"
            raise DataError(f"{file} {found}; {remedy}")
    parts = {name: manifest[name] for name in ("kind", "id", "made_from", "facts", "files")}
    sealed = Sealed(path, **parts)
    return sealed.verify() if verify else sealed


def read_manifest(data: bytes, name: object, remedy: str) -> dict[str, Any]:
    """A manifest that is what was written, its id that of what it names; DataError otherwise."""
    shape = {"schema": int, "kind": str, "id": str, "made_from": dict, "facts": dict, "files": dict}
    manifest = read_document(data, name, remedy, shape)
    if manifest["schema"] != SCHEMA:
        raise DataError(f"{name} is of another version (not schema {SCHEMA}); {remedy}")
    if manifest["id"] != content_id(manifest["kind"], manifest["made_from"]):
        raise DataError(f"{name} does not belong to what it says it was made from; {remedy}")
    for file, entry in manifest["files"].items():
        inside = not PurePosixPath(file).is_absolute() and ".." not in PurePosixPath(file).parts
        fits = isinstance(entry, dict) and type(entry.get("size")) is int and type(entry.get(HASH)) is str
        if not (inside and fits):
            raise DataError(f"{name} names a file {file!r} that cannot be used; {remedy}")
    return manifest
