"""Tasks in a pool of processes: results as they come, errors as they were raised, nobody left behind.

A task is a picklable object with `run(advance)`; `advance(n)` reports n more units of work. Workers ignore Ctrl-C,
which is their parent's to act on. On SIGTERM, and when their parent is gone, they unwind, remove what they had half
written, and end.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from job.errors import ChildDied, ExitCode, InterruptedRun

POLL_SECONDS = 0.1
"""between two looks at the work done, and whether a task that waits for its text is ready"""
UNWIND_SECONDS = 5.0
"""that a worker whose parent is gone has to remove what it had half written"""


class Task(Protocol):
    def run(self, advance: Callable[[int], None]) -> Any: ...


def run_tasks(
    tasks: Sequence[Task],
    workers: int,
    show: Callable[[int], None],
    is_ready: Callable[[Any], bool] = lambda task: True,
) -> Iterator[tuple[int, Any]]:
    """(index, result) of every task as it ends, at most `workers` at a time; the first error ends them all.

    Tasks start in order, each when `is_ready(task)`. `show(done)` is told the units of work that all have done so far.
    With one worker or one task everything runs in this process.
    """
    shown = 0
    if workers == 1 or len(tasks) <= 1:

        def advance(amount: int) -> None:
            nonlocal shown
            shown += amount
            show(shown)

        for index, task in enumerate(tasks):
            while not is_ready(task):
                time.sleep(POLL_SECONDS)
            yield index, task.run(advance)
        return
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    others, processes = set(multiprocessing.active_children()), set[BaseProcess]()
    running: dict[Future[Any], int] = {}
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _begin, (done,))
    waiting = list(range(len(tasks)))
    try:
        while waiting or running:
            while waiting and is_ready(tasks[waiting[0]]):
                index = waiting.pop(0)
                running[pool.submit(_run, tasks[index])] = index
                processes |= set(multiprocessing.active_children()) - others
            if not running:
                time.sleep(POLL_SECONDS)
            ended = wait(running, POLL_SECONDS, FIRST_COMPLETED).done
            if done.value > shown:
                shown = done.value
                show(shown)
            for future in ended:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise _death(processes) from None
    finally:
        for process in processes:
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _death(processes: set[BaseProcess]) -> Exception:
    """What the end of one of `processes` means; the pool has ended the others by SIGTERM."""
    for process in processes:
        process.join()
        number = -(process.exitcode or 0)
        if number > 0 and number != signal.SIGTERM:
            return ChildDied("a process that packs", signal.Signals(number).name)
    return InterruptedRun("a process that packs was told to stop; run the same command again to go on")


_done: Any = None
"""in a worker: the units of work that all workers have done"""


def _begin(done: Any) -> None:
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitCode.RESUME))


def _end_with_parent() -> None:
    """The pool catches a SystemExit while it passes a result on, and then waits for a task that nobody sends."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(UNWIND_SECONDS)
    os._exit(ExitCode.RESUME)


def _run(task: Task) -> Any:
    def advance(amount: int) -> None:
        with _done.get_lock():
            _done.value += amount

    try:
        return task.run(advance)
    except SystemExit:  # of SIGTERM: the pool would pass it on as the task's error, and the worker go on
        os._exit(ExitCode.RESUME)
