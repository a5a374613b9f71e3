"""One start of a run, from the claim to the exit code: processes, signals, events.

`supervise` starts a stage's ranks as children in sessions of their own (a terminal's Ctrl-C reaches the supervisor
alone), writes down what they report, and ends with an exit code of the table or raises the exception that carries it.

A first SIGINT, SIGTERM or SIGHUP, or a cloud's announcement that it takes the machine back, ends training between two
steps with a checkpoint (job/train/context.py) and any other stage, or training before its first step, at once: what is
sealed stays, what is not is made again. How long the checkpoint is waited for follows from what it takes; where there
is less time (`stop_seconds`), none is begun. After a second signal, or when that time is over, ranks are killed and the
checkpoint before is the one that counts. All of this exits 75: the same command goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from job.console import Console
from job.errors import InterruptedRun, OutOfMemoryError, UsageError, error_for
from job.machine import cgroup, container
from job.reporter import Reporter
from job.run.fruitless import GOES_ON, Death, RankDied
from job.run.processes import GRACE, LocalRank
from job.run.silence import SECONDS, SilenceClock
from job.store.checkpoint_folder import CheckpointManager

STOP_SECONDS = 120.0
"""that a signal gives, unless SPEEDRUN_STOP_SECONDS says otherwise: `docker stop` gives 10, Kubernetes and Slurm 30;
what a stop needs is mostly less, and a kill in the middle of it costs no more than one at once"""


def stop_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds that a signal gives; UsageError unless SPEEDRUN_STOP_SECONDS is a positive number."""
    text = environment.get("SPEEDRUN_STOP_SECONDS", "")
    with contextlib.suppress(ValueError):
        if not text or float(text) > 0:
            return float(text or STOP_SECONDS)
    raise UsageError(f"SPEEDRUN_STOP_SECONDS={text} cannot be used: give a positive number of seconds")


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ignore_signals() -> None:
    """When all is sealed: what comes now stops nothing."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Interrupts:
    """Counts SIGINT, SIGTERM and SIGHUP while it is in force.

    One wish is one signal: that every node of a run gets it, or that `timeout` and a shell pass it on to the process
    and again to its group, makes it no second one, which would end the run at once.
    """

    TOGETHER = 0.3
    """seconds within which two signals are one"""

    def __init__(self) -> None:
        self.name = ""
        self._last = float("-inf")
        self.count = 0
        self.seconds = stop_seconds()
        """that there are until the machine or the process is gone"""

    def __enter__(self) -> Interrupts:
        handled = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]  # as nohup wants
        self._previous = {s: signal.signal(s, self._note) for s in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self, stage: str) -> None:
        """Between stages: InterruptedRun when a signal has come."""
        if self.count:
            raise InterruptedRun(f"{self.name} came before {stage}; {GOES_ON}")

    def announce(self, name: str, seconds: float) -> None:
        """As a first signal: the machine goes away in `seconds`."""
        if not self.count:
            self.name, self.seconds, self.count = name, min(self.seconds, seconds), 1

    def _note(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if now - self._last > self.TOGETHER:
            self.count += 1
        self._last = now
        self.name = signal.Signals(number).name


def supervise(
    stage: str,
    ranks: Sequence[LocalRank],
    *,
    reporter: Reporter,
    console: Console,
    interrupts: Interrupts,
    manager: CheckpointManager | None = None,
    meanwhile: Callable[[], None] = lambda: None,
    silence: float = SECONDS,
    alone: bool = True,
) -> None:
    """Write down what the ranks of `stage` report until all have ended; `manager` seals their checkpoints and says when
    one is due.

    `meanwhile` is called several times a second: what else the supervisor minds; it must not block, and what it raises
    ends the stage. silence: seconds without a word from any rank after which all are killed. alone: no other node has
    ranks of the stage. Raises InterruptedRun after a signal, RankDied when a signal, silence or its device ended a
    rank, the error that a rank named, or RuntimeError (a bug of ours, exit 1) with the tail of its log.
    """
    selector = selectors.DefaultSelector()
    for rank in ranks:
        selector.register(rank.pipe, selectors.EVENT_READ, rank)
    control = _Control(stage, ranks[0], interrupts, console, manager)
    groups = [[rank for rank in ranks if not rank.apart], *([rank] for rank in ranks if rank.apart)]
    clocks = [SilenceClock(stage, group, silence, console, alone=alone) for group in groups]

    def listen() -> None:
        for key, _ in selector.select(timeout=0.2):
            try:
                for message in key.data.messages():
                    _take(key.data, message, reporter, console, manager)
            except EOFError:
                selector.unregister(key.fd)
                os.close(key.fd)

    kills = cgroup.oom_kills()
    try:
        while selector.get_map() and all(rank.poll() in (None, 0) for rank in ranks):
            if all(rank.poll() == 0 or rank.may_be_left for rank in ranks):
                break
            listen()
            failed = min(rank.failed for rank in ranks)
            if time.monotonic() - failed > GRACE:  # one has said what it failed with, and does not end
                break
            control.advance()
            for clock in clocks if math.isinf(failed) else ():
                clock.check(listen)
            meanwhile()
        codes = [rank.ended() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        _drain(selector, reporter, console, manager)
        selector.close()
        console.close()
    if cgroup.oom_kills() != kills and any(codes) and not any(rank.error for rank in ranks):
        raise OutOfMemoryError(_memory_sentence(stage))
    _raise_failure(stage, ranks, codes, signalled=interrupts.count > 0)


class _Control:
    """Tells the node's first rank when a checkpoint is due, and to stop after a signal."""

    def __init__(
        self, stage: str, first: LocalRank, interrupts: Interrupts, console: Console, manager: CheckpointManager | None
    ) -> None:
        self.stage, self.first, self.interrupts, self.console, self.manager = stage, first, interrupts, console, manager
        self.killed_at: float | None = None

    def advance(self) -> None:
        if self.manager:
            self.manager.check()
        if self.interrupts.count:
            self._stop()
        elif self.manager and self.first.steps_to_stop is not None and self.manager.due():
            self.manager.restart_clock()
            self.first.tell({"do": "checkpoint"})

    def _stop(self) -> None:
        if self.killed_at is None:
            self.killed_at = time.monotonic() + self._patience()
            self.console.say(f"{self.interrupts.name}: stopping {self.stage} ...")
            self.first.tell({"do": "stop"})
        if self.interrupts.count > 1 or time.monotonic() > self.killed_at:
            raise _interrupted(self.stage)

    def _patience(self) -> float:
        """Seconds until the ranks are killed. InterruptedRun where there is nothing to save, or no time to."""
        if self.first.steps_to_stop is None:  # before the first step
            raise _interrupted(self.stage)
        time_needed = self.first.steps_to_stop * self.first.step_seconds + (self.manager.seconds if self.manager else 0)
        if time_needed > self.interrupts.seconds:
            raise InterruptedRun(
                f"{self.interrupts.name} came, and a checkpoint would take about {time_needed:.0f} s of the"
                f" {self.interrupts.seconds:.0f} s that there are: none was begun; {GOES_ON}"
            )
        return min(self.interrupts.seconds, max(GRACE, 5 + 1.5 * time_needed))


def _take(
    rank: LocalRank, message: dict[str, Any], reporter: Reporter, console: Console, manager: CheckpointManager | None
) -> None:
    match message:
        case {"progress": [stage, done, total, unit]}:
            console.progress(stage, done, total, unit)
        case {"error": [code, text]}:
            rank.error, rank.failed = (code, text), time.monotonic()
        case {"broken": text, "device": device, **named}:
            rank.broken, rank.failed = (named.get("who", rank.name), text, device), time.monotonic()
        case {"whole": _}:
            rank.may_be_left = True
        case {"training": _, "steps_to_stop": steps}:
            rank.steps_to_stop = steps
            if manager:
                manager.restart_clock()
        case {"step_seconds": seconds}:
            rank.step_seconds = seconds
        case {"kind": kind, **fields}:
            reporter.emit(kind, **fields)
            if kind == "train.step":
                rank.step_seconds = fields["ms"] / 1000
            if kind == "warning":
                console.say(f"warning: {fields['text']}")
            if "proof" in fields:
                console.say(f"{fields['device']}: {fields['proof']}")
            console.detail(f"{kind} {json.dumps(fields)}")


def _drain(
    selector: selectors.BaseSelector, reporter: Reporter, console: Console, manager: CheckpointManager | None
) -> None:
    """Take what dead ranks had still said: a pipe outlives its writer."""
    for key in list(selector.get_map().values()):
        with contextlib.suppress(EOFError, BlockingIOError):
            while True:
                for message in key.data.messages():
                    _take(key.data, message, reporter, console, manager)
        os.close(key.fd)


def _interrupted(stage: str) -> InterruptedRun:
    return InterruptedRun(f"{stage} was interrupted; {GOES_ON}")


def _memory_sentence(stage: str) -> str:
    limit = cgroup.memory_limit()
    of = f" of {limit / 1e9:.2f} GB" if limit else ""
    return (
        f"{stage} ran out of memory: the kernel killed one of its processes at the limit{of};"
        f" {container.memory_remedy()}, or lower train.device_batch_size; {GOES_ON}"
    )


def _raise_failure(stage: str, ranks: Sequence[LocalRank], codes: list[int | None], *, signalled: bool) -> None:
    """Raise what the first failed rank said, or what its exit code says; `codes` are from before the others were
    killed.

    `signalled`: the supervisor was, so that a rank's death by a signal says nothing about the machine.
    """
    for rank in ranks:
        if rank.error:
            raise error_for(*rank.error)
    deaths = [(Death(stage, *rank.broken), rank.log) for rank in ranks if rank.broken]
    deaths += [
        (Death(stage, rank.name, signal.Signals(-code).name), rank.log)
        for rank, code in zip(ranks, codes, strict=True)
        if code is not None and code < 0
    ]
    for death, log in deaths:
        sentence = f"{death}; {GOES_ON}"
        raise InterruptedRun(sentence) if signalled else RankDied(sentence, death, log)
    for rank, code in zip(ranks, codes, strict=True):
        if code:
            raise RuntimeError(f"{rank.name} of {stage} failed; the end of {rank.log}:\n{rank.tail()}")
