"""Which attempt of a run may publish: claims in the store, and a store that looks at them before every write.

    runs/<id>/attempts/N    one create-only object for each attempt, its nonce inside; the highest number is the newest

A claim is never removed: the numbers of a run only grow, also over `--fresh`, so an attempt that slept through
another's whole life still learns that it is no longer the newest. No clock and no lease is involved. What remains is
the moment between the look and the write; nothing is lost in it, for a reader trusts hashes, and a newer attempt aborts
what an older one has begun to upload.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from job.errors import DataError, UsageError
from job.store.documents import read_document
from job.store.stores import Store


class TakenOver(UsageError):
    """Another attempt took the run over: this one must not publish any more."""

    def __init__(self, run_id: str, number: int, newest: int) -> None:
        super().__init__(
            f"attempt {newest} took over run {run_id}; this one (attempt {number}) stopped and published nothing more"
        )


def run_key(run_id: str) -> str:
    return f"runs/{run_id}"


def claim_key(run_id: str, number: int) -> str:
    return f"runs/{run_id}/attempts/{number}"


def claimed(store: Store, run_id: str) -> list[int]:
    """The numbers of all attempts that the store knows, ascending."""
    names = (PurePosixPath(key).name for key in store.list(f"runs/{run_id}/attempts"))
    return sorted(int(name) for name in names if name.isdigit())


def newest_claimed(store: Store, run_id: str) -> int:
    """The highest claimed number, 0 when none is."""
    return max(claimed(store, run_id), default=0)


def stored_claim(store: Store, run_id: str, number: int) -> dict[str, Any]:
    return read_claim(store.get(claim_key(run_id, number)) or b"{}")


def read_claim(data: bytes) -> dict[str, Any]:
    """What a claim says; nothing where a power cut or a flipped bit left none: its number is what fences."""
    try:
        return read_document(data, "a claim", "", {})
    except DataError:
        return {}


class Fenced(Store):
    """`store` for one attempt of a run: TakenOver instead of any write once a newer attempt has claimed the run."""

    def __init__(self, store: Store, run_id: str, number: int) -> None:
        self._store, self._run_id, self._number = store, run_id, number
        self.url = store.url

    def check(self) -> None:
        newest = newest_claimed(self._store, self._run_id)
        if newest > self._number:
            raise TakenOver(self._run_id, self._number, newest)

    def get(self, key: str) -> bytes | None:
        return self._store.get(key)

    def get_file(self, key: str, path: Path, size: int, sha256: str) -> None:
        self._store.get_file(key, path, size, sha256)

    def list(self, prefix: str) -> dict[str, int]:
        return self._store.list(prefix)

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        self.check()
        self._store.put(key, data, content_type)

    def create(self, key: str, data: bytes) -> bool:
        self.check()
        return self._store.create(key, data)

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        self.check()
        self._store.put_file(key, path, sha256)

    def delete(self, keys: Iterable[str]) -> None:
        self.check()
        self._store.delete(keys)

    def prepare(self) -> None:
        self._store.prepare()

    def sweep(self, prefix: str, older_than: float = 0.0) -> int:
        self.check()
        return self._store.sweep(prefix, older_than)

    def link(self, key: str, seconds: int) -> str | None:
        return self._store.link(key, seconds)
