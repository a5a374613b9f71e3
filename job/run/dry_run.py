"""What a command would do, after the same checks and before any of it; nothing is left behind."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from job.errors import PreflightError
from job.evaluation.rescore import fullness_asked, fullness_of_score
from job.plan.cap import Cap, Quote
from job.recipe.config import Recipe
from job.recipe.derive import derive, micro_steps
from job.reporter import Reporter
from job.run.bucket import Bucket
from job.run.budget import Budget
from job.run.launch import check_run, is_done, run_folder
from job.run.supervise import Interrupts
from job.store.attempt import Record, fold
from job.store.checkpoint_folder import folder_of


def show_plan(
    out: Path,
    run_id: str,
    recipe: Recipe,
    stages: Sequence[str],
    notes: list[str],
    check: Callable[[], Quote | None],
    *,
    fresh: bool,
    ranks: int,
    bucket: Bucket | None,
    origin: Mapping[str, Any] | None,
    cap: Cap,
    as_json: bool,
) -> None:
    """Print what the run would do, or raise what it would raise before its first step.

    check: looks at this machine and adds to `notes`. What is meant for another machine than this is shown, and then
    refused as the run would be.
    """
    refused = None
    try:
        quote = check()
        run, _ = check_run(out, run_id, recipe, fresh=fresh, ranks=ranks, bucket=bucket, origin=origin)
        trained = not fresh and "pretrain" in _done(("pretrain",), run, recipe, bucket)
        Budget(cap, quote, Record() if fresh else fold(run), Interrupts(), Reporter(), trained=trained)
    except PreflightError as error:
        refused = error
    planned = plan_of(out, run_folder(out, run_id), recipe, stages, ranks=ranks, fresh=fresh, bucket=bucket)
    click.echo(shown(planned, notes, as_json=as_json))
    if refused:
        raise refused


def plan_of(
    out: Path,
    run: Path | None,
    recipe: Recipe,
    stages: Sequence[str],
    *,
    ranks: int,
    fresh: bool = False,
    bucket: Bucket | None = None,
) -> dict[str, Any]:
    """The recipe with the origin of each value, what follows, and which stages are left, here and in the bucket."""
    derived = derive(recipe)
    done = _done(stages, run, recipe, bucket) if run and not fresh else set()
    why = {"value": micro_steps(recipe, derived, ranks), "why": f"on {ranks} rank{'s' * (ranks > 1)}"}
    return {
        "preset": recipe.preset,
        "evidence": recipe.evidence,
        "recipe": recipe.values(),
        "sources": dict(recipe.sources),
        "derived": derived.explained() | {"micro_steps": why},
        "run_folder": str(run) if run else None,
        "prepared": str(out / "prepared"),
        "bucket": bucket.place if bucket else None,
        "stages": {stage: "done already" if stage in done else "to do" for stage in stages},
    }


def shown(plan: dict[str, Any], notes: Sequence[str], *, as_json: bool) -> str:
    """A plan and what there is to know besides."""
    return json.dumps(plan | {"notes": notes}, indent=1) if as_json else "\n".join([text_of(plan), *notes])


def text_of(plan: Mapping[str, Any]) -> str:
    """A plan in words."""
    lines = [f"preset {plan['preset']} ({plan['evidence']})", ""]
    lines += [f"  {key:<24} {_short(value):<16} {plan['sources'][key]}" for key, value in _flat(plan["recipe"])]
    lines += ["", "what follows:"]
    lines += [f"  {name:<34} {_short(of['value']):<16} {of['why']}" for name, of in plan["derived"].items()]
    place = f"run folder: {plan['run_folder']}" if plan["run_folder"] else f"prepared below: {plan['prepared']}"
    lines += ["", place, *([f"mirrored to {plan['bucket']}"] if plan["bucket"] else [])]
    return "\n".join([*lines, *(f"  {stage}: {state}" for stage, state in plan["stages"].items())])


def _done(stages: Sequence[str], run: Path, recipe: Recipe, bucket: Bucket | None) -> set[str]:
    done = {stage for stage in stages if is_done(stage, run, recipe)}
    rows = derive(recipe).rows
    if bucket and folder_of(run, rows) in bucket.checkpoints(run):
        done |= {"pretrain"} & set(stages)
        if "evaluate" in stages:
            with tempfile.TemporaryDirectory() as folder:
                there = Path(folder) / run.name
                bucket.pull_results(there)
                done |= {"evaluate"} if fullness_of_score(there, rows) >= fullness_asked(recipe.eval) else set()
    return done


def _flat(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, entries in recipe.items():
        for key, value in entries.items():
            yield f"{section}.{key}", value


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return (value or '""') if isinstance(value, str) else json.dumps(value)
