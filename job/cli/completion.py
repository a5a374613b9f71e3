"""What a shell offers at the tab key: presets, recipe keys, run ids of this machine (no bucket is asked)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click


def complete_presets(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    from job.recipe.config import preset_names

    return [name for name in preset_names() if name.startswith(begun)]


def complete_keys(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    from job.recipe.config import known_keys

    return [f"{key}=" for key in known_keys() if key.startswith(begun)]


def complete_runs(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    runs = Path(context.params.get("out") or "out") / "runs"
    return sorted(path.parent.name for path in runs.glob("*/recipe.json") if path.parent.name.startswith(begun))


def run_id_option(words: str, *, required: bool = False) -> Callable:
    return click.option("--run-id", required=required, metavar="ID", shell_complete=complete_runs, help=words)
