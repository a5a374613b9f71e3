"""What a person who watches a run wants to know: how far it is, how fast, what it costs, and what went wrong.

The figures have one source, the folded events: the page, its live copy in the bucket and the line on a terminal
(job/run/watch.py) say the same.
"""

from __future__ import annotations

import dataclasses
import statistics
from decimal import Decimal

from job.machine.gpus import CUDA_NAMES, GPUS
from job.plan.cap import Quote
from job.plan.money import Stage
from job.recipe.config import Recipe
from job.recipe.derive import derive
from job.report import words
from job.report.result import finite, provenance
from job.store.attempt import Record
from job.store.bill import billed
from model.scaling import causal_flops_per_token, flops_per_token

RECENT = 50
"""steps that the speed is the median of"""
SMOOTHING = 0.9
"""weight of a loss, of that of the one a step later"""
MOST_WARNINGS = 20


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of a training under way; None where nobody knows."""

    step: int
    """steps that are made"""
    steps: int
    loss: float | None
    """nats per token, an exponential mean over the last RECENT steps"""
    bpb: float | None
    """of the last validation"""
    tokens_per_s: float | None
    utilization: tuple[float, float] | None
    """`utilization`"""
    seconds_left: float | None
    """of steps, at the pace of the last RECENT"""
    usd: Decimal | None
    """over all attempts"""
    forecast: Decimal | None
    """dollars of the whole run, by the pace and for the rest by its quote"""


def figures(recipe: Recipe, record: Record) -> Figures | None:
    """From the `present` record of a run; None before the first step."""
    if not record.steps:
        return None
    recent = [record.steps[step] for step in sorted(record.steps)[-RECENT:]]
    step, steps = recent[-1]["step"] + 1, record.train["steps"]
    seconds = statistics.median(event["ms"] for event in recent) / 1000
    weights = [SMOOTHING**age for age in reversed(range(len(recent)))]
    loss = sum(weight * event["loss"] for weight, event in zip(weights, recent, strict=True)) / sum(weights)
    bpb = record.validations[max(record.validations)]["bpb"] if record.validations else None
    speed = recent[-1]["tokens"] / seconds if seconds else None
    bills, usd, forecast = billed(record), None, None
    if any(bill.hour for bill in bills):
        usd = sum((bill.usd(bill.seconds) for bill in bills), Decimal(0))
        if record.quote:
            quote = Quote([Stage(**stage) for stage in record.quote["stages"]], steps)
            forecast = usd + bills[-1].usd(quote.needed(step, seconds))
    return Figures(
        step=step,
        steps=steps,
        loss=finite(loss),
        bpb=finite(bpb),
        tokens_per_s=speed,
        utilization=utilization(recipe, record, speed) if speed else None,
        seconds_left=(steps - step) * seconds if speed else None,
        usd=usd,
        forecast=forecast,
    )


def line_parts(found: Figures) -> list[str]:
    """The figures as short as they can be understood; MFU by the leaderboard's count, as published logs have it."""
    left = "" if found.seconds_left is None or found.step == found.steps else words.duration(found.seconds_left)
    parts = [f"step {found.step:,}/{found.steps:,}" + (f", {left} left" if left else "")]
    parts += [f"loss {words.number(found.loss)}"]
    parts += [] if found.bpb is None else [f"bpb {words.number(found.bpb)}"]
    parts += [] if found.tokens_per_s is None else [f"{words.short(found.tokens_per_s)} tok/s"]
    parts += [f"MFU {words.percent(found.utilization[1], 0)}"] if found.utilization else []
    if found.usd is not None:
        parts += [f"${found.usd:.2f}" + (f" of ${found.forecast:.2f}" if found.forecast else "")]
    return parts


def progress_sentence(found: Figures | None) -> str:
    """The same in words; empty before the first step and when all are made."""
    if found is None or found.step >= found.steps:
        return ""
    said = (
        f"Step {words.count(found.step)} of {words.count(found.steps)} ({words.percent(found.step / found.steps, 0)})"
    )
    said += f", loss {words.number(found.loss)}"
    if found.tokens_per_s is None:
        return said + "."
    said += f", {words.count(round(found.tokens_per_s))} tokens a second"
    if found.utilization:
        exact, counted = (words.percent(share) for share in found.utilization)
        said += f", MFU {counted} by the leaderboard's count and {exact} by causal attention's, of the bf16 peak"
    said += f"; at this pace {words.duration(found.seconds_left)} of steps are left."
    if found.usd is not None:
        said += f" ${found.usd:.2f} are spent"
        said += f" of ${found.forecast:.2f} that the run will cost at this pace." if found.forecast else "."
    return said


def utilization(recipe: Recipe, record: Record, tokens_per_s: float) -> tuple[float, float] | None:
    """Shares of the GPUs' bf16 peak by the FLOPs of causal attention and by the leaderboard's; None on unknown GPUs."""
    gpus = [CUDA_NAMES.get(name) for name in (provenance(record) or {}).get("gpus", [])]
    if not gpus or None in gpus or not (record.train.get("device") or "").startswith("cuda"):
        return None
    config = derive(recipe).config
    peak = record.train["world_size"] * min(GPUS[name].bf16 for name in gpus if name)
    return causal_flops_per_token(config) * tokens_per_s / peak, flops_per_token(config) * tokens_per_s / peak


def warnings(record: Record) -> list[str]:
    """The newest warnings, each once, how earlier attempts failed, and what of the record could not be read."""
    said = [
        f"Attempt {life.number} ended with exit {life.exit_code}: {life.reason}"
        for life in record.attempts
        if life.exit_code
    ]
    said += list(dict.fromkeys(reversed(record.warnings)))[:MOST_WARNINGS]
    if record.unusable:
        said.append(words.passed_over(len(record.unusable)))
    return said
