"""`speedrun plan`: what a recipe needs and costs, computed before anything is rented.

    Recipe --derive--> steps, tokens, FLOPs --+--> text        rows, characters, shards
                                              +--> memory      per GPU, by device batch     (job.plan.memory)
                                              +--> step time   fitted to published runs     (job.plan.steptime)
                                              +--> stages      minutes, dollars             (job.plan.money)

Where the recipe is a published run on the published machine, its published seconds stand for the training; elsewhere
the fit.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from job.data.hub import CROP_SHARE, DATASETS, Dataset
from job.errors import UsageError
from job.machine.gpus import GPU, PRICE_SOURCE, check_count, check_price, find_gpu
from job.plan import money, published_runs
from job.plan.measured import Measured
from job.plan.memory import (
    RESERVE,
    HostMemory,
    Memory,
    checkpoint_bytes,
    host_memory,
    largest_batch,
    parameter_bytes,
    step_memory,
)
from job.plan.steptime import (
    BEYOND,
    BLOCK_GB,
    block_gigabytes,
    expected_error,
    optimizer_seconds,
    published_fit,
    step_seconds,
)
from job.recipe.config import DataConfig, Recipe, preset_header
from job.recipe.derive import Derived, derive, micro_steps
from job.recipe.leaderboard import UNTIMED_STEPS
from model.kernels import BF16_TIME

CHARS_PER_TOKEN = 4.11
"""characters a token, from Run 6's 147 shards for its 8.9e9 tokens, vocabulary 32,768"""
DEVICE_BATCHES = (8, 16, 32)
CPU_SPEEDS = {"two slow cores (0.05 TFLOP/s)": 5e10, "a server with bf16 matrix instructions (1 TFLOP/s)": 1e12}
"""assumed: what the matrix products of a small model reach on a CPU"""


@dataclasses.dataclass(frozen=True)
class Text:
    """What the run reads. `shards` is None where the text is not a published dataset."""

    source: str
    rows: int
    val_rows: int
    crop_share: float
    raw_tokens: int
    characters: int
    shards: int | None
    available: int | None


@dataclasses.dataclass(frozen=True)
class Node:
    """The GPUs and what they cost an hour, None where no price is known."""

    gpu: GPU
    gpus: int
    price: float | None
    spot: float | None


@dataclasses.dataclass(frozen=True)
class OnNode:
    """What follows from recipe and node: seconds, bytes, minutes."""

    node: Node
    micro_steps: int
    step_seconds: float
    memory: list[tuple[Memory, bool]]
    """by device batch; and whether it divides the batch"""
    largest: Memory | None
    host: HostMemory
    stages: list[money.Stage]
    upload: money.Upload

    @property
    def minutes(self) -> tuple[float, float]:
        return money.total(self.stages)

    @property
    def training(self) -> tuple[float, float]:
        """Minutes of the timed steps, least and most."""
        return next((stage.low, stage.high) for stage in self.stages if stage.name == money.TRAINING)

    @property
    def dollars(self) -> tuple[float, float] | None:
        if self.node.price is None:
            return None
        low, high = self.minutes
        return low / 60 * self.node.price, high / 60 * self.node.price


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that the page says. `on_node` is None for a plan without a GPU."""

    recipe: Recipe
    derived: Derived
    text: Text
    run: published_runs.Run
    """the published run closest to it"""
    differences: list[str]
    """in what the recipe differs from it"""
    on_node: OnNode | None
    cpu_minutes: dict[str, float]
    measured: Measured | None = None
    """what the step is by, instead of the fit"""

    @property
    def is_published(self) -> bool:
        return not self.differences

    def document(self) -> dict[str, Any]:
        """The plan as plain JSON values; bytes, seconds, minutes and dollars as the names say."""
        return {
            "schema": 1,
            "preset": self.recipe.preset,
            "evidence": self.recipe.evidence,
            "recipe": self.recipe.values(),
            "derived": self.derived.explained(),
            "text": dataclasses.asdict(self.text),
            "published_run": {
                "name": self.run.name,
                "differences": self.differences,
                "core": self.run.core,
                "bpb": self.run.bpb,
                "seconds": self.run.seconds,
                "step_seconds": self.run.step_seconds,
                "chance_of_one_run": published_runs.chance_of_passing(self.run.core),
                "runs_for_one_percent": published_runs.runs_needed(self.run.core),
            },
            "node": None if self.on_node is None else _node_document(self.on_node),
            "cpu_minutes": self.cpu_minutes,
            "step_time_error": published_fit().errors,
            "warnings": warnings(self),
            "assumptions": assumptions(self),
        }


def make_plan(
    recipe: Recipe,
    gpu: str | None = None,
    gpus: int | None = None,
    price: float | None = None,
    measured: Measured | None = None,
) -> Plan:
    """The plan of `recipe` on `gpus` GPUs called `gpu`, or on its preset's machine; `price` in dollars a node-hour.

    UsageError for an unknown GPU, a price that is not positive, fp8 on a GPU without it, a batch that does not divide.
    """
    derived = derive(recipe)
    node = find_node(recipe.preset, gpu, gpus, price)
    run, differences = published_runs.closest(recipe, derived)
    on_node = None if node is None else place(recipe, derived, node, None if differences else run, measured)
    flops = derived.scaling.flops.value
    return Plan(
        recipe=recipe,
        derived=derived,
        text=text_needed(recipe.data, derived.rows, recipe.model.seq_len, recipe.train.val_tokens),
        run=run,
        differences=differences,
        on_node=on_node,
        cpu_minutes={} if on_node else {where: flops / speed / 60 for where, speed in CPU_SPEEDS.items()},
        measured=measured,
    )


def find_node(preset: str, gpu: str | None, gpus: int | None, price: float | None) -> Node | None:
    """The node asked for, completed by what `preset` is made for; None without a GPU."""
    if price is not None:
        check_price(price)
    count, _, name = preset_header(preset).machine.rpartition("x")
    gpu = gpu or name
    if gpu.lower() == "cpu":
        if gpus is not None or price is not None:
            raise UsageError("--gpus and --price are for a plan with GPUs: add --gpu h100")
        return None
    found, number = find_gpu(gpu), check_count(int(count or 1) if gpus is None else gpus)
    if price is None and found.dollars is not None:
        price = found.dollars * number
    return Node(found, number, price, None if found.spot is None else found.spot * number)


def place(
    recipe: Recipe, derived: Derived, node: Node, published: published_runs.Run | None, measured: Measured | None = None
) -> OnNode:
    """Seconds, memory and minutes of the recipe on `node`; `published` is the run that it repeats exactly, if any."""
    config, train, gpu, gpus = derived.config, recipe.train, node.gpu, node.gpus
    if train.fp8 and not gpu.fp8:
        raise UsageError(f"the {gpu.title} has no fp8 (Ada, Hopper or newer have): plan bf16 with -o train.fp8=false")
    micro = micro_steps(recipe, derived, gpus)
    seconds = step_seconds(config, derived.batch_tokens, gpu, gpus, train.fp8, levers=train.levers)
    if measured:
        seconds = measured.carried_to(recipe, derived, gpu, gpus)
    per_rank = derived.rows_per_step // gpus
    upload = _upload(recipe, derived, seconds, gpus)
    batches = sorted({*DEVICE_BATCHES, train.device_batch_size})
    work = money.Work(
        config=config,
        fp8=train.fp8,
        steps=derived.steps,
        step_seconds=seconds,
        tokenizer_chars=recipe.data.tokenizer_chars,
        checkpoints=1 + _before_the_end(derived.steps, train.checkpoint_every),
        validations=1 + recipe.eval.packed_val + _before_the_end(derived.steps, train.val_every),
        val_tokens=train.val_tokens,
        core_cap=recipe.eval.cap,
        upload=upload,
    )
    return OnNode(
        node=node,
        micro_steps=micro,
        step_seconds=seconds,
        memory=[(step_memory(config, rows, gpus, train.fp8, train.levers), per_rank % rows == 0) for rows in batches],
        largest=largest_batch(config, per_rank * gpus, gpus, train.fp8, gpu.memory, train.levers),
        host=host_memory(config, gpus),
        stages=money.stages(work, gpu, gpus, _training(recipe, derived, seconds, node, published, measured)),
        upload=upload,
    )


def _upload(recipe: Recipe, derived: Derived, seconds: float, gpus: int) -> money.Upload:
    """What goes into a bucket that has no text yet, from a run that nothing stops."""
    train, minutes = recipe.train, derived.steps * seconds / 60
    made = _before_the_end(derived.steps, train.checkpoint_every)
    made = max(made, int(minutes / train.checkpoint_minutes) if train.checkpoint_minutes else 0)
    sent = min(made, int(minutes / train.upload_minutes)) if train.upload_minutes else made
    rows = derived.rows + math.ceil(train.val_tokens / recipe.model.seq_len)
    return money.Upload(
        text=2.0 * rows * (recipe.model.seq_len + 1),
        checkpoints=float(sent * checkpoint_bytes(derived.config, gpus)),
        last=2.0 * parameter_bytes(derived.config),
    )


def _before_the_end(steps: int, every: int) -> int:
    return (steps - 1) // every if every else 0


def _training(
    recipe: Recipe,
    derived: Derived,
    seconds: float,
    node: Node,
    published: published_runs.Run | None,
    measured: Measured | None,
) -> money.Stage:
    minutes = max(0, derived.steps - UNTIMED_STEPS) * seconds / 60
    if measured and measured.has_the_step_of(recipe, derived, node.gpus):
        return money.Stage(money.TRAINING, minutes, minutes, "the measured step")
    if measured is None and published is not None and (node.gpu.name, node.gpus) == ("h100", published_runs.GPUS):
        minutes = published.seconds / 60
        return money.Stage(money.TRAINING, minutes, minutes, f"published: {published.name}")
    error = expected_error(derived.config, node.gpu)
    return money.Stage(
        money.TRAINING, minutes * (1 - error), minutes * (1 + error), f"step time, {error:.1%} either way"
    )


def text_needed(data: DataConfig, rows: int, seq_len: int, val_tokens: int) -> Text:
    """Rows, tokens before packing, characters and shards for `rows` training rows."""
    crop = 0.0 if data.split_long else CROP_SHARE
    raw = math.ceil(rows * seq_len / (1 - crop))
    characters = math.ceil(raw * CHARS_PER_TOKEN)
    dataset = DATASETS.get(data.source)
    available = dataset.count - 1 if dataset else None  # the last shard is validation
    shards = math.ceil(characters / dataset.text_bytes) if dataset else None
    return Text(data.source, rows, math.ceil(val_tokens / seq_len), crop, raw, characters, shards, available)


def warnings(plan: Plan) -> list[str]:
    """To know before going on."""
    depth, width = plan.derived.config.depth, plan.derived.config.width
    said = list(preset_header(plan.recipe.preset).notes)
    if depth % 2:
        said.append(
            f"depth {depth} is odd: its width is rounded up to {width}, that of depth {depth + 1}, so it is wider for"
            " its depth than the models that every rule here was tuned on; an even depth is the safer choice"
        )
    text = plan.text
    if text.available is not None and text.shards is not None and text.shards > text.available:
        said.append(f"{text.shards:,} shards are more than {text.source} has ({text.available:,}): rows will repeat")
    if plan.on_node is None:
        return said
    rows, card = plan.recipe.train.device_batch_size, plan.on_node.node.gpu
    asked = next(memory for memory, _ in plan.on_node.memory if memory.rows == rows)
    if not asked.fits(card.memory):
        best = plan.on_node.largest
        remedy = f"-o train.device_batch_size={best.rows}" if best else "a smaller model or a larger card"
        said.append(
            f"{rows} rows at once need {asked.total / 1e9:.1f}e9 bytes and do not fit the {card.title}: take {remedy}"
        )
    return said


def assumptions(plan: Plan) -> list[str]:
    """Where the numbers rest on something that nobody measured."""
    if plan.on_node is None:
        return [
            "the speeds are guesses: small models reach less, and the minutes are of training alone",
            f"{CHARS_PER_TOKEN} characters a token; where the text is shorter, rows repeat",
        ]
    said, node, fit = [], plan.on_node.node, published_fit()
    said.append(
        f"step time: E = {fit.flops / 1e12:.0f} TFLOP/s and P = {fit.passes:.0f} passes, fitted to {len(fit.errors)}"
        f" published fp8 runs; a run left out of the fit is missed by at most {fit.worst:.1%}. Of it"
        f" {optimizer_seconds(plan.derived.config, node.gpu, node.gpus) * 1e3:.0f} ms are the optimizer, not fitted."
    )
    if plan.recipe.train.fp8 and (levers := plan.recipe.train.levers):
        said.append(
            f"levers: the blocks of a d24 move {block_gigabytes(levers):.1f} GB a micro-step of 16 rows with them and"
            f" {BLOCK_GB:.1f} without, counted and not timed; the fit's passes and the activations are scaled by such"
            " counts"
        )
    if measured := plan.measured:
        said.append(
            f"it is scaled to the step that was measured on {measured.gpus} x {measured.gpu} with image"
            f" {(measured.revision or 'unknown')[:12]}"
        )
    if not plan.recipe.train.fp8:
        said.append(f"bf16 takes {BF16_TIME:.2f} times as long as fp8, as published for a d26")
    if node.gpu.name != "h100":
        said.append(f"nobody published such a run on the {node.gpu.title}: the H100's times, scaled by the data sheets")
    if expected_error(plan.derived.config, node.gpu) > fit.worst:
        said.append(
            f"{BEYOND:.0%} either way is assumed for what lies beyond the published runs (another GPU, another depth)"
        )
    said.append(
        "memory: parameters to copies from the shapes; activations by a model calibrated on which published batches"
        f" fit; {RESERVE:.0%} of the card is kept free"
    )
    if plan.text.crop_share:
        said.append(
            f"packing drops {plan.text.crop_share:.1%} of the tokens (published for FineWeb-Edu, rows of 2048;"
            f" ClimbMix's is unknown); {CHARS_PER_TOKEN} characters a token, {Dataset.text_bytes / 1e6:.0f} million"
            " characters a shard"
        )
    said.append(
        PRICE_SOURCE if node.spot is not None else f"no price of the {node.gpu.title} is known here: give --price"
    )
    said.append(
        f"a preemption is priced with at most {money.LOST:.0f} minutes of steps done again, a boot, a start and a"
        f" compilation; {money.PREEMPTIONS} of them at most are assumed, and nobody knows"
    )
    return said


def _node_document(on_node: OnNode) -> dict[str, Any]:
    node = on_node.node
    return {
        "gpu": dataclasses.asdict(node.gpu),
        "gpus": node.gpus,
        "dollars_per_hour": node.price,
        "spot_dollars_per_hour": node.spot,
        "micro_steps": on_node.micro_steps,
        "step_seconds": on_node.step_seconds,
        "memory_bytes": [
            {**dataclasses.asdict(m), "total": m.total, "fits": m.fits(node.gpu.memory), "divides": divides}
            for m, divides in on_node.memory
        ],
        "host_memory_bytes": {**dataclasses.asdict(on_node.host), "total": on_node.host.total},
        "largest_device_batch": on_node.largest and on_node.largest.rows,
        "stages_minutes": [dataclasses.asdict(stage) for stage in on_node.stages],
        "minutes": on_node.minutes,
        "dollars": on_node.dollars,
        "upload_bytes": dataclasses.asdict(on_node.upload),
        "bids": [dataclasses.asdict(bid) for bid in money.bids(on_node.stages, on_node.upload, node.gpus)],
    }
