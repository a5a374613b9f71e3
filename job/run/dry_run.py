"""What a command would do, in words, before it does any of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from job.recipe.config import Recipe
from job.recipe.derive import derive, micro_steps
from job.run.launch import is_done


def describe_plan(out: Path, run: Path | None, recipe: Recipe, stages: Sequence[str], *, ranks: int) -> str:
    """What a command would do: the recipe with the origin of each value, what follows, and which stages are left."""
    derived = derive(recipe)
    lines = [f"preset {recipe.preset} ({recipe.evidence})", ""]
    lines += [f"  {key:<24} {_short(value):<16} {recipe.sources[key]}" for key, value in _flat(recipe)]
    lines += ["", "what follows:"]
    lines += [
        f"  {name:<34} {_short(value['value']):<16} {value['why']}" for name, value in derived.explained().items()
    ]
    lines += [f"  {'micro_steps':<34} {micro_steps(recipe, derived, ranks):<16} on {ranks} rank{'s' * (ranks > 1)}", ""]
    lines += [f"run folder: {run}" if run else f"prepared below: {out / 'prepared'}"]
    for stage in stages:
        done = run is not None and run.exists() and is_done(stage, run, recipe)
        lines.append(f"  {stage}: {'done already' if done else 'to do'}")
    return "\n".join(lines)


def _flat(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    for section, entries in recipe.values().items():
        for key, value in entries.items():
            yield f"{section}.{key}", value


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return (value or '""') if isinstance(value, str) else json.dumps(value)
