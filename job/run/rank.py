"""The process a stage runs in: one rank's side of the conversation with the supervisor.

    supervisor --(stdin: one JSON object a line)--> rank     {"do": "checkpoint" or "stop" or "beat"}
    rank --(the pipe of SPEEDRUN_EVENTS_FD)--> supervisor    {"kind": ..} {"progress": ..} {"training": 118}
                                                             {"doing": ["step 118", false, false]} {"error": ..}

Ranks compute: they write sealed folders and a checkpoint's parts, and all else they have to say goes up this pipe; the
supervisor alone writes events.

When the supervisor dies, stdin ends, and the rank ends its whole process group: nothing is left running on a machine
that bills.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import re
import signal
import sys
from pathlib import Path

from job.errors import ChildDied, ExitCode, OddReplica, SpeedrunError
from job.reporter import RankReporter
from job.train.context import RankContext, StopSignal
from job.train.flight_record import last_collectives

STAGES = {
    "prepare": "job.run.prepare",
    "pretrain": "job.train.loop",
    "background": "job.run.background",
    "evaluate": "job.evaluation.stage",
    "evaluate_hf": "job.evaluation.hf_stage",
    "export": "job.inference.stage",
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

    def tell_where() -> None:
        reporter.send_beat()
        print(last_collectives(), file=sys.stderr, flush=True)

    stop_signal = StopSignal(tell_where)
    reporter.send_beats()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
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
    except OddReplica as error:
        node = " on node {}" if context.local_world_size < context.world_size else ""
        names = [f"rank {rank}" + node.format(rank // context.local_world_size) for rank in error.ranks]
        reporter.send({"broken": str(error), "who": " and ".join(names), "device": True})
        raise
    except ChildDied as error:
        reporter.send({"broken": error.signal, "who": error.name, "device": False})
        raise
    except (MemoryError, RuntimeError) as error:
        if lacks_memory(error):
            reporter.send({"error": [int(ExitCode.OUT_OF_MEMORY), memory_sentence(stage, error)]})
            return int(ExitCode.OUT_OF_MEMORY)
        if found := BROKEN_DEVICE.search(str(error)):
            reporter.send({"broken": found[0], "device": True})
        raise
    return 0


MEMORY = re.compile(
    r"DefaultCPUAllocator: can't|CUDA error: out of memory|CUDA out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
    r"|Cuda failure (2 )?'out of memory'|Failed to CUDA \w+ |ncclCommInit.*out of memory"
)
"""what says that memory is short: torch's CPU allocator, CUDA outside of torch's, cuBLAS, cuDNN, NCCL"""
BROKEN_DEVICE = re.compile(
    r"CUDA error: (an illegal memory access|an illegal instruction|misaligned address|unspecified launch failure"
    r"|the launch timed out|uncorrectable (ECC|NVLink) error|hardware stack error|unknown error|initialization error"
    r"|system not yet initialized|no CUDA-capable device|CUDA-capable device\(s\) is/are busy|device not ready)[^\n]*"
    r"|(CUBLAS|CUDNN)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED)"
    r"|ncclUnhandledCudaError[^\n]*|ncclSystemError[^\n]*|ncclRemoteError[^\n]*|ncclInternalError[^\n]*"
    r"|NCCL communicator was aborted[^\n]*|Cuda failure (?!(2 )?'out of memory')[^\n]*"
)
"""what a device or a link says that may be broken, in CUDA's, cuBLAS's and NCCL's words; a bug of ours can look alike
(an illegal access), so that it counts as a death of the rank (job/run/fruitless.py) and not as a verdict"""


def lacks_memory(error: BaseException) -> bool:
    """Whether Python, a GPU's allocator, or any of MEMORY says so."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or MEMORY.search(str(error)) is not None
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
