"""Attempts and events: what happened, kept so that a crash in mid-line loses at most that line.

Each start of a run is an attempt. It claims `attempts/N` by a create-only write and from then on is the only writer of
`events/N.jsonl`: one JSON object a line, appended and flushed. The newest claim wins; an older attempt that is still
alive stops before it publishes again. With a bucket the claim is made there as well (job/store/fence.py).

Events are ordered by attempt and `seq`, and durations follow from `s`, the seconds since the attempt began on a clock
that nobody sets; `t`, the machine's date, is for showing only. `crc` covers everything else: a line that was changed
is passed over and counted. Events of earlier versions have neither `s` nor `crc`.

`fold` reads the events of all attempts and gives the `Record`: clocks, curves, stages, scores. Nothing else keeps
state: sealed folders say what is done, events what happened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from job.addresses import recorded_argv
from job.recipe.leaderboard import UNTIMED_STEPS
from job.reporter import Reporter
from job.store.documents import canonical_json, hashed
from job.store.fence import TakenOver, claim_key, newest_claimed, read_claim
from job.store.sealed import atomic_write, storage_errors
from job.store.stores import Store


class Attempt(Reporter):
    """One start of a run: the claim, and the only writer of its event file."""

    def __init__(self, run: Path, number: int) -> None:
        self.run = run
        self.number = number
        self._sequence = 0
        self._began = time.monotonic()
        self._torn = False
        self.heard: Callable[[dict[str, Any]], None] = lambda event: None
        """is given each event when it is written"""
        self._file = open(run / "events" / f"{number}.jsonl", "ab", buffering=0)  # noqa: SIM115 - lives as long as the attempt

    @classmethod
    def claim(cls, run: Path, store: Store | None = None, **notes: Any) -> Attempt:
        """Claim the next free number, in the `store` first if there is one; `notes` go into the claim.

        Of several claimants at once each gets its own number, and the highest is the newest.
        """
        with storage_errors(run):
            (run / "attempts").mkdir(parents=True, exist_ok=True)
            (run / "events").mkdir(exist_ok=True)
        claim = {
            "nonce": secrets.token_hex(8),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "t": time.time(),
            "argv": recorded_argv(),
            **notes,
        }
        data = json.dumps(hashed(claim)).encode()
        number = 1 + max(newest_attempt(run), newest_claimed(store, run.name) if store else 0)
        while (store and not store.create(claim_key(run.name, number), data)) or not _create(
            run / "attempts" / str(number), data
        ):
            number += 1
        return cls(run, number)

    def check_newest(self) -> None:
        """TakenOver when another attempt of this machine took over; those of others the uploader's store sees."""
        newest = newest_attempt(self.run)
        if newest > self.number:
            raise TakenOver(self.run.name, self.number, newest)

    def rival(self) -> str:
        """A sentence about the attempt before, where a process of this machine makes it and no event ended it.

        A process that was given the number of a killed one is mistaken for it.
        """
        before = newest_attempt(self.run, below=self.number)
        if not before:
            return ""
        claim = read_claim((self.run / "attempts" / str(before)).read_bytes())
        pid = claim.get("pid")
        if claim.get("host") != socket.gethostname() or not isinstance(pid, int) or pid < 1 or pid == os.getpid():
            return ""
        with contextlib.suppress(PermissionError):
            try:
                os.kill(pid, 0)
            except (ProcessLookupError, OverflowError):
                return ""
        file = self.run / "events" / f"{before}.jsonl"
        with contextlib.suppress(FileNotFoundError), open(file, encoding="utf-8", errors="replace") as lines:
            if any(event["kind"] == "attempt.ended" for event in events_in(lines)):
                return ""
        return f"attempt {before} of this run goes on in process {pid}: it will stop, and this one takes over"

    def emit(self, kind: str, **fields: Any) -> None:
        record: dict[str, Any] = {"t": time.time(), "s": round(time.monotonic() - self._began, 6)}
        record |= {"attempt": self.number, "seq": self._sequence, "kind": kind, **fields}
        record["crc"] = _checksum(record)
        self._sequence += 1
        line = b"\n" * self._torn + json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with storage_errors(self.run):
            self._torn = True
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._torn = False
        self.heard(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()


def _create(path: Path, data: bytes) -> bool:
    """Make the file unless there is one; whether this call made it."""
    try:
        with storage_errors(path), open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def newest_attempt(run: Path, below: float = math.inf) -> int:
    """The highest claimed number `below` that, 0 when none is."""
    folder = run / "attempts"
    numbers = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return max((number for number in numbers if number < below), default=0)


def discard(run: Path) -> None:
    """Remove a run but for the claims that no event ended: an attempt that is still alive learns of the next one."""
    ended = {event["attempt"] for event in read_events(run) if event["kind"] == "attempt.ended"}
    claims = (path for path in (run / "attempts").glob("*") if path.name.isdigit() and int(path.name) not in ended)
    kept = {path: path.read_bytes() for path in claims}
    shutil.rmtree(run)
    for path, data in kept.items():
        atomic_write(path, data)


def _checksum(event: dict[str, Any]) -> int:
    covered = canonical_json({key: value for key, value in event.items() if key not in ("t", "crc")})
    return zlib.crc32(covered.encode("utf-8", "surrogatepass"))


def read_events(run: Path, unusable: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """All events of all attempts in order; lines that cannot be used are passed over and put into `unusable`."""
    for path in event_files(run):
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from events_in(file, unusable)


def event_files(run: Path) -> list[Path]:
    """One for each attempt, in order."""
    files = (path for path in (run / "events").glob("*.jsonl") if path.stem.isdigit())
    return sorted(files, key=lambda path: int(path.stem))


def events_in(lines: Iterable[str | bytes], unusable: list[Any] | None = None) -> Iterator[dict[str, Any]]:
    """What the `lines` of one attempt say; those that a crash cut short, that were changed or come twice are put into
    `unusable`."""
    last = -1
    for line in lines:
        event: Any = None
        with contextlib.suppress(ValueError, RecursionError, TypeError):
            event = json.loads(line)
        if _is_event(event) and event["seq"] > last:
            last = event["seq"]
            yield event
        elif unusable is not None and line.strip():
            unusable.append(line)


def _is_event(event: Any) -> bool:
    """Whether it has what every event has, unchanged."""
    if not isinstance(event, dict) or not isinstance(event.get("t"), (int, float)):
        return False
    whole = all(type(event.get(key)) is kind for key, kind in {"attempt": int, "seq": int, "kind": str}.items())
    return whole and ("crc" not in event or event["crc"] == _checksum(event))


@dataclasses.dataclass
class Span:
    """A stage of one attempt on the time axis; `end` is None while it runs or when it was killed."""

    attempt: int
    stage: str
    start: float
    end: float | None = None


@dataclasses.dataclass
class Life:
    """One attempt on the time axis; `exit_code` is None when it vanished without a word.

    An axis of dates on which no clock goes back: an attempt starts at its first event's date, or where the one before
    ended when that is later, and goes on by its own clock.
    """

    number: int
    start: float
    end: float
    first: dict[str, Any]
    again: bool
    """whether the run had its score already: what was done is looked at, or evaluated once more"""
    exit_code: int | None = None
    reason: str = ""

    def at(self, event: dict[str, Any]) -> float:
        """Where an event of this attempt is on the axis."""
        if "s" in event and "s" in self.first:
            return self.start + event["s"] - self.first["s"]
        return max(self.end, event["t"])


@dataclasses.dataclass
class Record:
    """All attempts of a run, folded. Later attempts' events replace earlier ones of the same step, task or name."""

    attempts: list[Life] = dataclasses.field(default_factory=list)
    stages: list[Span] = dataclasses.field(default_factory=list)
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    quote: dict[str, Any] = dataclasses.field(default_factory=dict)
    adopted: dict[str, Any] = dataclasses.field(default_factory=dict)
    prepared: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    shards: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    leaks: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    validations: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    slow_ranks: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    rank_times: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    checkpoints: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    bpb: dict[str, Any] = dataclasses.field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    score: dict[str, Any] = dataclasses.field(default_factory=dict)
    samples: dict[str, str] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)
    unusable: list[str] = dataclasses.field(default_factory=list)
    """lines of the event files that were cut short or changed"""

    @property
    def training_seconds(self) -> float:
        """The leaderboard's clock: steps 11 ... N-1, each once; no evaluation, checkpoint or compilation."""
        return sum(e["ms"] for step, e in self.steps.items() if step >= UNTIMED_STEPS) / 1000

    @property
    def node_seconds(self) -> float:
        """Wall time over all attempts until the run had its score, re-done steps included."""
        return sum(life.end - life.start for life in self.attempts if not life.again)

    def stage_seconds(self) -> dict[str, float]:
        """Seconds by stage until the run had its score; a killed span counts up to its attempt's last event."""
        ends = {life.number: life.end for life in self.attempts if not life.again}
        total: dict[str, float] = {}
        for span in self.stages:
            if span.attempt not in ends:
                continue
            end = span.end if span.end is not None else ends[span.attempt]
            total[span.stage] = total.get(span.stage, 0.0) + end - span.start
        return total


LATEST = {
    "attempt.started": "machine",
    "quote": "quote",
    "checkpoint.adopted": "adopted",
    "prepare.tokenizer": "tokenizer",
    "prepare.done": "prepared",
    "prepare.leaks": "leaks",
    "train.start": "train",
    "eval.bpb": "bpb",
    "eval.done": "score",
}
"""kinds of events of which the last one counts, and the field of the record that it becomes"""
BY_KEY = {
    "prepare.rows": ("shards", "shard"),
    "train.step": ("steps", "step"),
    "train.val": ("validations", "step"),
    "train.slow_ranks": ("slow_ranks", "step"),
    "train.ranks": ("rank_times", "step"),
    "checkpoint.sealed": ("checkpoints", "rows"),
    "eval.task": ("tasks", "task"),
}
"""kinds of which the last one by key counts"""


def fold(run: Path) -> Record:
    """Fold the events of all attempts of `run` into one Record."""
    record = Record()
    for event in read_events(run, record.unusable):
        fold_event(record, event)
    return record


def fold_event(record: Record, event: dict[str, Any]) -> None:
    """Fold one more event, in the order of `read_events`, into `record`; those of lesser evaluations only take time."""
    fields = {k: v for k, v in event.items() if k not in ("kind", "s", "crc")}
    number = event["attempt"]
    if not record.attempts or record.attempts[-1].number != number:
        start = max(event["t"], record.attempts[-1].end if record.attempts else event["t"])
        record.attempts.append(Life(number, start, start, event, again=bool(record.score)))
    life = record.attempts[-1]
    life.end = t = life.at(event)
    if "lesser" in event:
        return
    kind = event["kind"]
    try:
        if kind in LATEST:
            setattr(record, LATEST[kind], fields)
        elif kind in BY_KEY:
            name, key = BY_KEY[kind]
            getattr(record, name)[event[key]] = fields
        match kind:
            case "attempt.ended":
                life.exit_code, life.reason = event["exit_code"], event["reason"]
            case "stage.started":
                record.stages.append(Span(number, event["stage"], t))
            case "stage.done":
                for span in reversed(record.stages):
                    if span.attempt == number and span.stage == event["stage"]:
                        span.end = t
                        break
            case "warning":
                record.warnings.append(str(event["text"]))
            case "sample":
                record.samples[event["prompt"]] = event["text"]
    except (KeyError, TypeError):  # of an earlier version, whose events have no checksum
        record.unusable.append(json.dumps(event))
