"""What a person who watches a run wants to know: how far it is, how fast, and what went wrong."""

from __future__ import annotations

import statistics
from typing import Any

from job.machine.gpus import CUDA_NAMES, GPUS
from job.recipe.config import from_document
from job.recipe.derive import derive
from job.report import words
from job.report.result import finite
from job.store.attempt import Record
from model.scaling import causal_flops_per_token, flops_per_token

RECENT = 50
"""steps that the speed is the median of"""
MOST_WARNINGS = 20


def progress_sentence(
    recipe: dict[str, Any], record: Record, result: dict[str, Any], bill: dict[str, Any] | None = None
) -> str:
    """Step, loss, speed, time to go, and of a receipt so far the dollars; empty before the first step and when all are
    made."""
    steps, planned = result["steps"], result["planned_steps"]
    if not steps or steps >= planned:
        return ""
    recent = [record.steps[step] for step in sorted(record.steps)[-RECENT:]]
    seconds = statistics.median(event["ms"] for event in recent) / 1000
    said = f"Step {words.count(steps)} of {words.count(planned)} ({words.percent(steps / planned, 0)}), "
    said += f"loss {words.number(finite(recent[-1]['loss']))}"
    if not seconds:
        return said + "."
    speed = recent[-1]["tokens"] / seconds
    said += f", {words.count(round(speed))} tokens a second"
    if shares := utilization(recipe, result, speed):
        exact, counted = (words.percent(share) for share in shares)
        said += f", MFU {counted} by the leaderboard's count and {exact} by causal attention's, of the bf16 peak"
    said += f"; at this pace {words.duration((planned - steps) * seconds)} of steps are left."
    if bill:
        quoted = sum(float(row["planned_usd"] or 0) for row in bill["rows"])
        said += f" ${bill['usd']} are spent of a quoted ${quoted:.2f}."
    return said


def utilization(recipe: dict[str, Any], result: dict[str, Any], tokens_per_s: float) -> tuple[float, float] | None:
    """Shares of the GPUs' bf16 peak by the FLOPs of causal attention and by the leaderboard's; None on unknown GPUs."""
    gpus = [CUDA_NAMES.get(name) for name in (result["provenance"] or {}).get("gpus", [])]
    if not gpus or None in gpus or not (result["machine"]["device"] or "").startswith("cuda"):
        return None
    config = derive(from_document(recipe)).config
    peak = result["machine"]["world_size"] * min(GPUS[name].bf16 for name in gpus if name)
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
        lines = words.count(len(record.unusable))
        said.append(f"{lines} lines of the event files were cut short or changed, and are passed over")
    return said
