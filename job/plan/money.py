"""Minutes by stage and dollars: what a node is paid for, from its boot to its teardown, and what is paid besides.

Only the training steps are on the leaderboard's clock; everything around them is on the bill. The figures of the other
stages are estimates for this pipeline on eight GPUs, made from what the published program spends there (its 24
validation passes, two CORE passes and waiting for downloads are left out where this program does not have them). The
minutes of compiling were measured by us on one H100 (45 to 49 s, LOG, 2026-11-26) and are inside of what stands here.

A stage's name is the row of the receipt (job/report/receipt.py) in which what it really took is put beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from job.machine.gpus import GPU
from job.plan.prices import EGRESS, OFFERS, Offer
from job.plan.published_runs import GPUS as REFERENCE_GPUS
from job.plan.published_runs import RUNS
from job.plan.steptime import REFERENCE, token_seconds
from job.recipe.leaderboard import UNTIMED_STEPS
from job.store.bill import PROVISIONING
from model.config import GPTConfig
from model.scaling import flops_per_token

CORE_ITEMS = 91_037
CORE_TASKS = 22
RUN_6 = next(run for run in RUNS if run.name == "Run 6")

BOOT, START, TEXT, COMPILE = "boot, pull, runtime", "start of the command", "text, tokenizer", "imports, compilation"
UNTIMED, TRAINING = f"first {UNTIMED_STEPS} steps", "training, timed"
VALIDATION, CHECKPOINTS, SCORE, REPORT = "validation", "checkpoints", "evaluation", "report, export, upload"
IDLE = "idle until teardown"

BOOT_MINUTES = PROVISIONING[0] / 60, PROVISIONING[1] / 60
START_MINUTES = 0.5, 1.5
TOKENIZER = 1.5, 2.0  # for 2e9 characters
TOKENIZER_CHARS = 2e9
WAIT_FOR_ROWS = 0.0, 3.0
COMPILE_MINUTES = 1.2, 3.3
REPORT_MINUTES = 0.5, 2.0
IDLE_MINUTES = 2.0, 3.0
CORE = 0.8, 2.7  # all items, a d24, eight H100: half and twice the 80 s said of the leaderboard's program
STALL = 0.18  # seconds that a checkpoint of a d24 stops one H100, measured (LOG, 2026-11-26)
WRITE_SPEED = 3e9, 1e9  # bytes/s of all ranks together


@dataclasses.dataclass(frozen=True)
class Stage:
    """Minutes of one stage, least and most, and what that rests on."""

    name: str
    low: float
    high: float
    basis: str


@dataclasses.dataclass(frozen=True)
class Upload:
    """Bytes that go from the node to the bucket."""

    text: float
    """tokenizer and rows; none if the bucket has them"""
    checkpoints: float
    """with optimizer state, those that are uploaded"""
    last: float
    """weights of the finished model, as a checkpoint and as its export"""

    @property
    def total(self) -> float:
        return self.text + self.checkpoints + self.last


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
    upload: Upload


def stages(work: Work, gpu: GPU, gpus: int, training: Stage) -> list[Stage]:
    """All stages in order; `training` is the timed part."""
    share = work.tokenizer_chars / TOKENIZER_CHARS
    first = min(UNTIMED_STEPS, work.steps) * work.step_seconds / 60
    text = TOKENIZER[0] * share + WAIT_FOR_ROWS[0], TOKENIZER[1] * share + WAIT_FOR_ROWS[1]
    return [
        Stage(BOOT, *BOOT_MINUTES, "a guess until measured; at each preemption again"),
        Stage(START, *START_MINUTES, "estimated"),
        Stage(TEXT, *text, "estimated, by the network; none if the bucket has them"),
        Stage(COMPILE, *COMPILE_MINUTES, "compilation measured on one H100, 45 to 49 s; the rest estimated"),
        Stage(UNTIMED, first, first, "step time; not on the leaderboard's clock"),
        training,
        _validation(work, gpu, gpus),
        _checkpoints(work),
        _core(work, gpu, gpus),
        Stage(REPORT, *REPORT_MINUTES, f"estimated: {work.upload.last / 1e9:.1f} GB after the last step"),
        Stage(IDLE, *IDLE_MINUTES, "autostop of sky/*.yaml"),
    ]


def on_a_cpu(minutes: Sequence[float], rented: bool) -> list[Stage]:
    """The stages on a CPU, of whose speed nothing is known; `minutes` of training at assumed speeds."""
    whole = [Stage(BOOT, *BOOT_MINUTES, "a guess until measured")] if rented else []
    training = Stage(TRAINING, min(minutes), 3 * max(minutes), "assumed speeds, and up to three times as long")
    return [*whole, Stage(START, *START_MINUTES, "estimated"), training, Stage(SCORE, 0.2, 3.0, "assumed")]


def beside_training(stages: Sequence[Stage]) -> tuple[float, float]:
    """Minutes that the steps do not take, from our first line to the last upload, where the bucket has the text."""
    return total([stage for stage in stages if stage.name not in (BOOT, TEXT, TRAINING, IDLE)])


def total(stages: Sequence[Stage]) -> tuple[float, float]:
    """Minutes on the node, least and most."""
    return sum(stage.low for stage in stages), sum(stage.high for stage in stages)


@dataclasses.dataclass(frozen=True)
class Bid:
    """What a run would cost on one offer. Dollars; least and most."""

    offer: Offer
    node: tuple[float, float]
    """by the minutes, as spot with none or PREEMPTIONS preemptions"""
    egress: float | None
    """to a bucket outside of the cloud; None where no price is known"""
    ceiling: float
    """the most minutes at the most that the file's row lets SkyPilot pay, with egress where it is known"""


PREEMPTIONS = 2
"""that a spot row is priced with at most: an assumption, nobody knows how many there will be"""
LOST = 45.0
"""minutes of training that a preemption takes back: to the last checkpoint that is in the bucket (train.upload_minutes;
where the cloud announces it, to the moment itself)"""


def bids(stages: Sequence[Stage], upload: Upload, gpus: int) -> list[Bid]:
    """The run on each offer of as many GPUs, the cheapest first."""
    low, high = total(stages)
    again = {stage.name: stage.high for stage in stages}
    preempted = sum(again[name] for name in (BOOT, START, COMPILE)) + min(LOST, again[TRAINING])
    found = []
    for offer in OFFERS:
        if offer.gpus != gpus:
            continue
        most = high + (PREEMPTIONS * preempted if offer.spot else 0)
        rate = EGRESS[offer.cloud]
        egress = None if rate is None else rate * upload.total / 1e9
        node = low / 60 * offer.hour, most / 60 * offer.hour
        found.append(Bid(offer, node, egress, most / 60 * offer.most + (egress or 0)))
    return sorted(found, key=lambda bid: bid.node[1])


def _validation(work: Work, gpu: GPU, gpus: int) -> Stage:
    forward = token_seconds(work.config, gpu, fp8=False) / 3
    minutes = work.validations * work.val_tokens * forward / gpus / 60
    times = "once" if work.validations == 1 else f"{work.validations} times"
    return Stage(VALIDATION, minutes, minutes, f"{work.val_tokens:,} tokens {times}, a third of a bf16 step")


def _checkpoints(work: Work) -> Stage:
    """They are written beside training, which waits for a copy only; at the end for the weights on disk."""
    stalls = work.checkpoints * STALL
    low, high = (
        (factor * stalls + work.upload.last / 2 / speed) / 60 for factor, speed in zip((1, 3), WRITE_SPEED, strict=True)
    )
    return Stage(CHECKPOINTS, low, high, f"{work.checkpoints} stops of 0.2 s, measured on one H100; the last written")


def _core(work: Work, gpu: GPU, gpus: int) -> Stage:
    items = min(CORE_ITEMS, CORE_TASKS * work.core_cap) if work.core_cap else CORE_ITEMS
    larger = flops_per_token(work.config) / flops_per_token(RUN_6.config)
    factor = items / CORE_ITEMS * larger * REFERENCE_GPUS / gpus * REFERENCE.bf16 / gpu.bf16
    at_most = "at most " if work.core_cap else ""
    return Stage(
        SCORE, CORE[0] * factor, CORE[1] * factor, f"CORE, {at_most}{items:,} items; estimated, by FLOPs from a d24's"
    )
