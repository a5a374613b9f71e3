"""The rows of a run: which row comes i-th, whatever the number of GPUs and wherever the run was resumed.

Epoch 0 is the row files in order, each as stored (its rows were written in a seeded permutation). Every later epoch is
a seeded permutation of the files and of the rows within each file. A row has T+1 tokens: `row[:-1]` predicts `row[1:]`.

Of a set that is only begun, row files come while training runs. A row that is not there yet is waited for, and whoever
is watching is told; a row that nobody is making is an error.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import numpy as np

from job.data.lock import is_being_made
from job.data.pack import permutation
from job.data.prepare import Prepared
from job.errors import DataError
from job.reporter import Reporter
from job.store.sealed import is_sealed

CHUNK_ROWS = 8192
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 60.0
"""how long nobody may be making a row that is waited for (the process that does needs a moment to start)"""


class Rows:
    """Random access to the endless sequence of rows of a prepared set; `len` is the rows of one epoch, or those that
    have come so far.

    `reporter` is told while a row is waited for.
    """

    def __init__(self, prepared: Prepared, seed: int, reporter: Reporter | None = None) -> None:
        self._prepared, self._seed, self._reporter = prepared, seed, reporter or Reporter()
        self.row_tokens = prepared.seq_len + 1
        self._open()
        self._plan = functools.lru_cache(maxsize=2)(self._files_of_epoch)
        self._within = functools.lru_cache(maxsize=4)(
            lambda epoch, file: permutation(len(self._files[file]), seed, "rows", epoch, file)
        )

    def _open(self) -> None:
        """Map the row files that are there."""
        self._is_whole = self._prepared.is_whole
        maps = (np.load(path, mmap_mode="r") for path in self._prepared.row_files)
        self._files = list(map(np.asarray, maps))  # each (n, T+1) uint16

    def __len__(self) -> int:
        return sum(len(file) for file in self._files)

    def order(self, epoch: int, index: int) -> tuple[int, int]:
        """(file, row within the stored file) of the `index`-th row of `epoch`."""
        file, offset = self._find(epoch, index)
        return file, offset if epoch == 0 else int(self._within(epoch, file)[offset])

    def _find(self, epoch: int, index: int) -> tuple[int, int]:
        """(file, position in the file's order of that epoch) of the `index`-th row of `epoch`."""
        files, starts = self._plan(epoch)
        slot = int(np.searchsorted(starts, index, side="right")) - 1
        return int(files[slot]), index - int(starts[slot])

    def take(self, start: int, count: int, out: np.ndarray | None = None) -> np.ndarray:
        """(count, T+1) uint16: rows start..start+count-1 of the run, into `out` when given."""
        out = np.empty((count, self.row_tokens), np.uint16) if out is None else out
        self._wait_for(start + count)
        done = 0
        while done < count:
            epoch, index = divmod(start + done, len(self))
            file, offset = self._find(epoch, index)
            rows = self._files[file]  # (n, T+1)
            part = out[done : min(count, done + len(rows) - offset)]  # to the end of the file at most
            if epoch == 0:
                part[:] = rows[offset : offset + len(part)]
            else:
                stored = self._within(epoch, file)[offset : offset + len(part)]
                np.take(rows, stored, axis=0, out=part, mode="clip")
            done += len(part)
        return out

    def chunks(self, consumed: int) -> Iterator[np.ndarray]:
        """The distinct rows among the first `consumed` of the run, each once: (n, T+1) uint16 blocks."""
        self._wait_for(consumed)
        count = min(consumed, len(self))
        for start in range(0, count, CHUNK_ROWS):
            yield self.take(start, min(CHUNK_ROWS, count - start))

    def _wait_for(self, rows: int) -> None:
        """Until the set is whole or has its first `rows` rows; DataError when nobody is making them."""
        waited = idle = 0.0
        while not self._is_whole and len(self) < rows:
            if self._has_grown():
                continue
            self._reporter.progress("waiting for rows", len(self), rows, "rows")
            time.sleep(POLL_SECONDS)
            waited += POLL_SECONDS
            idle = 0.0 if is_being_made(self._prepared.path) else idle + POLL_SECONDS
            if idle > PATIENCE_SECONDS:
                raise DataError(
                    f"row {len(self)} is not below {self._prepared.path} and nobody is making it; run the same"
                    " command again"
                )
        if waited:
            self._reporter.emit("train.waited", rows=rows, seconds=waited)

    def _has_grown(self) -> bool:
        """Take in what has been sealed since the last look; whether there was anything."""
        if is_sealed(self._prepared.path / "set"):
            self._prepared = Prepared.open(self._prepared.path)
        before = len(self._files), self._is_whole
        self._open()
        self._plan.cache_clear()
        return before != (len(self._files), self._is_whole)

    def _files_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(files,) the files in the epoch's order, and (files,) the index of each one's first row."""
        count = len(self._files)
        files = np.arange(count) if epoch == 0 else permutation(count, self._seed, "files", epoch)
        lengths = np.array([len(self._files[file]) for file in files])
        return files, np.cumsum(lengths) - lengths
