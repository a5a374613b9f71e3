"""What others have prepared already: sealed artifacts of a set, taken from the store instead of made.

An artifact's key is its path below `--out`, and the set's id stands in it, so that what is found there is what would be
made here. It is verified byte for byte and must have been made from the same inputs. The store is a short cut and never
a condition: what it lacks, gives damaged or does not give is made here, with a warning where something was wrong.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from job.errors import DataError, StorageError
from job.reporter import Reporter
from job.store.sealed import MANIFEST, Sealed, is_sealed
from job.store.stores import Store, pull_sealed

AT_ONCE = 4
"""artifacts that are on their way at once"""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A sealed folder of a set: where it belongs, of which kind it is, and what it is made from."""

    path: Path
    kind: str
    inputs: dict[str, Any]


class ArtifactCache:
    """The artifacts of the prepared set at `root` that `store` has; with no store, none."""

    def __init__(self, store: Store | None, root: Path, reporter: Reporter) -> None:
        self._store, self._root, self._reporter = store, root, reporter

    def pull(self, artifacts: Iterable[Artifact]) -> Iterator[tuple[Sealed, float]]:
        """Take those that are in the store and not here, some at once; each with its seconds, in order."""
        wanted = [artifact for artifact in artifacts if not is_sealed(artifact.path) and self.has(artifact)]
        done, total = 0, sum(map(self.size, wanted))
        with ThreadPoolExecutor(AT_ONCE) as threads:
            for artifact, pulled in zip(wanted, threads.map(self._pull, wanted), strict=True):
                done += self.size(artifact)
                self._reporter.progress("pull", done, total, "bytes")
                if pulled:
                    yield pulled
                else:  # here and in no thread: `size` goes through the listing
                    del self._listed[f"{self._key(artifact)}/{MANIFEST}"]

    def has(self, artifact: Artifact) -> bool:
        """Whether the store has it, sealed, and nothing was wrong with it."""
        return f"{self._key(artifact)}/{MANIFEST}" in self._listed

    def size(self, artifact: Artifact) -> int:
        """Bytes of its files in the store, the manifest apart."""
        inside = f"{self._key(artifact)}/"
        return sum(size for key, size in self._listed.items() if key.startswith(inside) and key != inside + MANIFEST)

    @cached_property
    def _listed(self) -> dict[str, int]:
        try:
            return self._store.list(f"prepared/{self._root.name}") if self._store else {}
        except (DataError, StorageError) as error:
            self._reporter.emit("warning", text=f"{error}; what is prepared there cannot be listed")
            return {}

    def _pull(self, artifact: Artifact) -> tuple[Sealed, float] | None:
        started, store, key = time.perf_counter(), self._store, self._key(artifact)
        assert store
        try:
            sealed = pull_sealed(store, key, artifact.path, kind=artifact.kind)
            if sealed.made_from == artifact.inputs:
                return sealed, time.perf_counter() - started
            shutil.rmtree(artifact.path)
            raise DataError(f"{store.url}/{key} was made from something else")
        except (DataError, StorageError) as error:
            self._reporter.emit("warning", text=f"{error}; {key} is made here instead")
        return None

    def _key(self, artifact: Artifact) -> str:
        return f"prepared/{self._root.name}/{artifact.path.relative_to(self._root).as_posix()}"
