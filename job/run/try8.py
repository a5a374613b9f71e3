"""What a run on many GPUs rests on, tried on them in minutes before it is paid for: `speedrun try8`.

One small run with a bucket, in three attempts, each with another exchange of gradients, so that no start serves a
figure alone:

    doctor    what the machine is, and whether a run would be refused
    1  bf16   from nothing, compiling; SIGTERM half-way to the first checkpoint  -> 75, sealed where it stopped
    2  off    goes on there, past a checkpoint; the last rank gets SIGSTOP       -> 75, that rank is named
    3  on     goes on from that checkpoint: what attempt 2 computed behind it, undisturbed, is computed again and must
              be the same; then to the end: CORE, report, upload

Overlap is said to change no bit, so nothing but the resume stands between the losses of 2 and 3. The first of them
must be equal; those after it too on a CPU, and within LOSS_ERROR on a GPU, whose atomic additions of gradients come
in any order.

What came out is runs/try8/try8.json in the bucket, also where a part failed or found no time (job/plan/measured.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from job.console import Console
from job.errors import ExitCode, UsageError, error_for
from job.plan.measured import KEY, RUN_ID, VARIANTS
from job.recipe.config import Recipe
from job.recipe.derive import derive
from job.run.bucket import Bucket
from job.run.fruitless import SILENCE
from job.run.launch import recipe_document, run_folder
from job.run.processes import python_environment
from job.run.rehearse import processes_below
from job.run.supervise import Interrupts
from job.store import VARIABLE
from job.store.attempt import fold, read_events
from job.store.checkpoint_folder import folder_of
from job.store.fence import run_key
from job.store.stores import sealed_names

SILENCE_SECONDS = 30
"""of attempt 2; three times as many while it starts and loads what attempt 1 compiled"""
BEHIND = 3
"""steps behind the checkpoint before a rank is stopped: what is computed again"""
SETTLING = 2
"""steps at the start of an attempt that are not among its measured ones"""
LOSS_ERROR = 0.01
"""relative, of a loss on a GPU some steps behind a resume"""
END_SECONDS = 20.0
"""that an attempt has to end when no time is left"""
Found = TypeVar("Found")


class Failed(Exception):
    """A part that does not hold, in a sentence; `code`: what the process ended with, if that is why."""

    def __init__(self, sentence: str, code: int | None = None) -> None:
        super().__init__(sentence)
        self.code = code


class Trial:
    """One trial of `recipe` in OUT/runs/try8, of at most `seconds`; `words` are those of a command that trains it."""

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        words: Sequence[str],
        *,
        ranks: int | None,
        bucket: Bucket,
        seconds: float,
        console: Console,
    ) -> None:
        every = recipe.train.checkpoint_every
        if every < 2 * BEHIND or derive(recipe).steps < 2 * every:
            raise UsageError(
                f"train.checkpoint_every={every} cannot be tried: give {2 * BEHIND} or more, and at most half of"
                " train.steps"
            )
        self._run, self._recipe, self._words = run_folder(out, RUN_ID), recipe, words
        self._bucket, self._console = bucket, console
        self._ranks = [] if ranks is None else ["--ranks", str(ranks)]
        self._command = [sys.executable, "-m", "job.cli"]
        self._end = time.monotonic() + seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._earlier: set[tuple[Any, ...]] = set()
        self._losses: dict[int, float] = {}
        self.document: dict[str, Any] = {
            "schema": 1,
            "passed": False,
            "stack": {},
            "run": recipe_document(recipe, RUN_ID),
            "step_seconds": {},
            "parts": [],
        }

    def run(self) -> None:
        """Try every part and put the `document` into the bucket.

        Where a part fails: the error of its process's exit code if that says why, else DataError.
        """
        parts: dict[str, Callable[[], str]] = {
            "doctor": self._doctor,
            "warm-up": self._warm_up,
            "SIGTERM": self._stopped,
            "resume": self._resumed,
            "silence": self._silenced,
            "exact resume": self._repeated,
            "CORE": self._scored,
            "upload": self._uploaded,
        }
        failed: Failed | None = None
        try:
            with Interrupts() as self._interrupts:
                for name, part in parts.items():
                    began = time.monotonic()
                    try:
                        said = "not reached" if failed else part()
                    except Failed as failure:
                        failed, said = failure, str(failure)
                        self._end_process()
                    passed, seconds = failed is None, round(time.monotonic() - began, 1)
                    self.document["parts"].append({"part": name, "passed": passed, "said": said, "seconds": seconds})
                    self._console.say(f"try8, {name}: {said}")
        finally:
            self._end_process()
        self.document["passed"] = failed is None
        self._bucket.store.put(KEY, json.dumps(self.document, indent=1).encode() + b"\n", "application/json")
        if failed:
            name = next(part["part"] for part in self.document["parts"] if not part["passed"])
            own = failed.code in set(ExitCode) - {ExitCode.DONE, ExitCode.BUG, ExitCode.RESUME}
            code = failed.code if own and failed.code else ExitCode.DATA
            raise error_for(code, f"try8 failed at {name}: {failed}; all it found is {self._bucket.place}/{KEY}")

    # --- the parts, each of which says what it saw or raises Failed

    def _doctor(self) -> str:
        self._start("doctor", "--json", stdout=subprocess.PIPE)
        if code := self._ended():
            raise Failed("this machine is refused", code)
        assert self._process and self._process.stdout
        stack = self.document["stack"] = json.loads(self._process.stdout.read())["stack"]  # less than a pipe holds
        return f"{stack['gpus']} x {stack['gpu']}" if stack["gpu"] else "no GPU, the CPU computes"

    def _warm_up(self) -> str:
        began = time.monotonic()
        self._train("bf16", "--fresh", "--yes")
        self._wait_for("its first step", lambda: self._events("train.step"))
        return f"the first step is done after {time.monotonic() - began:.0f} s"

    def _stopped(self) -> str:
        self._wait_for_step(self._recipe.train.checkpoint_every // 2)
        assert self._process
        self._process.terminate()
        began, code = time.monotonic(), self._ended()
        self._measure("bf16")
        done = self._events("train.step")[-1]["step"] + 1
        sealed = [event["step"] for event in self._events("checkpoint.sealed")]
        if code != ExitCode.RESUME or sealed[-1:] != [done]:
            raise Failed(f"the run ended with {code} after {done} steps, with checkpoints of {sealed}", code)
        return f"exit {code} within {time.monotonic() - began:.0f} s, a checkpoint of {done} steps"

    def _resumed(self) -> str:
        done = self._events("train.step")[-1]["step"] + 1
        self._train("off", "-o", f"train.silence_seconds={SILENCE_SECONDS}")
        self._goes_on_at(done)
        return f"with step {done}"

    def _silenced(self) -> str:
        sealed = self._wait_for("a checkpoint", lambda: self._events("checkpoint.sealed"))[0]["step"]
        self._wait_for_step(sealed + BEHIND)
        rank, process = self._events("train.start")[-1]["world_size"] - 1, self._process
        assert process
        mine = (pid for pid, kind in processes_below(process.pid) if kind == "pretrain" and _rank_of(pid) == rank)
        os.kill(next(mine), signal.SIGSTOP)
        began, code = time.monotonic(), self._ended()
        self._measure("off")
        self._losses = {event["step"]: event["loss"] for event in self._events("train.step") if event["step"] >= sealed}
        died = self._events("attempt.ended")[-1].get("died", {})
        if (code, died.get("rank"), died.get("signal")) != (ExitCode.RESUME, f"rank {rank}", SILENCE):
            raise Failed(f"rank {rank} was stopped, and the run ended with {code}, naming {died or 'nobody'}", code)
        return f"rank {rank} is named, exit {code} within {time.monotonic() - began:.0f} s"

    def _repeated(self) -> str:
        first, last = min(self._losses), max(self._losses)
        self._train("on")
        self._goes_on_at(first)
        self._wait_for_step(last)
        again = {event["step"]: event["loss"] for event in self._events("train.step")}
        errors = {step: abs(again[step] / loss - 1) for step, loss in self._losses.items()}
        worst = max(errors.values())
        if errors[first] or worst > (LOSS_ERROR if self.document["stack"]["gpu"] else 0.0):
            raise Failed(f"steps {first} to {last} have other losses when done again, by up to {worst:.1e}: {errors}")
        return f"steps {first} to {last} done again: the first loss is equal, the others within {worst:.1e}"

    def _scored(self) -> str:
        if code := self._ended():
            raise Failed(f"the run ended with {code}", code)
        self._measure("on")
        return f"{len(fold(self._run).tasks)} tasks, items of each: {self._recipe.eval.cap or 'all'}"

    def _uploaded(self) -> str:
        run, final = run_key(RUN_ID), folder_of(self._run, derive(self._recipe).rows).name
        there = sealed_names(self._bucket.store, f"{run}/checkpoints")
        if final not in there or self._bucket.store.get(f"{run}/report/result.json") is None:
            raise Failed(f"the bucket has no report, or of the checkpoints only {sorted(there)}")
        return f"report and {len(there)} checkpoints"

    # --- the process under trial

    def _train(self, variant: str, *more: str) -> None:
        comm = [f"comm.{key}={value}" for key, value in VARIANTS[variant].items()]
        words = ["--run-id", RUN_ID, "--bucket", self._bucket.store.url, *more]
        self._start("run", *self._ranks, *words, *(word for value in comm for word in ("-o", value)), stdout=sys.stderr)

    def _start(self, command: str, *more: str, stdout: Any) -> None:
        environment = python_environment(os.environ)
        environment.pop(VARIABLE, None)
        words = [*self._command, command, *self._words, *more]
        self._earlier = set(map(_identity, read_events(self._run)))
        self._process = subprocess.Popen(words, stdout=stdout, env=environment)

    def _events(self, kind: str) -> list[dict[str, Any]]:
        """Those of the newest attempt."""
        said = (event for event in read_events(self._run) if event["kind"] == kind)
        return [event for event in said if _identity(event) not in self._earlier]

    def _wait_for(self, what: str, found: Callable[[], Found]) -> Found:
        assert self._process
        while not (value := found()):
            if (code := self._process.poll()) is not None:
                raise Failed(f"the run ended with {code} before {what}", code)
            self._pause(what)
        return value

    def _wait_for_step(self, step: int) -> None:
        self._wait_for(f"step {step}", lambda: any(event["step"] >= step for event in self._events("train.step")))

    def _goes_on_at(self, step: int) -> None:
        at = self._wait_for("training", lambda: self._events("train.start"))[0]["step"]
        if at != step:
            raise Failed(f"the same command goes on with step {at}, not {step}")

    def _ended(self) -> int:
        assert self._process
        while (code := self._process.poll()) is None:
            self._pause("its end")
        return code

    def _pause(self, what: str) -> None:
        self._interrupts.check(what)
        if time.monotonic() > self._end:
            raise Failed(f"no time was left for {what}")
        time.sleep(0.05)

    def _measure(self, variant: str) -> None:
        """Keep the median of the newest attempt's steps, in seconds, and how many they are."""
        steps = [event["ms"] / 1000 for event in self._events("train.step")][SETTLING:]
        if steps:
            self.document["step_seconds"][variant] = {"median": statistics.median(steps), "steps": len(steps)}

    def _end_process(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()


def _identity(event: dict[str, Any]) -> tuple[Any, ...]:
    """Which of all events it is, also where --fresh began to count anew."""
    return event["attempt"], event["seq"], event["t"]


def _rank_of(pid: int) -> int | None:
    """The rank that the environment of process `pid` names."""
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next((int(each.removeprefix(b"RANK=")) for each in variables if each.startswith(b"RANK=")), None)
    return None
