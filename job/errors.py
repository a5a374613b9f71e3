"""The one table of exit codes, and the exceptions that carry them.

An expected failure is one sentence that says what is wrong and what to do; the command line prints it without a
traceback and exits with the code of its class. Anything else that escapes is a bug of ours: traceback, exit 1.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


class ExitCode(enum.IntEnum):
    """What the process's exit code means; docs/commands.md, YAML and postmortem are checked against this table."""

    DONE = 0
    BUG = 1
    USAGE = 2
    PREFLIGHT = 10
    DATA = 11
    STORAGE = 12
    DIVERGED = 13
    OUT_OF_MEMORY = 14
    SILENT_RANK = 15
    BUDGET = 20
    RESUME = 75


MEANING: dict[ExitCode, str] = {
    ExitCode.DONE: "done",
    ExitCode.BUG: "a bug of ours (traceback)",
    ExitCode.USAGE: "usage or configuration",
    ExitCode.PREFLIGHT: "preflight refused the machine",
    ExitCode.DATA: "data missing, damaged or not what it says",
    ExitCode.STORAGE: "storage failed; everything sealed so far is on local disk, the path is printed",
    ExitCode.DIVERGED: "training diverged",
    ExitCode.OUT_OF_MEMORY: "out of memory",
    ExitCode.SILENT_RANK: "a rank fell silent",
    ExitCode.BUDGET: "budget reached; checkpoint safe",
    ExitCode.RESUME: "interrupted, resume me: the same command goes on",
}


class SpeedrunError(Exception):
    """An expected failure: `str(error)` is one sentence with the remedy, `exit_code` its row of the table."""

    exit_code = ExitCode.BUG
    noted: Mapping[str, Any] = MappingProxyType({})
    """what the last event of the attempt that this error ends says beside code and reason"""


class UsageError(SpeedrunError):
    exit_code = ExitCode.USAGE


class PreflightError(SpeedrunError):
    exit_code = ExitCode.PREFLIGHT


class DataError(SpeedrunError):
    exit_code = ExitCode.DATA


class StorageError(SpeedrunError):
    exit_code = ExitCode.STORAGE


class DivergedError(SpeedrunError):
    exit_code = ExitCode.DIVERGED


class OutOfMemoryError(SpeedrunError):
    exit_code = ExitCode.OUT_OF_MEMORY


class SilentRankError(SpeedrunError):
    exit_code = ExitCode.SILENT_RANK


class BudgetReached(SpeedrunError):
    exit_code = ExitCode.BUDGET


class InterruptedRun(SpeedrunError):
    exit_code = ExitCode.RESUME


class ChildDied(RuntimeError):
    """A process below a rank was ended by a signal that nobody of ours sent; it counts as a rank's death."""

    def __init__(self, name: str, signal: str) -> None:
        self.name, self.signal = name, signal
        super().__init__(f"{name} was ended by {signal}")


class OddReplica(RuntimeError):
    """`ranks` have other weights than the others or, where there is no majority, than each other: a machine's fault,
    which ends the attempt as a rank's death does."""

    def __init__(self, ranks: list[int], step: int) -> None:
        self.ranks = ranks
        super().__init__(f"its weights before step {step} differ from those of the other ranks")


def error_for(code: int, message: str) -> SpeedrunError:
    """The exception of `code`'s row, to raise again in the supervisor what a rank reported."""
    classes = {cls.exit_code: cls for cls in SpeedrunError.__subclasses__()}
    cls = classes.get(ExitCode(code), SpeedrunError)
    return cls(message)


def first_line(error: BaseException) -> str:
    """What `error` says, for a sentence of ours; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
