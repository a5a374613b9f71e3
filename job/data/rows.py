"""The rows of a run: which row comes i-th, whatever the number of GPUs and wherever the run was resumed.

Epoch 0 is the row files in order, each as stored (its rows were written in a seeded permutation). Every later epoch is
a seeded permutation of the files and of the rows within each file. A row has T+1 tokens: `row[:-1]` predicts `row[1:]`.

Of a set that is only begun, row files come while training runs. A row that is not there yet is waited for, and whoever
is watching is told; a row that nobody is making is an error.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import numpy as np

from job.data.lock import is_being_made
from job.data.permutation import permutation
from job.data.prepare import Prepared
from job.errors import DataError
from job.reporter import Reporter
from job.store.sealed import is_sealed

CHUNK_ROWS = 8192
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 60.0
"""how long nobody may be making a row that is waited for (a feeder needs a moment to start)"""


class Rows:
    """Random access to the endless sequence of rows of a prepared set; `len` is the rows of one epoch, or those that
    have come so far.

    While a row is waited for, `check()` is called now and then, and `reporter` told.
    """

    def __init__(
        self,
        prepared: Prepared,
        seed: int,
        *,
        check: Callable[[], None] = lambda: None,
        reporter: Reporter | None = None,
    ) -> None:
        self._prepared, self._check, self._reporter = prepared, check, reporter or Reporter()
        self._seed = seed
        self.row_tokens = prepared.seq_len + 1
        self._open()
        self._plan = functools.lru_cache(maxsize=2)(self._files_of_epoch)
        self._within = functools.lru_cache(maxsize=4)(self._rows_of_file)

    def _open(self) -> None:
        """Map the row files that are there."""
        self._is_whole = self._prepared.is_whole
        self._files = [np.asarray(np.load(path, mmap_mode="r")) for path in self._prepared.row_files]

    def __len__(self) -> int:
        return sum(len(file) for file in self._files)

    def order(self, epoch: int, index: int) -> tuple[int, int]:
        """(file, row within the stored file) of the `index`-th row of `epoch`."""
        files, starts = self._plan(epoch)
        slot = int(np.searchsorted(starts, index, side="right")) - 1
        offset = index - int(starts[slot])
        return int(files[slot]), offset if epoch == 0 else int(self._within(epoch, int(files[slot]))[offset])

    def take(self, start: int, count: int, out: np.ndarray | None = None) -> np.ndarray:
        """(count, T+1) uint16: rows start..start+count-1 of the run, into `out` when given."""
        out = np.empty((count, self.row_tokens), np.uint16) if out is None else out
        self._wait_for(start + count)
        done = 0
        while done < count:
            done += self._copy(start + done, out[done:count])
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
            self._check()
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

    def _copy(self, start: int, out: np.ndarray) -> int:
        """Copy rows from `start` on as far as their file goes; how many."""
        epoch, index = divmod(start, len(self))
        files, starts = self._plan(epoch)
        slot = int(np.searchsorted(starts, index, side="right")) - 1
        file = self._files[files[slot]]
        offset = index - int(starts[slot])
        count = min(len(out), len(file) - offset)
        if epoch == 0:
            out[:count] = file[offset : offset + count]
        else:
            np.take(
                file,
                self._within(epoch, int(files[slot]))[offset : offset + count],
                axis=0,
                out=out[:count],
                mode="clip",
            )
        return count

    def _files_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The files in the epoch's order, and the index of each one's first row."""
        count = len(self._files)
        files = np.arange(count) if epoch == 0 else permutation(count, self._seed, "files", epoch)
        lengths = np.array([len(self._files[file]) for file in files])
        return files, np.cumsum(lengths) - lengths

    def _rows_of_file(self, epoch: int, file: int) -> np.ndarray:
        return permutation(len(self._files[file]), self._seed, "rows", epoch, file)
