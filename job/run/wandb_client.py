"""Logging to wandb: a process beside the run sends its folded events, and the run can lose that process without harm.

    supervisor --(stdin: one JSON object, then the end)--> process     {"exit_code": 0, "seconds": 20}
    process --(the pipe: one JSON object a line)--> supervisor           {"said": ".."}  {"lost": ".."}

wandb has threads, signal handlers, prompts and a network of its own. None of it may touch the process that owns the
exit code, so job/run/wandb_process.py is a process in a session of its own, at a low priority, that reads only the
run's event files. This module is the supervisor's side: it starts the process, prints its messages, and at the end
waits no longer than `FINISH` seconds for it, then kills it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from job.console import Console
from job.errors import ExitCode, SpeedrunError, StorageError, UsageError
from job.run.processes import LocalRank, environment_for
from job.run.wandb_process import has_key
from job.store.attempt import Attempt, fold

COMMAND = ["-m", "job.run.wandb_process"]
FINISH = 20.0
"""seconds that wandb has for the rest once the stages have ended"""
FINISH_INTERRUPTED = 3.0
"""the same after a signal: the machine may be about to go away"""
SYNC = 600.0
"""seconds that `speedrun wandb-sync` has for a whole run"""


@contextlib.contextmanager
def wandb_logging(run: Path, attempt: Attempt, console: Console) -> Iterator[None]:
    """Send the run's events to wandb while the block runs; a failure of wandb is a warning and nothing else.

    Where nobody asked for wandb, or somebody asked that it be off, nothing is started and nothing is written.
    """
    if is_off():
        yield
        return
    try:
        client = WandbClient(run, attempt.number, console)
    except OSError as error:
        _warn(attempt, console, f"wandb was not started ({error.strerror})")
        yield
        return
    code = int(ExitCode.BUG)
    try:
        yield
        code = int(ExitCode.DONE)
    except SpeedrunError as error:
        code = int(error.exit_code)
        raise
    finally:
        lost = client.finish(code, FINISH_INTERRUPTED if code == ExitCode.RESUME else FINISH)
        if lost:
            _warn(attempt, console, lost)


def _warn(attempt: Attempt, console: Console, lost: str) -> None:
    text = f"{lost}; later: speedrun wandb-sync --run-id {attempt.run.name}"
    console.say(f"warning: {text}")
    with contextlib.suppress(StorageError):
        attempt.emit("warning", text=text)


def is_off() -> bool:
    """Whether nobody asked for wandb (no key or settings here, no variable of its own but folders) or it is off."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1") or os.environ.get("WANDB_MODE") == "disabled":
        return True
    said = (name for name, value in os.environ.items() if name.startswith("WANDB_") and value)
    settings = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser() / "settings"
    asked = any(not name.endswith("_DIR") for name in said) or settings.is_file()
    return not asked and not has_key("https://api.wandb.ai")


def sync(run: Path, console: Console) -> None:
    """Send what wandb lacks of `run`; UsageError without a key, StorageError when wandb does not take it."""
    attempts = fold(run).attempts
    client = WandbClient(run, 0, console)
    lost = client.finish((attempts[-1].exit_code if attempts else None) or 0, SYNC)
    if lost and client.exit_code == ExitCode.USAGE:
        raise UsageError(lost)
    if lost:
        raise StorageError(f"{lost}; nothing is lost: the events are in {run / 'events'}, give the command again")


class WandbClient:
    """The process, and a thread that prints its messages. `attempt` 0: not a live run, all events are there."""

    def __init__(self, run: Path, attempt: int, console: Console) -> None:
        self._log = run / "logs" / (f"{attempt}.wandb.log" if attempt else "wandb-sync.log")
        arguments = [str(run.resolve()), str(attempt)]
        self.child = LocalRank(
            "wandb", arguments, environment_for("wandb", os.environ), self._log, program=COMMAND, folder=run
        )
        os.set_blocking(self.child.pipe, True)
        self._console, self._lost, self._ending = console, "", False
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def finish(self, exit_code: int, seconds: float) -> str | None:
        """Let the process send the rest for so long at most; a sentence where wandb does not have everything."""
        self._ending = True
        self.child.tell({"exit_code": exit_code, "seconds": seconds})
        self.child.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.process.wait(seconds)
        code = self.exit_code
        self.child.kill()
        self._listener.join(1)
        if code == 0:
            return None
        if code is None:
            return f"wandb did not take the rest within {seconds:.0f} s"
        return self._lost or f"wandb's process ended with {code} (see {self._log})"

    @property
    def exit_code(self) -> int | None:
        """None while the process works."""
        return self.child.poll()

    def _listen(self) -> None:
        with contextlib.suppress(ValueError, EOFError):
            while True:
                for message in self.child.messages():
                    if "lost" in message:
                        self._lost = message["lost"]
                        if not self._ending:
                            self._console.say(f"warning: {self._lost}; the run goes on without")
                    else:
                        self._console.say(message["said"])
        os.close(self.child.pipe)
