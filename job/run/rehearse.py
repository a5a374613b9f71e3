"""A rehearsal: the whole pipeline with a toy recipe, killed at random moments until it is done, and compared.

    speedrun run, undisturbed                            -> weights, losses, bits per byte, scores
    the same with a bucket, if there is one, and kills   -> must be the same, bit for bit

Each kill draws a moment and a victim from the seed. A moment is a time after the start, or something that happens: a
part of a checkpoint is written and its manifest is not, rows are being packed, an upload is on its way, a task was
scored. A victim is the supervisor or any process below it (rank, packer, uploader), and what it gets is SIGKILL,
SIGTERM (the supervisor), or SIGSTOP for a while; with a bucket also the loss of the machine: all processes and the
folder. Then the same command goes on.

A child that dies is hit at most twice between two seals: the third death in a row rightly ends a run (exit code 15).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from job.console import Console
from job.errors import DataError, ExitCode, UsageError
from job.run.fruitless import LIMIT, deaths_in_a_row
from job.run.processes import python_environment
from job.store import VARIABLE
from job.store.attempt import events_in, fold, newest_attempt, read_events
from job.store.checkpoint_folder import KIND, folders
from job.store.sealed import open_sealed

RECIPE = (
    "model.depth=2",
    "model.seq_len=64",
    "data.vocab_size=512",
    "data.tokenizer_chars=200000",
    "train.steps=16",
    "train.total_batch_size=512",
    "train.device_batch_size=4",
    "train.checkpoint_every=2",
    "train.val_every=4",
    "train.val_tokens=2048",
    "train.threads=1",
    "train.silence_seconds=30",
    "eval.samples=1",
    "eval.sample_tokens=8",
    "eval.cap=6",
)
MACHINE = "loss of the machine"
STOPPED = (0.2, 3.0)
"""seconds that a process is stopped for, from and to"""
ATTEMPT_SECONDS = 600.0
EXPECTED = {ExitCode.DONE, ExitCode.RESUME, -signal.SIGKILL}
"""how an attempt may end that was disturbed"""


@dataclasses.dataclass
class Hit:
    """One kill, and what came of it."""

    moment: str
    victim: str
    what: str
    stage: str
    exit_code: int | None = None

    def __str__(self) -> str:
        return f"{self.moment}: {self.what} to {self.victim} in {self.stage or 'the start'}, exit {self.exit_code}"


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "between a part and the manifest": lambda run: any(run.glob("checkpoints/.*.tmp-*/part-*.json")),
    "while a checkpoint is written": lambda run: any(run.glob("checkpoints/.*.tmp-*/*.safetensors")),
    "in packing": lambda run: any(run.parents[1].glob("prepared/*/rows/.*.tmp-*")),
    "after a checkpoint": lambda run: _says(run, "checkpoint.sealed"),
    "in an upload": lambda run: _says(run, "checkpoint.sealed") and not _says(run, "upload.done"),
    "in evaluation": lambda run: _says(run, "eval.task"),
}


class Rehearsal:
    """The undisturbed run in OUT/undisturbed, the others in OUT/disturbed; all that is drawn follows from `seed`."""

    def __init__(self, out: Path, *, seed: int, ranks: int, bucket: str | None, console: Console) -> None:
        if out.exists() and any(out.iterdir()):
            raise UsageError(f"--out {out} is not empty; give a folder that is not there yet")
        self.calm, self.wild, self.console = out / "undisturbed", out / "disturbed", console
        self._draw, self._ranks, self._bucket = random.Random(seed), ranks, bucket
        self._log = out / "disturbed.log"
        self._seconds = 0.0
        self.hits: list[Hit] = []
        self.attempts = 0
        self._run_id = ""

    def run(self, kills: int) -> list[str]:
        """What differs between the runs: nothing, unless something is wrong with this program.

        DataError when an attempt ended in a way that no kill explains.
        """
        self.console.say("the undisturbed run")
        began = time.monotonic()
        self._calm_attempt(self.calm, None)
        self._seconds = time.monotonic() - began
        differing: list[str] = []
        while len(self.hits) < kills and not differing:
            self._run_id = f"rehearsal-{secrets.token_hex(4)}"  # new in the bucket too, whatever was rehearsed there
            shutil.rmtree(self.wild, ignore_errors=True)
            while len(self.hits) < kills and self._disturbed_attempt():
                self.console.say(f"{len(self.hits):>3}. {self.hits[-1]}")
            self._calm_attempt(self.wild, self._bucket)
            differing = differences(*(next((out / "runs").iterdir()) for out in (self.calm, self.wild)))
            self.console.say(f"done, and {'NOT the same' if differing else 'the same'}, after {len(self.hits)} kills")
        return differing

    def _start(self, out: Path, bucket: str | None) -> subprocess.Popen[bytes]:
        words = ["run", "--preset", "smoke", "--run-id", self._run_id or "undisturbed", "--out", str(out)]
        words += ["--ranks", str(self._ranks), *(word for value in RECIPE for word in ("-o", value))]
        words += ["--bucket", bucket] if bucket else []
        environment = python_environment({**os.environ, "WANDB_MODE": "disabled"})
        environment.pop(VARIABLE, None)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self.attempts += 1
        with open(self._log, "ab") as log:
            return subprocess.Popen([sys.executable, "-m", "job.cli", *words], stdout=log, stderr=log, env=environment)

    def _calm_attempt(self, out: Path, bucket: str | None) -> None:
        if code := self._start(out, bucket).wait():
            raise DataError(f"an attempt that nothing disturbed ended with {code}; see {self._log}")

    def _disturbed_attempt(self) -> bool:
        """Start the command, hit it once and wait for its end; False when it was done before the moment came."""
        run, draw = self.wild / "runs" / self._run_id, self._draw
        before, began = newest_attempt(run), time.monotonic()
        process = self._start(self.wild, self._bucket)
        moment = draw.choice(["after a time", *(name for name in MOMENTS if self._bucket or name != "in an upload")])
        after = began + draw.uniform(0.0, self._seconds)
        while process.poll() is None:
            looked = time.monotonic()
            late = looked >= (after if moment == "after a time" else began + 2 * self._seconds)
            if late or (moment in MOMENTS and newest_attempt(run) > before and MOMENTS[moment](run)):
                break
            time.sleep(max(0.002, 9 * (time.monotonic() - looked)))  # the run has the cores, not who watches it
        hit = self._hit(process, run, moment) if process.poll() is None else None
        self._end(process)
        if hit:
            hit.exit_code = process.returncode
            self.hits.append(hit)
            if hit.what == MACHINE:
                shutil.rmtree(self.wild, ignore_errors=True)
        return hit is not None

    def _hit(self, process: subprocess.Popen[bytes], run: Path, moment: str) -> Hit:
        """Hit the supervisor or a process below it; a child is not killed where a third death in a row would follow."""
        draw, stages = self._draw, fold(run).stages
        what = draw.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGSTOP", *([MACHINE] if self._bucket else [])])
        pid, victim = process.pid, "the supervisor"
        below = [] if what in ("SIGTERM", MACHINE) else list(processes_below(process.pid))
        if below and draw.random() < 0.75:
            pid, victim = draw.choice(below)
            if len(deaths_in_a_row(read_events(run))) >= LIMIT - 1:
                what = "SIGSTOP"
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, getattr(signal, what, signal.SIGKILL))
            if what == "SIGSTOP":
                time.sleep(draw.uniform(*STOPPED))
                os.kill(pid, signal.SIGCONT)
        return Hit(moment, victim, what, stages[-1].stage if stages else "")

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        try:
            code = process.wait(ATTEMPT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise DataError(f"an attempt did not end within {ATTEMPT_SECONDS:.0f} s; see {self._log}") from None
        if code not in EXPECTED:
            raise DataError(f"an attempt ended with {code}, which no kill explains; see {self._log}")


def processes_below(pid: int) -> Iterator[tuple[int, str]]:
    """All processes below `pid`, each with what it is."""
    listed = subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[tuple[int, str]]] = {}
    for line in listed.splitlines():
        child, parent, command = f"{line} ".split(None, 2)
        children.setdefault(int(parent), []).append((int(child), command))
    found = list(children.get(pid, ()))
    for number, command in found:
        found += children.get(number, ())
        kind = re.search(r" -m job\.run\.(?:rank )?(uploader|prepare|pretrain|evaluate) ", command)
        yield number, kind[1] if kind else "a child of a rank"


def _says(run: Path, kind: str) -> bool:
    """Whether the newest attempt does."""
    with contextlib.suppress(FileNotFoundError), open(run / "events" / f"{newest_attempt(run)}.jsonl", "rb") as lines:
        return any(event["kind"] == kind for event in events_in(lines))
    return False


def differences(calm: Path, wild: Path) -> list[str]:
    """What the run in folder `wild` has otherwise than the one in `calm`, in sentences."""
    one, other = _outcome(calm), _outcome(wild)
    return [f"{name}: {one[name]} undisturbed, {other[name]} disturbed" for name in one if one[name] != other[name]]


def _outcome(run: Path) -> dict[str, Any]:
    record, final = fold(run), open_sealed(folders(run)[0], kind=KIND)
    return {
        "weights": {name: entry["sha256"] for name, entry in final.files.items()},
        "losses": {step: event["loss"] for step, event in sorted(record.steps.items())},
        "validations": {step: event["bpb"] for step, event in sorted(record.validations.items())},
        "bits per byte": record.bpb.get("bpb"),
        "score": record.score.get("metric"),
        "tasks": {task: event["accuracy"] for task, event in sorted(record.tasks.items())},
        "samples": record.samples,
    }
