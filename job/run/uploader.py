"""The uploader: a child process of the supervisor that mirrors a run into the bucket while ranks compute.

    local disk                                 bucket, the same keys
    recipe.json                      ------>   first of all
    checkpoints/<rows>/              ------>   the newest, where train.upload_minutes have passed since the last, at a
                                               stop, and the final one; those beyond the newest KEEP are removed
                                               there, and what was cut short
    compiled/<id>/                   ------>
    eval/<id>/<task>/ ...            ------>
    prepared/<id>/**                 ------>   whatever is sealed, what makes the set whole last
    events/N.jsonl, report/          ------>   every minute, at each validation and checkpoint, and last of all, with
                                               the ends of logs/, postmortem.json

It is a process of its own because a store may block for ever: nothing that it does can delay the supervisor, whose
ranks go on, and when its time is over it is killed. It keeps no queue: sealed folders say what there is to
upload, so what it holds in memory is the parts on their way. A failed upload is an event, and tried again; the files
that arrived are not put again.

    supervisor --(stdin)--> uploader     {"do": "prepared", "id": ..}  {"do": "flush"}  {"do": "last"}  {"do": "beat"}
    uploader --(the pipe)--> supervisor  events  {"left": [..]}  {"flushed": true}  {"published": true}
                                         {"error": [2, ..]}

Every write goes through a `Fenced` store: once a newer attempt has claimed the run, it says so, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from job.errors import ExitCode, SpeedrunError
from job.report import postmortem
from job.report.render import report_files
from job.reporter import RankReporter, Reporter
from job.retry import backoff
from job.store import open_store
from job.store.attempt import newest_attempt
from job.store.checkpoint_folder import KEEP, folders
from job.store.fence import Fenced, TakenOver, claim_key, run_key
from job.store.sealed import MANIFEST, is_sealed, open_sealed
from job.store.stores import Store, push_sealed, sealed_names

POLL = 0.5
"""seconds between two looks for sealed folders"""
LIVE_EVERY, LIVE_MOST = 60.0, 300.0
"""seconds between two uploads of events and page; more where they take more than a tenth of it, but never LIVE_MOST"""
MILESTONES = (b'"kind": "train.val"', b'"kind": "checkpoint.sealed"')
"""events at which page and events are uploaded at once"""
RETRY_FIRST, RETRY_MOST = 1.0, 60.0
"""seconds until a failed upload is tried again: doubled from the first to the most"""
LOG_BYTES = 1 << 20
"""of the end of each log"""
LAST_OF_A_SET = ("begun", "set")
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".md": "text/markdown; charset=utf-8",
}


class Mirror:
    """What of a run (and of the prepared set it uses) is not in the bucket yet, and how it gets there."""

    def __init__(
        self,
        store: Store,
        out: Path,
        run: Path | None,
        final_rows: int,
        reporter: Reporter,
        before_checkpoint: Callable[[], None] = lambda: None,
        minutes: float = 0.0,
    ) -> None:
        """minutes: between two checkpoints that are uploaded while training goes on."""
        self.store, self.out, self.run, self.final_rows, self.reporter = store, out, run, final_rows, reporter
        self._before_checkpoint, self._minutes = before_checkpoint, minutes
        self._last_checkpoint = time.monotonic()
        self._first_seen: dict[Path, float] = {}
        self.ending = False
        """nothing comes after: the newest checkpoint is uploaded however young the last one is"""
        self.prepared: set[str] = set()
        self._known: dict[str, str] = {}
        self._done: dict[str, tuple[int, int]] = {}
        self._pauses: dict[str, Iterator[float]] = {}
        self._next_try: dict[str, float] = {}

    def pending(self) -> list[str]:
        """Paths below `out`, which are keys, of all that is to be uploaded, the most urgent first."""
        marks = ((self._key(path), _mark(path)) for path in self._wanted())
        return [key for key, mark in marks if mark and mark != self._done.get(key)]

    def next(self) -> str | None:
        """The most urgent that is not waiting for its next try."""
        now = time.monotonic()
        return next((key for key in self.pending() if self._next_try.get(key, 0.0) <= now), None)

    def upload(self, key: str) -> None:
        """Upload one of `pending`. Raises TakenOver; any other failure is an event, and a later try."""
        path, began = self.out / key, time.monotonic()
        mark = _mark(path)
        try:
            size = self._put(key, path)
        except TakenOver:
            raise
        except Exception as error:
            if mark and _mark(path) == mark:  # else it was removed or sealed anew: the next look finds what is there
                self._fail(key, error)
            return
        self._pauses.pop(key, None)
        if mark:
            self._done[key] = mark
        if size:
            self.reporter.emit("upload.done", folder=key, bytes=size, seconds=time.monotonic() - began)

    def _put(self, key: str, path: Path) -> int:
        if path.is_file():
            self.store.put(key, path.read_bytes(), "application/json")
            return 0
        is_checkpoint = path.parent.name == "checkpoints"
        first = self._before_checkpoint if is_checkpoint else lambda: None
        size = push_sealed(self.store, key, path, first, known=self._known)
        if is_checkpoint:
            self._last_checkpoint = self._first_seen.get(path, time.monotonic())
            remove_older(self.store, path.parents[1], int(path.name), self.final_rows)
        return size

    def _fail(self, key: str, error: Exception) -> None:
        wait = next(self._pauses.setdefault(key, backoff(RETRY_FIRST, RETRY_MOST)))
        self._next_try[key] = time.monotonic() + wait
        self.reporter.emit("upload.failed", folder=key, why=reason(error), next_try=wait)

    def _wanted(self) -> Iterator[Path]:
        if self.run:
            yield self.run / "recipe.json"
            yield from self._checkpoints(self.run)
            yield from sorted(sealed_below(self.out / "compiled"))
            yield from sorted(sealed_below(self.run / "eval"))
            yield from sealed_below(self.run / "export")
        for set_id in sorted(self.prepared):
            yield from sorted(sealed_below(self.out / "prepared" / set_id), key=lambda p: (p.name in LAST_OF_A_SET, p))

    def _checkpoints(self, run: Path) -> list[Path]:
        """Each where no minutes are set; else the newest, if it is wanted."""
        if not self._minutes:
            return folders(run)
        for newest in folders(run)[:1]:
            since_last = self._first_seen.setdefault(newest, time.monotonic()) - self._last_checkpoint
            if self.ending or int(newest.name) == self.final_rows or since_last >= 60 * self._minutes:
                return [newest]
        return []

    def _key(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()


class Live:
    """The page and the events in the bucket, as they are now."""

    def __init__(self, store: Store, run: Path, attempt: int, reporter: Reporter) -> None:
        self.store, self.run, self.attempt, self.reporter = store, run, attempt, reporter
        self._earlier_report = _mark(run / "report")
        self._sizes: dict[int, int] = {}
        self._seen = 0
        self._one_at_a_time = threading.Lock()
        self._report_is_sealed = True

    def publish(self, *, last: bool = False) -> bool:
        """Put page, then events, where they are new; whether all of it arrived. Raises TakenOver; another failure is an
        event."""
        works = {"logs": self._logs, postmortem.NAME: self._postmortem} if last else {}
        works |= {"report": self._page, "events": self.events}
        return all([self._tried(name, work) for name, work in works.items()])

    def has_milestone(self) -> bool:
        """Whether training was validated or a checkpoint sealed since the last time it was asked."""
        with open(self.run / "events" / f"{self.attempt}.jsonl", "rb") as file:
            file.seek(self._seen)
            new = file.read().rpartition(b"\n")[0]
        self._seen += len(new)
        return any(kind in new for kind in MILESTONES)

    def _tried(self, name: str, publish: Callable[[], None]) -> bool:
        try:
            publish()
        except TakenOver:
            raise
        except Exception as error:
            folder = f"{run_key(self.run.name)}/{name}"
            self.reporter.emit("upload.failed", folder=folder, why=reason(error), next_try=LIVE_EVERY)
            return False
        return True

    def _page(self) -> None:
        """The report that this attempt sealed, or else what can be said so far, which is not sealed."""
        key, folder = f"{run_key(self.run.name)}/report", self.run / "report"
        sealed = is_sealed(folder) and _mark(folder) != self._earlier_report
        if sealed:
            texts = {
                name: (folder / name).read_text(encoding="utf-8") for name in open_sealed(folder, kind="report").files
            }
        else:
            texts = report_files(self.run)[1]
        if self._report_is_sealed:
            self.store.delete([f"{key}/{MANIFEST}"])
            self._report_is_sealed = False
        for name, text in texts.items():
            self.store.put(f"{key}/{name}", text.encode(), CONTENT_TYPES[Path(name).suffix])
        if sealed:
            self.store.put(f"{key}/{MANIFEST}", (folder / MANIFEST).read_bytes(), "application/json")
            self._report_is_sealed = True

    def _logs(self) -> None:
        """What the processes of this attempt had to say beside events: the end of it is where a failure is."""
        for log in (self.run / "logs").glob(f"{self.attempt}.*.log"):
            if text := log.read_bytes()[-LOG_BYTES:]:
                self.store.put(f"{run_key(self.run.name)}/logs/{log.name}", text, "text/plain; charset=utf-8")

    def _postmortem(self) -> None:
        """As this disk has it: none after an attempt that ended well."""
        file, key = self.run / postmortem.NAME, f"{run_key(self.run.name)}/{postmortem.NAME}"
        if file.is_file():
            self.store.put(key, file.read_bytes(), "application/json")
        else:
            self.store.delete([key])

    def events(self) -> None:
        """This attempt's events, and of earlier ones what the bucket has not: the file that has more of them counts."""
        with self._one_at_a_time:
            if not self._sizes:
                stored = self.store.list(f"{run_key(self.run.name)}/events")
                self._sizes = {int(Path(key).stem): size for key, size in stored.items() if Path(key).stem.isdigit()}
                for number in range(1, newest_attempt(self.run) + 1):
                    claim = self.run / "attempts" / str(number)
                    if number < self.attempt and claim.is_file():
                        self.store.create(claim_key(self.run.name, number), claim.read_bytes())
            for number in range(1, self.attempt + 1):
                self._sizes[number] = put_events(self.store, self.run, number, self._sizes.get(number, 0))


class Uploader:
    """The threads: one for sealed folders, one for events and page, so that neither waits for the other."""

    def __init__(self, mirror: Mirror, live: Live | None, reporter: RankReporter) -> None:
        self.mirror, self.live, self.reporter = mirror, live, reporter
        self._flush = threading.Event()
        self._last = threading.Event()

    def run(self) -> None:
        """Until the supervisor, or a newer attempt, ends this process."""
        for work in (self._folders, self._record) if self.live else (self._folders,):
            threading.Thread(target=self._guarded, args=(work,), daemon=True).start()
        for line in sys.stdin:
            match json.loads(line):
                case {"do": "prepared", "id": set_id}:
                    self.mirror.prepared |= {set_id}
                case {"do": "beat"}:
                    self.reporter.send_beat()
                case {"do": "flush"}:
                    self.mirror.ending = True
                    self.reporter.send({"left": self.mirror.pending()})
                    self._flush.set()
                case {"do": "last"}:
                    self._last.set()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except TakenOver as error:
            self.reporter.send({"error": [int(ExitCode.USAGE), str(error)]})
        except BaseException as error:
            self.reporter.send({"error": [int(ExitCode.BUG), f"the uploader failed: {error!r}"]})
            raise

    def _folders(self) -> None:
        while True:
            flushing = self._flush.is_set()
            if key := self.mirror.next():
                self.mirror.upload(key)
            elif flushing and not self.mirror.pending():
                self._flush.clear()
                self.reporter.send({"flushed": True})
            else:
                self._flush.wait(POLL) if not flushing else time.sleep(POLL)
            if flushing:
                self.reporter.send({"left": self.mirror.pending()})

    def _record(self) -> None:
        assert self.live
        while True:
            last, began = self._last.is_set(), time.monotonic()
            self.live.has_milestone()  # those that are there are published now
            arrived = self.live.publish(last=last)
            if last and arrived:
                self.reporter.send({"published": True})
                return
            if last:
                time.sleep(RETRY_FIRST)
            else:
                took = time.monotonic() - began
                self._last.wait(min(10 * took, LIVE_MOST - took))
                due = began + min(LIVE_MOST, max(LIVE_EVERY, 11 * took))
                while time.monotonic() < due and not self._last.is_set() and not self.live.has_milestone():
                    self._last.wait(POLL)


def put_events(store: Store, run: Path, attempt: int, stored: int = 0) -> int:
    """Put an attempt's events, whole lines, where they are more than the `stored` bytes that are there; how many are
    there now."""
    file = run / "events" / f"{attempt}.jsonl"
    data = file.read_bytes() if file.is_file() and file.stat().st_size > stored else b""
    data = data[: data.rfind(b"\n") + 1]
    if len(data) > stored:
        store.put(f"{run_key(run.name)}/events/{attempt}.jsonl", data, "application/x-ndjson")
    return max(stored, len(data))


def sealed_below(folder: Path) -> list[Path]:
    """All sealed folders below `folder`, at whatever depth; hidden ones are somebody's unfinished work."""
    found = []
    for parent, folders_in_it, files in os.walk(folder):
        folders_in_it[:] = [name for name in folders_in_it if not name.startswith(".")]
        found += [Path(parent)] if MANIFEST in files else []
    return found


def reason(error: Exception) -> str:
    return str(error) if isinstance(error, SpeedrunError) else f"{type(error).__name__}: {error}"


def remove_older(store: Store, run: Path, rows: int, final_rows: int) -> None:
    """Of the checkpoints of `run` in the `store`, keep that of `rows` and as many before it as a run's folder keeps.

    What is older and not sealed was cut short: it goes too, unless this disk has it and its upload is still to come.
    """
    parent = f"{run_key(run.name)}/checkpoints"
    sealed, names = sealed_names(store, parent), {key.split("/")[3] for key in store.list(parent)}
    older = sorted((name for name in names if name.isdigit() and int(name) < rows), key=int, reverse=True)
    kept = [name for name in older if name in sealed][: KEEP if rows == final_rows else KEEP - 1]
    kept += [name for name in older if name not in sealed and is_sealed(run / "checkpoints" / name)]
    for name in set(older) - set(kept):
        store.delete([f"{parent}/{name}/{MANIFEST}"])  # first, so that at no moment a damaged folder is there
        store.delete(store.list(f"{parent}/{name}"))


def _mark(path: Path) -> tuple[int, int] | None:
    """Changes whenever the folder is sealed anew, or the file is written; None when it is not there."""
    with contextlib.suppress(FileNotFoundError):
        status = (path / MANIFEST if path.is_dir() else path).stat()
        return status.st_mtime_ns, status.st_ino
    return None


def main(url: str, out: str, run: str, attempt: str, final_rows: str, minutes: str) -> None:
    os.nice(10)
    reporter = RankReporter.of_child()
    store, live = open_store(url), None
    if run:
        store = Fenced(store, Path(run).name, int(attempt))
        live = Live(store, Path(run), int(attempt), reporter)
    recorded = live.events if live else lambda: None
    mirror = Mirror(store, Path(out), Path(run) if run else None, int(final_rows), reporter, recorded, float(minutes))
    Uploader(mirror, live, reporter).run()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
