"""The store, which outlives the machine: one small interface over a folder and over S3, and sealed folders through it.

    store = open_store("s3://bucket/prefix")    (job/store/__init__.py)      or a folder, e.g. a mounted disk
    push_sealed(store, "runs/mine/checkpoints/000000000409600", folder)                    files first, manifest last
    pull_sealed(store, "prepared/0123456789abcdef/tokenizer", folder, kind="tokenizer")    verified, then sealed here
    store.create("runs/mine/attempts/3", claim)                        True for exactly one of all that try

Keys are the paths below `--out`: the store mirrors `prepared/` and `runs/`. A sealed folder exists when its manifest
does, here as on a disk, and a reader trusts nothing but a manifest and the hashes in it. Whatever a network can do to
an object (lost, cut short, a flipped bit, an answer that never comes) is found by these hashes, and retried until
`patience` is over; then StorageError, and what was to be stored is still on the local disk.
"""

from __future__ import annotations

import abc
import contextlib
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from job.errors import DataError, SpeedrunError, StorageError, UsageError
from job.store.sealed import (
    MANIFEST,
    Sealed,
    fsync,
    open_sealed,
    read_manifest,
    seal_written,
    sha256_file,
    storage_errors,
    sweep,
)

S3_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*\S)?)?")
"""bucket and prefix; a space at the end would be another place, and nobody sees it"""
PARALLEL = 4
"""files of one sealed folder that are on their way at once"""
PATIENCE = 60.0
"""seconds for which a call that fails is tried again"""
CLAIMANTS = 2
"""how many write one key at once to see whether the store lets one of them win"""


class Store(abc.ABC):
    """Objects by key (relative, `/` between parts). Every method may be called from several threads.

    Raises StorageError when the store refuses or does not answer in time, DataError when it holds other bytes than were
    sealed.
    """

    url: str
    """what the user calls it: s3://bucket/prefix, or the folder"""

    @abc.abstractmethod
    def get(self, key: str) -> bytes | None:
        """The object's bytes; None where there is none."""

    @abc.abstractmethod
    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        """Write the object, replacing an older one whole."""

    @abc.abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Write the object unless there is one; True when it holds this `data` (which a nonce makes unique)."""

    @abc.abstractmethod
    def put_file(self, key: str, path: Path, sha256: str) -> None:
        """Write the file at `path`, whose SHA-256 (hex) is known, as the object."""

    @abc.abstractmethod
    def get_file(self, key: str, path: Path, size: int, sha256: str) -> None:
        """Write the object to `path` (parents are made); DataError where it is missing or is not these bytes."""

    @abc.abstractmethod
    def list(self, prefix: str) -> dict[str, int]:
        """Every key below the folder `prefix`, with its size in bytes."""

    @abc.abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Remove the objects; those that are not there are passed over."""

    @abc.abstractmethod
    def prepare(self) -> None:
        """UsageError for a store that cannot be written or cannot fence claims; leaves nothing behind."""

    @abc.abstractmethod
    def sweep(self, prefix: str, older_than: float = 0.0) -> int:
        """Remove the unfinished uploads below the folder `prefix` that are `older_than` seconds old; how many there
        were.

        They are invisible but paid for. A writer that is still alive loses its upload and begins it again: sweep a
        run's folder after its claim, when older attempts are over; in a shared folder give an age."""

    def link(self, key: str, seconds: int) -> str | None:
        """An address at which a browser sees the object for so long; None where the store has no such thing."""
        return None

    def clock_ahead(self) -> float | None:
        """Seconds by which this machine's clock is ahead of the server's; None where there is none to ask."""
        return None

    def credentials_left(self) -> float | None:
        """Seconds until the credentials end for good, infinite where they do not; None where nobody says."""
        return math.inf


class FolderStore(Store):
    """A store in a folder: another disk, or one that several machines mount."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def get(self, key: str) -> bytes | None:
        with self._refusals():
            try:
                return self._path(key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        with self._refusals(), self._replacing(self._path(key)) as temporary:
            temporary.write_bytes(data)

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with self._refusals(), self._beside(path) as temporary:
            temporary.write_bytes(data)
            fsync(temporary)
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
                fsync(path.parent)
            return path.read_bytes() == data

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        with self._refusals(), self._replacing(self._path(key)) as temporary:
            shutil.copyfile(path, temporary)

    def get_file(self, key: str, path: Path, size: int, sha256: str) -> None:
        source = self._path(key)
        with self._refusals():
            try:
                open(source, "rb").close()  # what refuses this is the store, and what refuses the copy this disk
            except (FileNotFoundError, NotADirectoryError):
                raise missing(self, key) from None
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, path)
            if path.stat().st_size != size or sha256_file(path) != sha256:
                raise DataError(f"{source} is not the file that was sealed; delete its folder there and run again")

    def list(self, prefix: str) -> dict[str, int]:
        sizes = {}
        with self._refusals():
            for path in self._path(prefix).rglob("*"):
                with contextlib.suppress(FileNotFoundError):  # removed by another process since it was seen
                    if path.is_file() and not path.name.startswith("."):
                        sizes[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return sizes

    def delete(self, keys: Iterable[str]) -> None:
        with self._refusals():
            for key in keys:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    self._path(key).unlink()

    def prepare(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe(self)
        except (OSError, StorageError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            reason = cause.strerror if isinstance(cause, OSError) else error
            raise UsageError(f"--bucket {self.root} cannot be used ({reason}); choose another folder") from None

    def sweep(self, prefix: str, older_than: float = 0.0) -> int:
        swept, now = 0, time.time()
        with self._refusals():
            for leftover in self._path(prefix).rglob(".*.tmp-*"):
                with contextlib.suppress(FileNotFoundError):
                    if now - leftover.stat().st_mtime >= older_than:
                        leftover.unlink()
                        swept += 1
        return swept

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn the operating system's refusals into StorageError."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"the store {self.url} failed ({error.strerror}); everything sealed is safe on the local disk: make"
                " room or give access there, and run the same command again"
            ) from error

    @contextlib.contextmanager
    def _replacing(self, path: Path) -> Iterator[Path]:
        """A file to be written, which then replaces `path` whole."""
        with self._beside(path) as temporary:
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)

    @contextlib.contextmanager
    def _beside(self, path: Path) -> Iterator[Path]:
        """A name of our own next to `path`, gone afterwards."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{os.urandom(4).hex()}")
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def probe(store: Store) -> None:
    """UsageError unless exactly one of several writers of one key wins."""
    key = f".probe-{secrets.token_hex(8)}"
    claims = [f"{key} {n}".encode() for n in range(CLAIMANTS)]
    try:
        with ThreadPoolExecutor(CLAIMANTS) as pool:
            winners = sum(pool.map(lambda claim: store.create(key, claim), claims))
    except SpeedrunError:
        with contextlib.suppress(SpeedrunError):
            store.delete([key])
        raise
    store.delete([key])
    if winners != 1:
        raise UsageError(
            f"--bucket {store.url} cannot be used: its server ignores conditional writes ({winners} of {CLAIMANTS}"
            " writers created the same object), so two attempts at one run could both publish; choose a store that"
            " honours If-None-Match"
        )


def check_key(key: str) -> str:
    """`key`, or ValueError (a bug of ours) when it would leave the store."""
    parts = PurePosixPath(key).parts
    if not parts or key.startswith("/") or ".." in parts:
        raise ValueError(f"{key!r} is no key of a store")
    return key


def missing(store: Store, key: str) -> DataError:
    return DataError(
        f"{store.url}/{key} is not there, though a manifest names it; delete its folder there and run again"
    )


def stored_manifest(store: Store, key: str) -> dict[str, Any] | None:
    """The manifest of the sealed folder `key`; None where there is none. DataError when it is no manifest."""
    data = store.get(f"{key}/{MANIFEST}")
    if data is None:
        return None
    return read_manifest(data, f"{store.url}/{key}/{MANIFEST}", "delete that folder there and run again")


def sealed_names(store: Store, prefix: str) -> list[str]:
    """Names of the sealed folders directly below `prefix`, sorted."""
    keys = (PurePosixPath(key).relative_to(prefix).parts for key in store.list(prefix))
    return sorted(parts[0] for parts in keys if len(parts) == 2 and parts[1] == MANIFEST)


def push_sealed(
    store: Store,
    key: str,
    folder: Path,
    before_manifest: Callable[[], None] = lambda: None,
    *,
    known: dict[str, str] | None = None,
) -> int:
    """Put the sealed `folder` at `key` and say how many bytes that took; a file that is there already is not put again.

    `before_manifest()` runs when all files are there: it may raise, and then the folder does not exist in the store.
    `known` (key to SHA-256) names files that an earlier call put, and is added to. Another folder at `key` is replaced:
    its manifest goes first where a file of the same name differs, its other files go last.
    """
    manifest = (folder / MANIFEST).read_bytes()
    old = store.get(f"{key}/{MANIFEST}")
    if old == manifest:
        return 0
    known = {} if known is None else known
    files = read_manifest(manifest, folder / MANIFEST, f"delete {folder} and run again")["files"]
    stored: dict[str, str] = {}
    if old:
        with contextlib.suppress(DataError):  # what cannot be read is replaced
            stored = {name: entry["sha256"] for name, entry in read_manifest(old, key, "")["files"].items()}
    there = {name for name, entry in files.items() if entry["sha256"] in (stored.get(name), known.get(f"{key}/{name}"))}
    if any(name in files and files[name]["sha256"] != sha256 for name, sha256 in stored.items()):
        store.delete([f"{key}/{MANIFEST}"])

    def put(name: str) -> int:
        store.put_file(f"{key}/{name}", folder / name, files[name]["sha256"])
        known[f"{key}/{name}"] = files[name]["sha256"]
        return files[name]["size"]

    with ThreadPoolExecutor(PARALLEL) as pool:
        size = sum(pool.map(put, files.keys() - there))
    before_manifest()
    store.put(f"{key}/{MANIFEST}", manifest, "application/json")
    if dropped := [f"{key}/{name}" for name in stored.keys() - files.keys()]:
        store.delete(dropped)
    return size


def pull_sealed(store: Store, key: str, path: Path, *, kind: str) -> Sealed:
    """Make `path` the sealed folder that the store has at `key`, every byte verified; DataError where there is none."""
    manifest = stored_manifest(store, key)
    if manifest is None:
        raise DataError(f"{store.url}/{key} is not there or was never sealed (no {MANIFEST})")
    sweep(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")

    def get(item: tuple[str, dict[str, Any]]) -> None:
        name, entry = item
        store.get_file(f"{key}/{name}", temporary / check_key(name), entry["size"], entry["sha256"])

    with storage_errors(path):
        temporary.mkdir(parents=True)
        try:
            with ThreadPoolExecutor(PARALLEL) as pool:
                list(pool.map(get, manifest["files"].items()))
            noted = {name: manifest[name] for name in ("made_from", "facts", "files")}
            seal_written(temporary, path, kind=manifest["kind"], **noted)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return open_sealed(path, kind=kind, verify=False)
