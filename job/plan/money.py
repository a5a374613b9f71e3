"""Minutes by stage and dollars: what a node is paid for, from its boot to the last result.

Only the training steps are on the leaderboard's clock; everything around them is on the bill. The figures of the other
stages are estimates for this pipeline on eight GPUs, made from what the published program spends there (its 24
validation passes, two CORE passes and waiting for downloads are left out where this program does not have them).
Nothing here was measured on a GPU by us.
"""

from __future__ import annotations

import dataclasses

from job.machine.gpus import GPU
from job.plan.memory import checkpoint_bytes
from job.plan.published_runs import GPUS as REFERENCE_GPUS
from job.plan.published_runs import RUNS
from job.plan.steptime import REFERENCE, token_seconds
from job.recipe.leaderboard import UNTIMED_STEPS
from model.config import GPTConfig
from model.scaling import flops_per_token

CORE_ITEMS = 91_037
CORE_TASKS = 22
RUN_6 = next(run for run in RUNS if run.name == "Run 6")

ENVIRONMENT = 0.5, 1.5
TOKENIZER = 1.5, 2.0  # for 2e9 characters
TOKENIZER_CHARS = 2e9
WAIT_FOR_ROWS = 0.0, 3.0
START = 1.8, 3.3
CORE = 1.2, 6.0  # all items, a d24, eight H100: batched by length, and one item at a time
CHECKPOINT_SPEED = 3e9, 1e9  # bytes/s of all ranks together


@dataclasses.dataclass(frozen=True)
class Stage:
    """Minutes of one stage, least and most, and what that rests on."""

    name: str
    low: float
    high: float
    basis: str


@dataclasses.dataclass(frozen=True)
class Work:
    """What the stages depend on, taken from a recipe."""

    config: GPTConfig
    fp8: bool
    steps: int
    step_seconds: float
    tokenizer_chars: int
    checkpoints: int
    validations: int
    val_tokens: int
    core_cap: int


def stages(work: Work, gpu: GPU, gpus: int, training: Stage) -> list[Stage]:
    """All stages in order; `training` is the timed part."""
    share = work.tokenizer_chars / TOKENIZER_CHARS
    first = min(UNTIMED_STEPS, work.steps) * work.step_seconds / 60
    return [
        Stage("boot, environment", *ENVIRONMENT, "estimated"),
        Stage("tokenizer", TOKENIZER[0] * share, TOKENIZER[1] * share, "estimated; none if the bucket has it"),
        Stage("waiting for the first rows", *WAIT_FOR_ROWS, "estimated; the network decides"),
        Stage("imports, compilation", *START, "estimated"),
        Stage(
            f"first {min(UNTIMED_STEPS, work.steps)} steps", first, first, "step time; not on the leaderboard's clock"
        ),
        training,
        _validation(work, gpu, gpus),
        _checkpoints(work, gpus),
        _core(work, gpu, gpus),
    ]


def total(stages: list[Stage]) -> tuple[float, float]:
    """Minutes on the node, least and most."""
    return sum(stage.low for stage in stages), sum(stage.high for stage in stages)


def _validation(work: Work, gpu: GPU, gpus: int) -> Stage:
    forward = token_seconds(work.config, gpu, fp8=False) / 3
    minutes = work.validations * work.val_tokens * forward / gpus / 60
    times = "once" if work.validations == 1 else f"{work.validations} times"
    return Stage("validation", minutes, minutes, f"{work.val_tokens:,} tokens {times}, a third of a bf16 step")


def _checkpoints(work: Work, gpus: int) -> Stage:
    size = checkpoint_bytes(work.config, gpus)
    low, high = (work.checkpoints * size / speed / 60 for speed in CHECKPOINT_SPEED)
    return Stage("checkpoints", low, high, f"{work.checkpoints} of {size / 1e9:.1f} GB at 1 to 3 GB/s, assumed")


def _core(work: Work, gpu: GPU, gpus: int) -> Stage:
    items = min(CORE_ITEMS, CORE_TASKS * work.core_cap) if work.core_cap else CORE_ITEMS
    larger = flops_per_token(work.config) / flops_per_token(RUN_6.config)
    factor = items / CORE_ITEMS * larger * REFERENCE_GPUS / gpus * REFERENCE.bf16 / gpu.bf16
    at_most = "at most " if work.core_cap else ""
    return Stage(
        "CORE", CORE[0] * factor, CORE[1] * factor, f"{at_most}{items:,} items; estimated, by FLOPs from a d24's"
    )
