"""The process a stage runs in: one rank's side of the conversation with the supervisor.

    supervisor --(stdin: one JSON object a line)--> rank     {"do": "checkpoint"}  {"do": "stop"}
    rank --(the pipe of SPEEDRUN_EVENTS_FD)--> supervisor    {"kind": ..} {"progress": ..} {"training": 118}
                                                             {"part": ..} {"error": ..}

Ranks compute: they write the files of sealed folders, and all else they have to say goes up this pipe; the supervisor
alone writes events.

When the supervisor dies, stdin ends, and the rank ends its whole process group: nothing is left running on a machine
that bills.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import sys
from pathlib import Path

from job.errors import ExitCode, SpeedrunError
from job.reporter import RankReporter
from job.train.context import RankContext, StopSignal

STAGES = {
    "prepare": "job.run.prepare",
    "pretrain": "job.train.loop",
    "evaluate": "job.evaluation.stage",
    "evaluate_hf": "job.evaluation.hf_stage",
}
"""the module whose `main(context)` is a rank's part of a stage"""


def _leave_signals_to_the_supervisor() -> None:
    """A scheduler that ends a job signals all of its processes: a rank that died of it would be missing in
    the others' collectives."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)


def main(
    stage: str, out: str, recipe_file: str, run: str, attempt: str = "0", resume: str = "", prepared: str = ""
) -> int:
    reporter = RankReporter.of_child()
    stop_signal = StopSignal()
    _leave_signals_to_the_supervisor()
    stop_signal.listen()
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
