"""One process per task: results as they come, errors as they were raised, nobody left behind.

A task is a picklable object with `run(advance)`; `advance(n)` reports n more units of work. Each task gets a fresh
spawned process, so that its memory goes back to the system when it is done. A child ignores Ctrl-C: its parent ends it,
by SIGTERM, upon which it unwinds and removes what it had half written. It does the same when its parent is gone, so
that a killed `prepare` leaves no packers running.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, cast

from job.errors import ExitCode, InterruptedRun, OutOfMemoryError, SpeedrunError

GRACE_SECONDS = 5.0
POLL_SECONDS = 0.1
"""between two looks whether a task that waits for its text is ready"""


class Task(Protocol):
    @property
    def name(self) -> str: ...

    def run(self, advance: Callable[[int], None]) -> Any: ...


def run_tasks(
    tasks: Sequence[Task],
    workers: int,
    advance: Callable[[int], None],
    is_ready: Callable[[Any], bool] = lambda task: True,
) -> Iterator[tuple[int, Any]]:
    """(index, result) of every task as it ends, at most `workers` at a time; the first error ends them all.

    Tasks start in order, each when `is_ready(task)`. With one worker or one task everything runs in this process.
    """
    if workers == 1 or len(tasks) == 1:
        for index, task in enumerate(tasks):
            while not is_ready(task):
                time.sleep(POLL_SECONDS)
            yield index, task.run(advance)
        return
    context = multiprocessing.get_context("spawn")
    pending = list(enumerate(tasks))[::-1]
    running: dict[Connection, tuple[int, Any]] = {}
    try:
        while pending or running:
            while pending and len(running) < workers and is_ready(pending[-1][1]):
                index, task = pending.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(task, sender), name=task.name)
                process.start()
                sender.close()
                running[receiver] = index, process
            room = pending and len(running) < workers
            if not running:
                time.sleep(POLL_SECONDS)
            for ready in wait(list(running), POLL_SECONDS if room else None):
                receiver = cast(Connection, ready)
                index, process = running[receiver]
                kind, value = _receive(receiver, process)
                if kind == "advance":
                    advance(value)
                elif kind == "failed":
                    raise value
                else:
                    process.join()
                    receiver.close()
                    del running[receiver]
                    yield index, value
    finally:
        _end([process for _, process in running.values()])


def _receive(receiver: Connection, process: Any) -> tuple[str, Any]:
    """The child's next message; an error when it ended without its result."""
    try:
        return receiver.recv()
    except EOFError:
        process.join()
    if process.exitcode == ExitCode.RESUME:
        raise InterruptedRun(
            f"the process packing {process.name} was told to stop; run the same command again to go on"
        )
    if process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        raise OutOfMemoryError(
            f"the process packing {process.name} was ended by {name}, usually for lack of memory;"
            " run the same command again with fewer workers"
        )
    raise RuntimeError(f"the process packing {process.name} failed; its traceback stands above")


def _end(processes: list[Any]) -> None:
    """Stop processes: politely, and after GRACE_SECONDS for certain."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()


def _child(task: Task, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitCode.RESUME))
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        result = task.run(lambda amount: sender.send(("advance", amount)))
    except SpeedrunError as error:
        sender.send(("failed", error))
    else:
        sender.send(("done", result))


def end_with_parent() -> None:
    """In a thread of a child: SIGTERM to itself when its parent is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
