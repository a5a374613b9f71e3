"""The feeder: makes the rest of a prepared set while training consumes its beginning.

    prepare(whole=False)  ->  tokenizer, held-out rows, rows/00000
    training, rank 0      ->  with training_rows(feeds=True): a process that runs prepare(whole=True), which goes on
                              with what is missing: pulls it from the store, or fetches and packs it
    training, every rank  ->  rows.take(): a row file that is not sealed yet is waited for

The feeder says what it does through rank 0's reporter, ends with rank 0 whatever ends that, and is started again with
it. Its failure is raised where training waits for it. It and its packers and counters are `nice`: they take the cores
that training leaves, so that no GPU waits for a rank that waits for a core.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.data.prepare import Prepared, prepare
from job.data.rows import Rows
from job.data.workers import GRACE_SECONDS, end_with_parent
from job.errors import ExitCode, SpeedrunError
from job.reporter import Reporter
from job.store import store_of_environment

if TYPE_CHECKING:
    from job.recipe.config import DataConfig

NICENESS = 10
"""of the feeder and of every process that it starts"""


def _nothing(prepared: Prepared, reporter: Reporter) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Job:
    """The arguments of `prepare`, and what is done with the whole set."""

    out: Path
    data: DataConfig
    seq_len: int
    workers: int
    rows: int
    afterwards: Callable[[Prepared, Reporter], Any] = _nothing


class Feeder:
    """The feeding process as the training process sees it."""

    def __init__(self, job: Job, reporter: Reporter) -> None:
        context = multiprocessing.get_context("spawn")
        self._receiver, sender = context.Pipe(duplex=False)
        self._reporter = reporter
        self._error: BaseException | None = None
        self._process = context.Process(target=_feed, args=(job, sender), name="feeder")
        self._process.start()
        sender.close()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def check(self) -> None:
        """Raise what the feeder failed with, if it did."""
        if self._error:
            raise self._error

    def finish(self) -> None:
        """Until the set is whole; raises what the feeder failed with."""
        self._listener.join()
        self.check()

    def stop(self) -> None:
        self._process.terminate()
        self._process.join(GRACE_SECONDS)
        self._process.kill()
        self._process.join()

    def _listen(self) -> None:
        done = False
        with contextlib.suppress(EOFError):
            while True:
                match self._receiver.recv():
                    case ("emit", kind, fields):
                        self._reporter.emit(kind, **fields)
                    case ("progress", *shown):
                        self._reporter.progress(*shown)
                    case ("failed", error):
                        self._error = error
                    case ("done",):
                        done = True
        self._process.join()
        if not done and not self._error:
            self._error = RuntimeError(
                f"the feeder ended with code {self._process.exitcode}; its traceback stands in the rank's log"
            )


@contextlib.contextmanager
def feeding(prepared: Prepared, job: Job, reporter: Reporter) -> Iterator[Feeder | None]:
    """Have the rest of `prepared` made while the body runs, and wait for it at the end; None where the set is whole
    already."""
    if prepared.is_whole:
        yield None
        return
    feeder = Feeder(job, reporter)
    try:
        yield feeder
        feeder.finish()
    finally:
        feeder.stop()


@contextlib.contextmanager
def training_rows(prepared: Prepared, job: Job, reporter: Reporter, *, feeds: bool) -> Iterator[Rows]:
    """The run's rows. The rank that `feeds` has the rest of the set made while the body runs, and is the one that tells
    of waiting."""
    if not feeds:
        yield Rows(prepared, job.data.seed)
        return
    with feeding(prepared, job, reporter) as feeder:
        yield (
            Rows(prepared, job.data.seed, check=feeder.check, reporter=reporter)
            if feeder
            else Rows(prepared, job.data.seed)
        )


class _PipeReporter(Reporter):
    """Sends reports to the training process; safe from several threads."""

    def __init__(self, sender: Connection) -> None:
        self._sender = sender
        self._lock = threading.Lock()

    def send(self, *message: Any) -> None:
        with self._lock:
            self._sender.send(message)

    def emit(self, kind: str, **fields: Any) -> None:
        self.send("emit", kind, fields)

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        self.send("progress", stage, done, total, unit)


def _feed(job: Job, sender: Connection) -> None:
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitCode.RESUME))
    threading.Thread(target=end_with_parent, daemon=True).start()
    reporter = _PipeReporter(sender)
    try:
        store = store_of_environment()
        job.afterwards(
            prepare(job.out, job.data, job.seq_len, reporter, job.workers, rows=job.rows, store=store), reporter
        )
    except SpeedrunError as error:
        reporter.send("failed", error)
    else:
        reporter.send("done")
