"""The process that sends a run to wandb (job/run/wandb_client.py starts it and describes how they talk).

The events of all attempts are the truth; the copy on wandb can be made again at any time:

- **Online** (a key in WANDB_API_KEY, in netrc, or an identity token) the run is opened with `resume="allow"` under an
  id made of the run id and the moment the run began, so that a run begun anew with `--fresh` is another one there too.
  wandb's server says after which step it goes on; only later steps are sent. What an attempt that died left out is
  sent by the next one. Steps done again after a checkpoint give the same numbers, and are passed over.
- **Offline** (WANDB_MODE=offline, or a variable of wandb's and no key) the folder `wandb/offline-run-*` in the run's
  folder is wandb's own format. Each attempt writes all of the run's events into a new one and removes the older.
- A step is sent with the validation before it; the row after the last step has the evaluation.

The names of the numbers are those of the leaderboard's runs (nanochat's training script): curves can be compared.
"""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from job.errors import ExitCode, first_line
from job.recipe.leaderboard import UNTIMED_STEPS
from job.reporter import RankReporter
from job.store import VARIABLE
from job.store.attempt import Record, event_files, events_in, fold_event, newest_attempt
from job.store.documents import recipe_of
from job.store.fence import run_key

POLL = 1.0
"""seconds between two looks at the event files"""
INIT_TIMEOUT = 30.0
"""seconds that wandb's server has to open the run"""
RETRY = 60.0
"""seconds before a server that was lost is tried again"""
PROJECT = "gpt2-speedrun"
COLUMNS = ("n", "accuracy", "baseline", "centered")
"""of the table of tasks in the run's summary"""


class Events:
    """The run's events, folded as they are written."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._read: dict[Path, int] = {}
        self.record = Record()

    def advance(self) -> None:
        """Fold the whole lines that are new since the last call."""
        for path in event_files(self._run):
            with open(path, "rb") as file:
                file.seek(self._read.get(path, 0))
                whole = file.read().rpartition(b"\n")[0]
            self._read[path] = self._read.get(path, 0) + len(whole) + bool(whole)
            for event in events_in(whole.splitlines()):
                fold_event(self.record, event)

    @property
    def worth_showing(self) -> bool:
        return bool(self.record.steps or self.record.score)


def history(record: Record, after: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, numbers) of each step above `after`, in order; the evaluation stands at the step after the last."""
    seconds, newest = 0.0, max(record.steps, default=-1)
    for step in sorted(record.steps):
        event = record.steps[step]
        seconds += event["ms"] / 1000 if step >= UNTIMED_STEPS else 0.0
        if step > after:
            validation = {"val/bpb": record.validations[step]["bpb"]} if step in record.validations else {}
            yield (
                step,
                validation
                | {
                    "step": step,
                    "train/loss": event["loss"],
                    "train/lrm": event["lr_mult"],
                    "train/dt": event["ms"] / 1000,
                    "train/tok_per_sec": event["tokens"] / (event["ms"] / 1000) if event["ms"] else None,
                    "total_training_flops": (step + 1) * event["tokens"] * record.train.get("flops_per_token", 0),
                    "total_training_time": seconds,
                },
            )
    final = record.bpb.get("step", record.train.get("steps", -1))
    if record.score and final > newest and final > after:
        bpb = {"val/bpb": record.bpb["bpb"]} if "bpb" in record.bpb else {}
        centered = {task: event["centered"] for task, event in record.tasks.items()}
        yield final, bpb | {_score_name(record): record.score["metric"], "centered_results": centered}


def _score_name(record: Record) -> str:
    """The leaderboard's name for CORE; a smoke score is not called CORE."""
    return "core_metric" if record.score["name"] == "core" else "smoke_score"


def summary(record: Record) -> dict[str, Any]:
    """The run's last numbers, under the leaderboard's names."""
    if not record.steps:
        return {}
    newest = max(record.steps)
    tokens = (newest + 1) * record.steps[newest]["tokens"]
    fields = {
        "step": newest + 1,
        "total_training_flops": tokens * record.train.get("flops_per_token", 0),
        "total_training_time": record.training_seconds,
    }
    if record.bpb:
        fields["val_bpb"] = record.bpb["bpb"]
    elif record.validations:
        fields["val_bpb"] = record.validations[max(record.validations)]["bpb"]
    if record.score:
        fields[_score_name(record)] = record.score["metric"]
        fields["tasks"] = {task: {key: event.get(key) for key in COLUMNS} for task, event in record.tasks.items()}
    return fields


def alerts(record: Record, attempt: int, exit_code: int | None) -> dict[str, str]:
    """What a person should hear of the attempt, by title; `exit_code` None while it lives."""
    said = {}
    if slow := [event for event in record.slow_ranks.values() if event["attempt"] == attempt]:
        said["slow"] = f"ranks {', '.join(slow[0]['behind'])} are slower than the median rank"
    if exit_code == ExitCode.RESUME:
        said["preempted"] = f"interrupted after step {max(record.steps, default=0)}; the same command goes on"
    if exit_code == ExitCode.DONE:
        score = f"{_score_name(record)} {record.score['metric']:.4f}" if record.score else "not scored yet"
        said["done"] = f"{len(record.steps)} steps; {score}"
    return said


def wandb_id(run: Path, record: Record) -> str:
    """wandb's name of the run: the run id, and when its first attempt began (UTC)."""
    return f"{run.name}-{datetime.fromtimestamp(min(life.start for life in record.attempts), UTC):%Y%m%d-%H%M%S}"


def has_key(base_url: str) -> bool:
    """Whether wandb finds a key or a token for its server at `base_url` without asking for one."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(base_url).hostname or "") is not None
    return False


def mode() -> str:
    """ "online" with a key; "offline" without one, or when WANDB_MODE says so."""
    import wandb

    asked = os.environ.get("WANDB_MODE", "online")
    return "offline" if asked in ("offline", "dryrun") or not has_key(wandb.setup().settings.base_url) else "online"


class SupervisorWatch(threading.Thread):
    """Waits for the supervisor's last message (or its death), then ends this process in time, wherever it hangs."""

    def __init__(self, sender: WandbSender) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.exit_code = int(ExitCode.RESUME)
        self._sender = sender

    def run(self) -> None:
        seconds = 3.0
        with contextlib.suppress(ValueError, KeyError):
            message = json.loads(sys.stdin.readline())
            self.exit_code, seconds = message["exit_code"], message["seconds"]
        self.ended.set()
        time.sleep(max(seconds - 0.5, 0.5))
        self._sender.tell(lost=f"wandb did not take the rest within {seconds:.0f} s")
        os._exit(1)


class WandbSender:
    """Sends the run in folder `run` to wandb during one attempt of it."""

    def __init__(self, run: Path, attempt: int) -> None:
        self.run, self.attempt, self._supervisor = run, attempt, RankReporter.of_child()
        self.events = Events(run)
        self.supervisor = SupervisorWatch(self)
        self._told = False
        self._alerted: set[str] = set()

    def tell(self, **message: str) -> None:
        with contextlib.suppress(OSError):
            self._supervisor.send(message)

    def work(self) -> int:
        """0 when wandb has everything, 1 when it has not."""
        self.supervisor.start()
        while not self.events.worth_showing:
            last = self.over()
            self.events.advance()
            if last and not self.events.worth_showing:
                return 0
            self.supervisor.ended.wait(0 if self.events.worth_showing else POLL)
        while True:
            try:
                chosen = mode()
                if chosen == "offline" and not self.attempt:
                    self.tell(lost="wandb has no key; set WANDB_API_KEY, or give the command `wandb login` once")
                    return int(ExitCode.USAGE)
                self.session(chosen)
                return 0
            except Exception as error:
                self.tell(lost=f"wandb was lost ({first_line(error)})")
                with contextlib.suppress(Exception):
                    import wandb

                    wandb.teardown()
                if self.over() or self.supervisor.ended.wait(RETRY):
                    return 1

    def over(self) -> bool:
        """Whether nothing new will come: the supervisor has ended, or a newer attempt has the run."""
        return self.supervisor.ended.is_set() or (self.attempt > 0 and newest_attempt(self.run) > self.attempt)

    def session(self, mode: str) -> None:
        """Open the run on wandb, send what is missing there, follow the events, close it."""
        import wandb

        recipe = recipe_of(self.run)
        values = {
            f"{section}.{key}": value for section, entries in recipe["recipe"].items() for key, value in entries.items()
        }
        identity = wandb_id(self.run, self.events.record)
        bucket = os.environ.get(VARIABLE)
        stale = list((self.run / "wandb").glob(f"offline-run-*-{identity}")) if mode == "offline" else []
        handle = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=identity,
            name=os.environ.get("WANDB_NAME") or self.run.name,
            resume="allow",
            config={
                "preset": recipe["preset"],
                "provenance": self.events.record.machine.get("provenance"),
                "page": f"{bucket}/{run_key(self.run.name)}/report/report.html" if bucket else None,
            }
            | values,
            settings=settings(wandb, self.run, mode),
        )
        for folder in stale:
            shutil.rmtree(folder, ignore_errors=True)
        if not self._told and mode == "online":
            self.tell(said=f"wandb: {handle.url}")
            self._told = True
        position = handle.step - 1 if handle.resumed else -1
        while True:
            last = self.over()
            self.events.advance()
            for step, numbers in history(self.events.record, position):
                handle.log(numbers, step=step, commit=True)
                position = step
            self.alert(handle, self.supervisor.exit_code if last else None)
            if last:
                break
            self.supervisor.ended.wait(POLL)
        handle.summary.update(summary(self.events.record))
        if self.supervisor.exit_code == ExitCode.RESUME:
            handle.mark_preempting()
        handle.finish(exit_code=self.supervisor.exit_code)
        wandb.teardown()

    def alert(self, handle: Any, exit_code: int | None) -> None:
        """Send what was not sent yet; nothing of a run that is only being synced."""
        for title, text in (alerts(self.events.record, self.attempt, exit_code) if self.attempt else {}).items():
            if title not in self._alerted:
                handle.alert(f"{self.run.name} {title}", text, "INFO" if title == "done" else "WARN")
                self._alerted.add(title)


def settings(wandb: Any, run: Path, mode: str) -> Any:
    """Only our numbers: no console, code, git, machine or package list, no prompt, no file outside the run's folder."""
    return wandb.Settings(
        mode=mode,
        root_dir=str(run),
        use_dot_wandb=False,
        init_timeout=INIT_TIMEOUT,
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        save_code=False,
        symlink=False,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        x_skip_transaction_log=mode == "online",
    )


def main(run: str, attempt: str) -> int:
    os.nice(10)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if not int(attempt):
        os.environ.pop("WANDB_MODE", None)  # to sync is to be online
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ.setdefault(name, str(Path(run) / "wandb"))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    return WandbSender(Path(run), int(attempt)).work()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
