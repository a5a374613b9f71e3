"""One start of a run, from the claim to the exit code: processes, signals, events.

`supervise` starts a stage's ranks as children in sessions of their own (a terminal's Ctrl-C reaches the supervisor alone), writes
down what they report, and ends with an exit code of the table or raises the exception that carries it.

A first SIGINT or SIGTERM ends a training stage at a step border with a checkpoint (see job/worker.py) and any other stage at once:
what is sealed stays, what is not is made again. After a second signal, or when a rank does not reach the border within GRACE seconds, the ranks
are killed and the checkpoint before is the one that counts. Both exit 75: the same command goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from job.checkpoint_folder import Keeper
from job.console import Console
from job.errors import InterruptedRun, error_for
from job.machine import usable_cores
from job.progress import Reporter

GRACE = 15.0
"""seconds that ranks have to reach the shared border and seal a checkpoint (the table allows 20 in all)"""

RANK_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""What ranks are given unless the user's environment says otherwise. Threads that wait for each other sleep instead of spinning: on
cores that others use too, spinning is 4 to 8 times slower. glibc keeps freed activations instead of returning them to the kernel page by
page: a step's page faults cost 15 to 30 % of it. Both measured in LOG.md. On a GPU, segments that grow leave no holes between
activations of changing sizes: what the plan says fits must not fail by fragmentation."""

PYTHONPATH = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
"""with which children find this package wherever they are started"""

GOES_ON = "what is sealed is kept, and the same command goes on from there"

LOG_TAIL = 30
"""lines of a rank's log that a failure shows"""


class Interrupts:
    """Counts SIGINT and SIGTERM while it is in force."""

    def __init__(self) -> None:
        self.count = 0
        self.name = ""

    def __enter__(self) -> Interrupts:
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self, stage: str) -> None:
        """Between stages: InterruptedRun when a signal has come."""
        if self.count:
            raise InterruptedRun(f"{self.name} came before {stage}; {GOES_ON}")

    def _note(self, number: int, _frame: object) -> None:
        self.count += 1
        self.name = signal.Signals(number).name


class Rank:
    """One child process (of `module`): its pipes, its log, and the last unfinished line it sent."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], log: Path, module: str = "job.worker") -> None:
        read_end, write_end = os.pipe()
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**environment, "PYTHONPATH": PYTHONPATH, "SPEEDRUN_EVENTS_FD": str(write_end)},
                pass_fds=[write_end],
                start_new_session=True,
            )
        os.close(write_end)
        os.set_blocking(read_end, False)
        self.pipe = read_end
        self.error: tuple[int, str] | None = None
        self.boundary: int | None = None
        self.closed = False
        self._buffer = b""

    def messages(self) -> Iterator[dict[str, Any]]:
        """Whole lines that have arrived; EOFError when the child closed its end."""
        data = os.read(self.pipe, 1 << 16)
        if not data:
            self.closed = True
            raise EOFError
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            yield json.loads(line)

    def tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write((json.dumps(message) + "\n").encode())
            self.process.stdin.flush()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ended(self) -> int | None:
        """The exit code; None when the process closed its pipe and still runs after GRACE seconds, or has a failed peer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=GRACE if self.closed else 0)
        return None

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(arguments: list[str], *, world_size: int, threads: int, logs: Path, label: str) -> list[Rank]:
    """Start `world_size` children of this machine. `threads` CPU threads each (0: the cores, divided)."""
    per_rank = threads or max(1, usable_cores() // world_size)
    shared = (
        RANK_ENVIRONMENT
        | os.environ
        | {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": str(per_rank),
            "PYTHONUNBUFFERED": "1",
        }
    )
    return [
        Rank(arguments, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, logs / f"{label}.rank{rank}.log")
        for rank in range(world_size)
    ]


def supervise(
    stage: str,
    ranks: list[Rank],
    *,
    reporter: Reporter,
    console: Console,
    interrupts: Interrupts,
    keeper: Keeper | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Write down what the ranks of `stage` report until all have ended; `keeper` seals their checkpoints and says when one is due.

    `meanwhile` is called several times a second: what else the supervisor minds; it must not block, and what it raises ends the stage.
    Raises InterruptedRun after a signal, the error a rank named, or RuntimeError (a bug of ours, exit 1) with the tail of its log.
    """
    selector = selectors.DefaultSelector()
    for rank in ranks:
        selector.register(rank.pipe, selectors.EVENT_READ, rank)
    borders = _Borders(stage, ranks, interrupts, console, keeper)
    try:
        while selector.get_map() and all(rank.process.poll() in (None, 0) for rank in ranks):
            for key, _ in selector.select(timeout=0.2):
                try:
                    for message in key.data.messages():
                        _take(key.data, message, reporter, console, keeper)
                except EOFError:
                    selector.unregister(key.fd)
                    os.close(key.fd)
            borders.advance()
            meanwhile()
        codes = [rank.ended() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        _drain(selector, reporter, console, keeper)
        selector.close()
    _raise_failure(stage, ranks, codes)


class _Borders:
    """Agreements on a shared border: for a checkpoint when one is due, for the end after a signal."""

    def __init__(self, stage: str, ranks: list[Rank], interrupts: Interrupts, console: Console, keeper: Keeper | None) -> None:
        self.stage, self.ranks, self.interrupts, self.console, self.keeper = stage, ranks, interrupts, console, keeper
        self.stopping: float | None = None
        self.asked = False
        self.told_to_stop = False

    def advance(self) -> None:
        if self.interrupts.count:
            self._patience()
        if self.asked:
            self._agree()
        elif self.interrupts.count and not self.told_to_stop:
            self._ask()
        elif self.keeper and self.keeper.due():
            self.keeper.asked()
            self._ask()

    def _patience(self) -> None:
        if self.stopping is None:
            self.stopping = time.monotonic()
            self.console.say(f"{self.interrupts.name}: stopping {self.stage} ...")
        if self.keeper is None or self.interrupts.count > 1 or time.monotonic() - self.stopping > GRACE:
            raise _interrupted(self.stage)

    def _ask(self) -> None:
        self.asked = True
        for rank in self.ranks:
            rank.boundary = None
            rank.tell({"do": "hold"})

    def _agree(self) -> None:
        if any(rank.boundary is None for rank in self.ranks):
            return
        self.asked, self.told_to_stop = False, bool(self.interrupts.count)
        order = {"do": "go", "at": max(rank.boundary for rank in self.ranks), "then": "stop" if self.told_to_stop else "checkpoint"}
        for rank in self.ranks:
            rank.tell(order)


def _take(rank: Rank, message: dict[str, Any], reporter: Reporter, console: Console, keeper: Keeper | None) -> None:
    match message:
        case {"progress": [stage, done, total, unit]}:
            console.progress(stage, done, total, unit)
        case {"error": [code, text]}:
            rank.error = (code, text)
        case {"part": part} if keeper:
            keeper.take(part)
        case {"boundary": step}:
            rank.boundary = step
        case {"kind": kind, **fields}:
            reporter.emit(kind, **fields)
            if kind == "warning":
                console.say(f"warning: {fields['text']}")
            console.detail(f"{kind} {json.dumps(fields)}")


def _drain(selector: selectors.BaseSelector, reporter: Reporter, console: Console, keeper: Keeper | None) -> None:
    """Take what dead ranks had still said: a pipe outlives its writer."""
    for key in list(selector.get_map().values()):
        with contextlib.suppress(EOFError, BlockingIOError):
            while True:
                for message in key.data.messages():
                    _take(key.data, message, reporter, console, keeper)
        os.close(key.fd)


def _interrupted(stage: str) -> InterruptedRun:
    return InterruptedRun(f"{stage} was interrupted; {GOES_ON}")


def _raise_failure(stage: str, ranks: list[Rank], codes: list[int | None]) -> None:
    """Raise what the first failed rank said, or what its exit code says; `codes` are from before the others were killed."""
    for rank in ranks:
        if rank.error:
            raise error_for(*rank.error)
    for number, (rank, code) in enumerate(zip(ranks, codes, strict=True)):
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = " (the system may be short of memory)" if name == "SIGKILL" else ""
            raise InterruptedRun(f"rank {number} of {stage} was killed by {name}{hint}; {GOES_ON}")
        if code:
            raise RuntimeError(f"rank {number} of {stage} failed; the end of {rank.log}:\n{rank.tail()}")
