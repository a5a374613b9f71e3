"""The process a stage runs in: one rank's side of the conversation with the supervisor.

    supervisor --(stdin: one JSON object a line)--> rank     {"do": "checkpoint"}  {"do": "stop"}
    rank --(the pipe of SPEEDRUN_EVENTS_FD)--> supervisor    {"kind": ..} {"progress": ..} {"training": 118}
                                                             {"part": ..} {"error": ..}

Ranks compute: they write the files of sealed folders, and all else they have to say goes up this pipe; the supervisor
alone writes events.

**All ranks stop before the same step.** Ranks run at most a collective apart, so one that stopped at once would leave
the others waiting for it, and one that began a checkpoint at once would mix two steps. The supervisor tells the first
rank of its node; the next step's all-reduce carries the signal to all ranks (job/train/step_metrics.py), and each acts
on it a fixed number of steps later, which is when the slowest reader of that all-reduce knows its sum.

When the supervisor dies, stdin ends, and the rank ends its whole process group: nothing is left running on a machine
that bills.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from job.errors import ExitCode, SpeedrunError
from job.recipe.config import Recipe, from_document
from job.recipe.derive import Derived, derive
from job.reporter import Reporter

if TYPE_CHECKING:
    from job.data.prepare import Prepared

STAGES = {
    "prepare": "job.run.prepare",
    "pretrain": "job.train.loop",
    "evaluate": "job.evaluation.stage",
    "evaluate_hf": "job.evaluation.hf_stage",
}
"""the module whose `main(context)` is a rank's part of a stage"""


class RankReporter(Reporter):
    """Sends a rank's events and progress up the pipe; safe from several threads."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._pipe.write(json.dumps(message) + "\n")
            self._pipe.flush()

    def emit(self, kind: str, **fields: Any) -> None:
        self.send({"kind": kind, **fields})

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        self.send({"progress": [stage, done, total, unit]})


SIGNALS = ("go on", "checkpoint", "stop")
"""by their number in the all-reduce, where the greatest counts"""


class StopSignal:
    """ "checkpoint" or "stop": what the supervisor asks for, and the step before which all ranks do it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = 0
        self._agreed: list[tuple[int, int]] = []

    def ask(self, signal: str) -> None:
        """From the control thread of a node's first rank."""
        with self._lock:
            self._asked = max(self._asked, SIGNALS.index(signal))

    def take(self) -> int:
        """The number for the next all-reduce."""
        with self._lock:
            asked, self._asked = self._asked, 0
            return asked

    def agreed(self, signal: int, before: int) -> None:
        """All ranks have read `signal` in an all-reduce: they act on it before step `before`."""
        if signal:
            self._agreed.append((before, signal))

    def due(self, step: int) -> str:
        """What all ranks do before `step`."""
        due = [signal for before, signal in self._agreed if before <= step]
        self._agreed = [(before, signal) for before, signal in self._agreed if before > step]
        return SIGNALS[max(due, default=0)]


@dataclasses.dataclass
class RankContext:
    """What a stage's `main(context)` is given."""

    out: Path
    run: Path | None
    recipe_file: Path
    rank: int
    world_size: int
    reporter: RankReporter
    stop_signal: StopSignal
    attempt: int = 0
    resume: Path | None = None
    """the verified checkpoint that training goes on from"""
    prepared_id: str = ""
    """the prepared set that the stage works on"""
    local_rank: int = 0
    """the rank's number on its node"""
    local_world_size: int = 1

    def recipe(self) -> Recipe:
        return from_document(json.loads(self.recipe_file.read_text(encoding="utf-8")))

    def rows_of_the_run(self) -> int:
        """Training rows that the whole run consumes, as the recipe's document says (no torch is needed for it)."""
        document = json.loads(self.recipe_file.read_text(encoding="utf-8"))
        steps, tokens = (document["derived"][name]["value"] for name in ("steps", "batch_tokens"))
        return steps * tokens // document["recipe"]["model"]["seq_len"]

    def answers(self) -> Path:
        """Where the evaluation's answers go; below the run's folder."""
        return self.run / json.loads(self.recipe_file.read_text(encoding="utf-8")).get("answers", "eval")

    def load(self) -> tuple[Recipe, Derived, Prepared]:
        """What the training and evaluation stages start from."""
        from job.data.prepare import Prepared

        recipe = self.recipe()
        prepared = Prepared.open(self.out / "prepared" / self.prepared_id)
        return recipe, derive(recipe), prepared


def _listen(stop_signal: StopSignal) -> None:
    for line in sys.stdin:
        stop_signal.ask(json.loads(line)["do"])
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _leave_signals_to_the_supervisor() -> None:
    """A scheduler that ends a job signals all of its processes: a rank that died of it would be missing in
    the others' collectives."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)


def main(
    stage: str, out: str, recipe_file: str, run: str, attempt: str = "0", resume: str = "", prepared: str = ""
) -> int:
    pipe = os.fdopen(int(os.environ["SPEEDRUN_EVENTS_FD"]), "w", encoding="utf-8")
    reporter = RankReporter(pipe)
    stop_signal = StopSignal()
    _leave_signals_to_the_supervisor()
    threading.Thread(target=_listen, args=(stop_signal,), daemon=True).start()
    context = RankContext(
        out=Path(out),
        run=Path(run) if run else None,
        recipe_file=Path(recipe_file),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        reporter=reporter,
        stop_signal=stop_signal,
        attempt=int(attempt),
        resume=Path(resume) if resume else None,
        prepared_id=prepared,
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
    )
    try:
        importlib.import_module(STAGES[stage]).main(context)
    except SpeedrunError as error:
        reporter.send({"error": [int(error.exit_code), str(error)]})
        return int(error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        reporter.send({"error": [int(ExitCode.OUT_OF_MEMORY), memory_sentence(stage, error)]})
        return int(ExitCode.OUT_OF_MEMORY)
    return 0


def lacks_memory(error: BaseException) -> bool:
    """Whether Python, a GPU's allocator or torch's CPU allocator (a plain RuntimeError) says so."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't" in str(error)
    )


def memory_sentence(stage: str, error: BaseException) -> str:
    tried = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
    detail = f" ({tried[0][0].lower()}{tried[0][1:]})" if tried else ""
    return f"{stage} ran out of memory{detail}; use a smaller train.device_batch_size or a machine with more memory"


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        code = main(*sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
