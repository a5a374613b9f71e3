"""The supervisor's hold on the uploader (job/run/uploader.py): started with the run, minded in passing, waited for at
the end."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.console import Console
from job.errors import ExitCode, InterruptedRun, SpeedrunError, StorageError, error_for
from job.reporter import Reporter
from job.run.bucket import Bucket
from job.run.processes import LocalRank, environment_for
from job.run.supervise import Interrupts
from job.store.attempt import Attempt

SIGNAL_WAIT = 90.0
"""seconds at most that the end after a signal waits for uploads: a spot machine has two minutes, ranks may have taken a
quarter of one"""
LAST_WAIT = 60.0
"""seconds at most for the last line of the record"""
RESTART_AFTER = 10.0
"""seconds between two starts of an uploader that ended by itself"""
ASK_AFTER = 30.0
"""seconds without a word after which the uploader is asked for one; twice as many until it is started again"""
SPOKEN_AFTER = 2.0
"""seconds of waiting at the end that pass without a word"""


class Uploads:
    """What there is to do for a run without a bucket: nothing."""

    def start(self) -> None:
        """Begin to upload."""

    def prepared(self, set_id: str) -> None:
        """This prepared set is in use: what is sealed of it is uploaded."""

    def check(self) -> None:
        """Write down what the uploader said; UsageError once another attempt has taken the run over. Does not block."""

    def flush(self, after: BaseException | None = None) -> None:
        """Wait until all that is sealed has arrived. What did not is raised as StorageError, or only said where `after`
        is the reason to end."""

    def last(self, after: BaseException | None = None) -> None:
        """Wait until page and events have arrived; raises as `flush` does."""


class AnnouncingReporter(Reporter):
    """Passes reports on, and tells `uploads` which prepared set is in use."""

    def __init__(self, reporter: Reporter, uploads: Uploads) -> None:
        self._reporter, self._uploads = reporter, uploads

    def emit(self, kind: str, **fields: Any) -> None:
        self._reporter.emit(kind, **fields)
        if kind in ("prepare.started", "prepare.done"):
            self._uploads.prepared(fields["id"])


class BucketUploads(Uploads):
    """The uploader of one attempt, or with `run` None of prepared sets alone."""

    def __init__(
        self,
        bucket: Bucket,
        arguments: list[str],
        place: Path,
        log: Path,
        reporter: Reporter,
        console: Console,
        interrupts: Interrupts,
    ) -> None:
        self._bucket, self._place, self._reporter = bucket, place, reporter
        self._console, self._interrupts = console, interrupts
        self._arguments, self._log = [bucket.store.url, *arguments], log
        self._orders: list[dict[str, Any]] = []
        self._said: set[str] = set()
        self._left: list[str] = []
        self._why = "it did not answer"
        self._over = True

    def start(self) -> None:
        self._over = False
        self._start_child()

    def _start_child(self) -> None:
        self._started = time.monotonic()
        environment = environment_for("uploader", os.environ)
        self._child = LocalRank("the uploader", self._arguments, environment, self._log, ("-m", "job.run.uploader"))
        for order in self._orders:
            self._child.tell(order)

    def prepared(self, set_id: str) -> None:
        self._tell({"do": "prepared", "id": set_id})

    def _tell(self, order: dict[str, Any]) -> None:
        if not self._over and order not in self._orders:
            self._orders.append(order)
            self._child.tell(order)

    def check(self) -> None:
        if self._over:
            return
        if self._child.closed:
            if time.monotonic() - self._started > RESTART_AFTER:
                self._start_child()
            return
        silent = time.monotonic() - max(self._child.heard, self._started)
        if silent > 2 * ASK_AFTER:  # a store may block its threads, but not that which answers
            self._console.say(f"warning: the uploader does not answer for {silent:.0f} s and is started again")
            self._end_child()
            return
        if silent > ASK_AFTER:
            self._child.tell({"do": "beat"})
        try:
            for message in self._child.messages():
                self._take(message)
        except BlockingIOError:
            pass
        except EOFError:
            self._console.say(
                "warning: the uploader ended by itself and is started again; the end of"
                f" {self._log}:\n{self._child.tail()}"
            )
            self._end_child()

    def _take(self, message: dict[str, Any]) -> None:
        match message:
            case {"error": [code, text]} if code != ExitCode.BUG:
                self.stop()
                raise error_for(code, text)
            case {"error": [_, _]}:
                self._child.kill()
            case {"left": left}:
                self._left = left
            case {"flushed": _} | {"published": _}:
                self._said |= message.keys()
            case {"kind": kind, **fields}:
                self._reporter.emit(kind, **fields)
                if kind == "upload.failed":
                    self._why = fields["why"]
                    self._console.say(
                        f"warning: {fields['folder']} was not uploaded ({self._why}); next try in"
                        f" {fields['next_try']:.0f} s"
                    )

    def flush(self, after: BaseException | None = None) -> None:
        seconds = SIGNAL_WAIT if isinstance(after, InterruptedRun) else self._bucket.wait
        self._wait_for("flush", "flushed", seconds, after)

    def last(self, after: BaseException | None = None) -> None:
        self._left = []
        self._wait_for("last", "published", min(LAST_WAIT, self._bucket.wait), after)

    def _wait_for(self, order: str, answer: str, seconds: float, after: BaseException | None) -> None:
        if self._over:
            return
        began, signals, spoken = time.monotonic(), self._interrupts.count, False
        self._tell({"do": order})
        while answer not in self._said:
            waited = time.monotonic() - began
            if waited > seconds or self._interrupts.count > signals:
                self._give_up(waited, after, interrupted=self._interrupts.count > signals)
                return
            if waited > SPOKEN_AFTER and not spoken:
                spoken = True
                self._console.say(
                    f"waiting for uploads to {self._bucket.store.url}, at most {seconds:.0f} s (Ctrl-C stops waiting)"
                )
            select.select([] if self._child.closed else [self._child.pipe], [], [], 0.1)
            try:
                self.check()
            except SpeedrunError as error:
                if after is None:
                    raise
                self._console.say(f"warning: {error}")
                return

    def _give_up(self, waited: float, after: BaseException | None, *, interrupted: bool) -> None:
        self.stop()
        more = f" and {len(self._left) - 1} more" if len(self._left) > 1 else ""
        what = f"{self._left[0]}{more}" if self._left else "the end of the record"
        sentence = (
            f"{what} did not reach {self._bucket.store.url} within {waited:.0f} s ({self._why}); everything is on local"
            f" disk in {self._place}, and the same command uploads it"
        )
        if after is not None:
            self._console.say(f"warning: {sentence}")
        else:
            raise (InterruptedRun if interrupted else StorageError)(sentence)

    def stop(self) -> None:
        """End the uploader, whatever it is doing."""
        if not self._over:
            self._over = True
            self._end_child()

    def _end_child(self) -> None:
        self._child.kill()
        self._child.closed = True
        with contextlib.suppress(OSError):
            os.close(self._child.pipe)


@contextlib.contextmanager
def uploading(
    bucket: Bucket | None,
    out: Path,
    run: Path | None,
    attempt: Attempt | None,
    final_rows: int,
    console: Console,
    interrupts: Interrupts,
    logs: Path | None = None,
    minutes: float = 0.0,
) -> Iterator[Uploads]:
    """The uploads of a run, or with `run` None of prepared sets alone; without a bucket, none. The uploader ends with
    the block. minutes: train.upload_minutes."""
    if bucket is None:
        yield Uploads()
        return
    number = attempt.number if attempt else 0
    arguments = [str(out), str(run or ""), str(number), str(final_rows), str(minutes)]
    log = (logs or (run or out) / "logs") / f"{number}.upload.log"
    uploads = BucketUploads(bucket, arguments, run or out / "prepared", log, attempt or Reporter(), console, interrupts)
    try:
        yield uploads
    finally:
        uploads.stop()
