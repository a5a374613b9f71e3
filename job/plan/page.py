"""The plan as a page of plain text, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from job.plan.memory import RESERVE
from job.plan.money import PREEMPTIONS, beside_training, bids
from job.plan.prices import CONTROLLER, STORAGE
from job.plan.published_runs import CORE_SD, SHOWN, chance_of_passing, runs_needed
from job.plan.quote import OnNode, Plan, assumptions, warnings
from job.plan.steptime import block_gigabytes
from job.recipe.leaderboard import GPT2_XL_CORE

WIDTH = 100
GIGA = 1e9
COLUMNS = {"parameters": 11, "gradients": 11, "states": 8, "weight_copies": 8, "activations": 13, "loss": 7, "total": 8}
"""of the memory table, and their widths"""
TOO_FAR = 4
"""differences beyond which a published run is no comparison"""


def page(plan: Plan) -> str:
    """All sections, without a newline at the end."""
    return "\n".join(
        line.rstrip() for section in (_head, _model, _training, _text, _node, _notes) for line in section(plan)
    )


def side_by_side(plans: Sequence[Plan]) -> str:
    """What tells the plans apart, a column for each, without a newline at the end."""
    columns = [_summary(plan) for plan in plans]
    names = list(dict.fromkeys(name for column in columns for name in column))
    cells = [
        ["", *names],
        *(
            [plan.recipe.preset, *(column.get(name, "-") for name in names)]
            for plan, column in zip(plans, columns, strict=True)
        ),
    ]
    widths = [max(map(len, column)) for column in cells]
    rows = zip(*cells, strict=True)
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _summary(plan: Plan) -> dict[str, str]:
    run, on_node, derived = plan.run, plan.on_node, plan.derived
    said = {
        "model": f"d{derived.config.depth}, {derived.scaling.total_parameters.value / 1e6:,.0f} M parameters",
        "tokens": f"{derived.scaling.tokens.value / GIGA:.2f} G in {derived.steps:,} steps",
    }
    if on_node is None:
        return said | {"machine": "a CPU, minutes"}
    evidence = "published" if plan.is_published else "estimated"
    asked = next(memory for memory, _ in on_node.memory if memory.rows == plan.recipe.train.device_batch_size)
    said["machine"] = f"{on_node.node.gpus} x {on_node.node.gpu.title}"
    if plan.recipe.train.fp8:
        said["a d24's blocks, 16 rows"] = f"{block_gigabytes(plan.recipe.train.levers):.1f} GB a micro-step (counted)"
    said |= {
        "step": f"{on_node.step_seconds * 1e3:,.0f} ms (estimated)",
        "memory of a GPU": f"{asked.total / GIGA:.1f} GB in {asked.rows} rows (estimated)",
        "training, timed": f"{_span(*on_node.training)} min ({evidence})",
        "boot to teardown": f"{_span(*on_node.minutes)} min (estimated)",
    }
    if on_node.dollars:
        said[f"at ${on_node.node.price:.2f} an hour"] = "${:.2f} to ${:.2f} (estimated)".format(*on_node.dollars)
    for bid in bids(on_node.stages, on_node.upload, on_node.node.gpus):
        said[bid.offer.name] = "${:.2f} to ${:.2f}".format(*bid.node)
    said["uploaded"] = f"{on_node.upload.total / GIGA:.1f} GB"
    if _scores_as_published(plan):
        runs = f"mean of {run.core_runs}" if run.core_runs > 1 else "one run"
        said["CORE"] = f"{run.core:.4f} ({'' if plan.is_published else 'of ' + run.name + ', '}{runs}, published)"
        said["one run passes"] = f"{chance_of_passing(run.core):.0%} (estimated)"
    return said


def _head(plan: Plan) -> Iterator[str]:
    recipe, on_node = plan.recipe, plan.on_node
    where = f"{on_node.node.gpus} x {on_node.node.gpu.title}" if on_node else "a CPU"
    left, right = f"{recipe.preset} on {where}", "a published recipe" if plan.is_published else "not a published recipe"
    yield left + right.rjust(WIDTH - len(left))
    yield "=" * WIDTH
    if on_node:
        minutes = f"{_span(*on_node.training)} minutes of training, {_span(*on_node.minutes)} minutes on the node"
        yield from _paragraph(minutes + _bill(on_node))
    else:
        speeds = ", ".join(f"{minutes:.1f} minutes on {where}" for where, minutes in plan.cpu_minutes.items())
        yield from _paragraph(f"free, on your own machine; training, at assumed speeds: {speeds}")
    yield from _paragraph(_published(plan))


def _bill(on_node: OnNode) -> str:
    if on_node.dollars is None:
        return ", dollars unknown: --price"
    low, high = on_node.dollars
    return f", ${low:.2f} to ${high:.2f} at ${on_node.node.price:.2f}/h"


def _scores_as_published(plan: Plan) -> bool:
    """Whether the published score of the closest run may be expected of this one: it learns as much from the same."""
    far = ("depth", "steps", "text", "fp8")
    return len(plan.differences) <= TOO_FAR and not any(each.startswith(far) for each in plan.differences)


def _published(plan: Plan) -> str:
    run, differences = plan.run, plan.differences
    if len(differences) > TOO_FAR:
        return "No published recipe is near it."
    score = f"CORE {run.core:.4f}" + (f" (mean of {run.core_runs})" if run.core_runs > 1 else " (one run)")
    result = (
        f"{run.name} ({run.when}): {run.seconds / 60:.1f} minutes on 8xH100, {score} against GPT-2 XL's"
        f" {GPT2_XL_CORE}, {run.bpb:.4f} bits per byte on {run.dataset}."
    )
    if _scores_as_published(plan):
        result += (
            f" One run of such a recipe passes {chance_of_passing(run.core):.0%} of the time (a CORE varies by"
            f" {CORE_SD} from run to run, published); {runs_needed(run.core) or 'more than 1,000'} runs would show it"
            f" at p < {SHOWN}."
        )
    return f"It is {result}" if not differences else f"Closest published recipe ({'; '.join(differences)}): {result}"


def _model(plan: Plan) -> Iterator[str]:
    config, scaling = plan.derived.config, plan.derived.scaling
    yield from _title("Model")
    yield (
        f"depth {config.depth}, width {config.width:,}, {config.heads} heads of {config.head_dim}, context"
        f" {config.seq_len:,}, vocabulary {config.vocab_size:,}, short window {min(config.windows):,}"
    )
    for name, value in scaling.parameters.items():
        yield from _row(name, f"{value.value:,}", value.why)
    yield from _row("all parameters", f"{scaling.total_parameters.value:,}", "")
    yield from _row(
        "scaling parameters",
        f"{scaling.scaling_parameters.value:,}",
        "matrices and head: what tokens are counted against",
    )


def _training(plan: Plan) -> Iterator[str]:
    scaling, train = plan.derived.scaling, plan.recipe.train
    yield from _title("Training")
    yield from _row("tokens", f"{scaling.tokens.value:,}", f"{scaling.ratio.value:.2f} a scaling parameter")
    yield from _row("batch", f"{scaling.batch_tokens.value:,}", "tokens a step: " + scaling.batch_tokens.why)
    yield from _row("steps", f"{scaling.steps.value:,}", scaling.steps.why)
    yield from _row("FLOPs a token", f"{scaling.flops_per_token.value:,}", scaling.flops_per_token.why)
    yield from _row(
        "FLOPs",
        f"{scaling.flops.value:.4e}",
        "fp8 for the large products" if train.fp8 else "bf16" if plan.on_node else "",
    )
    yield from _row("weight decay", f"{scaling.weight_decay.value:.4f}", scaling.weight_decay.why)
    rates = ", ".join(f"{name} {value.value:.5f}" for name, value in scaling.learning_rates.items())
    yield from _paragraph(f"learning rates: {rates} (why: any command's --dry-run)")


def _text(plan: Plan) -> Iterator[str]:
    text = plan.text
    yield from _title(f"Text: {text.source}")
    yield from _row(
        "rows",
        f"{text.rows:,}",
        f"of {plan.recipe.model.seq_len + 1:,} tokens to train on; {text.val_rows:,} to validate on",
    )
    dropped = (
        f"{text.crop_share:.1%} of them dropped by packing"
        if text.crop_share
        else "none dropped: long documents are split"
    )
    yield from _row("tokens before packing", f"{text.raw_tokens:,}", dropped)
    yield from _row("characters", f"{text.characters / 1e6:,.0f} million", "")
    if text.shards is not None:
        yield from _row("shards", f"{text.shards:,}", f"of {text.available:,}, and the validation shard")


def _node(plan: Plan) -> Iterator[str]:
    on_node = plan.on_node
    if on_node is None:
        return
    card = on_node.node.gpu.memory
    yield from _title(f"Memory of one GPU, 10^9 bytes ({card * (1 - RESERVE) / GIGA:.1f} of {card / GIGA:.1f} usable)")
    heads = (f"{name.removeprefix('weight_'):>{width}}" for name, width in COLUMNS.items())
    yield f"{'device batch':<14}{''.join(heads)}"
    for memory, divides in on_node.memory:
        cells = "".join(f"{getattr(memory, name) / GIGA:>{width}.1f}" for name, width in COLUMNS.items())
        rows = f"{memory.rows} (recipe)" if memory.rows == plan.recipe.train.device_batch_size else str(memory.rows)
        verdict = "does not divide" if not divides else "fits" if memory.fits(card) else "does not fit"
        yield f"{rows:<14}{cells}  {verdict}"
    largest = f"{on_node.largest.rows} rows" if on_node.largest else "none"
    temporaries = on_node.memory[0][0].temporaries / GIGA
    yield f"largest that fits: {largest}. The optimizer's {temporaries:.1f} come when the activations are gone."
    host = on_node.host
    yield from _paragraph(
        f"Of the machine's own memory all ranks together take {host.total / GIGA:.1f} beside their processes:"
        f" {host.pinned / GIGA:.1f} pinned for checkpoints, in blocks of powers of two, and"
        f" {host.rehearsal / GIGA:.1f} for the warm-up's copy of the state."
    )
    yield from _title("Time and money, minutes")
    published = f"; published for 8xH100: {plan.run.step_seconds * 1e3:,.0f} ms" if plan.is_published else ""
    yield from _paragraph(
        f"step {on_node.step_seconds * 1e3:,.0f} ms in {on_node.micro_steps} micro-steps a GPU,"
        f" {plan.derived.batch_tokens / on_node.step_seconds:,.0f} tokens a second, by"
        f" {'what was measured' if plan.measured else 'the fit'}{published}"
    )
    for stage in on_node.stages:
        yield from _row(stage.name, _span(stage.low, stage.high), stage.basis)
    yield from _row("minutes on the node", _span(*on_node.minutes), "")
    around = "from our first line to the last upload, where the bucket has the text"
    yield from _row("beside training", _span(*beside_training(on_node.stages)), around)
    yield from _bids(on_node)


def _bids(on_node: OnNode) -> Iterator[str]:
    """What each offer of sky/*.yaml and docs/cloud.md would cost."""
    found = bids(on_node.stages, on_node.upload, on_node.node.gpus)
    if not found:
        return
    upload = on_node.upload
    yield from _title("By cloud, dollars (prices: SkyPilot's catalog, November 2026)")
    yield f"{'':<26}{'an hour':>9}{'the node':>20}{'egress':>9}{'at most':>10}"
    for bid in found:
        node = f"{bid.node[0]:.2f} to {bid.node[1]:.2f}"
        egress = "unknown" if bid.egress is None else f"{bid.egress:.2f}"
        yield f"{bid.offer.name:<26}{bid.offer.hour:>9.2f}{node:>20}{egress:>9}{bid.ceiling:>10.2f}"
    yield from _paragraph(
        f"As spot with none to {PREEMPTIONS} preemptions. Egress: {upload.total / GIGA:.1f} GB to a bucket outside of"
        f" the cloud (text {upload.text / GIGA:.1f}, once; checkpoints {upload.checkpoints / GIGA:.1f}, weights"
        f" and export {upload.last / GIGA:.1f}) at list prices from memory, free within a region. At most: the slowest"
        " at the highest price that the file lets SkyPilot pay."
        f" Besides: storage ${STORAGE * upload.total / GIGA:.2f} a month (S3's list price), and the controller of"
        f" `sky jobs` ${CONTROLLER[0]:.2f} to ${CONTROLLER[1]:.2f} an hour while it is up (a guess)."
    )


def _notes(plan: Plan) -> Iterator[str]:
    for title, notes in (("To know before", warnings(plan)), ("Assumptions", assumptions(plan))):
        if notes:
            yield from _title(title)
            for note in notes:
                yield from _paragraph(note, "- ")


def _title(title: str) -> list[str]:
    return ["", title, "-" * len(title)]


def _row(name: str, value: str, why: str) -> list[str]:
    """Name, value, explanation; a long explanation goes on in its own column."""
    indent = 43
    head = f"{name:<26}{value:>15}"
    lines = textwrap.wrap(why, WIDTH - indent) or [""]
    return [f"{head}  {lines[0]}", *(" " * indent + line for line in lines[1:])]


def _paragraph(text: str, mark: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark))


def _span(low: float, high: float) -> str:
    """Minutes, as one number where both ends round to the same."""
    ends = [f"{minutes:.1f}" for minutes in (low, high)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)
