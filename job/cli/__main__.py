"""The program `speedrun`: what must hold from its first line to its last, before anything heavy is imported.

- SIGTERM, SIGINT and SIGHUP end it with 75. Here nothing is begun yet, so at once; while a run is supervised
  job/run/supervise.py answers them; when all is sealed they change nothing any more. SIGHUP stays ignored where it is
  (`nohup`).
- A reader that goes away, or a terminal that is closed, ends nothing: what is written from then on goes nowhere.
- The exit code is the command's: no thread of a library that still runs can change it, or hold up the end.
- As the first process of a container it also takes leave of processes whose parents have died, which nobody else does.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RESUME = 75
GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)
"""what writing to a pipe without a reader, or to a terminal that was closed, fails with"""


def end_at_once(number: int, _frame: FrameType | None) -> None:
    text = f"speedrun: {signal.Signals(number).name} came before anything was begun; the same command begins it\n"
    try:
        os.write(2, text.encode())
    finally:
        os._exit(RESUME)


class Output(io.FileIO):
    """Standard output or error, whose reader may go away."""

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno not in GONE:
                raise
            return memoryview(data).nbytes  # type: ignore[arg-type]


def open_output() -> None:
    """Put `Output` behind sys.stdout and sys.stderr; a descriptor that is closed leads nowhere, not to another file."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        encoding = getattr(getattr(sys, name), "encoding", None) or "utf-8"
        raw = io.BufferedWriter(Output(descriptor, "wb", closefd=False))
        stream = io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)
        setattr(sys, name, stream)


def be_the_first_process() -> None:
    """Go on in a child, and stay behind as its parent: pass signals on, bury orphans, end as the child does."""
    child = os.fork()
    if child == 0:
        return
    for number in SIGNALS:
        signal.signal(number, lambda number, _: os.kill(child, number))
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def main() -> None:
    if os.getpid() == 1:
        be_the_first_process()
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end_at_once)
    open_output()
    from job.cli.commands import main as commands

    try:
        commands(prog_name="speedrun")
    except SystemExit as end:  # click's end of every command, with its exit code
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # a bug
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
