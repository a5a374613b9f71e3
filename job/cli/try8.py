"""`speedrun try8`: does what a run on many GPUs rests on hold on these?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from job.cli.options import (
    bucket_options,
    machine_options,
    money_options,
    out_option,
    ranks_option,
    recipe_options,
    talk_options,
)
from job.console import Console
from job.errors import UsageError


@click.command()
@recipe_options("try")
@out_option
@bucket_options
@machine_options
@money_options
@ranks_option
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), default=8.5, show_default=True, help="At most for all."
)
@talk_options
def try8(
    recipe: Any,
    out: Path,
    bucket: Any,
    strict: bool,
    allow_fa2: bool,
    limits: Any,
    accept_slow: bool,
    ranks: int | None,
    minutes: float,
    console: Console,
) -> None:
    """Train 50 steps on all GPUs of this machine, stopped, resumed, one rank frozen, with each exchange of gradients;
    score and upload them. What came out is runs/try8/try8.json in the bucket: `plan --measured` and `--strict` read it.

    \b
    Example:
      speedrun try8 --bucket s3://bucket/prefix --strict
    """
    from job.run.try8 import Trial

    if bucket is None:
        raise UsageError("a trial is of the bucket too: give --bucket s3://bucket/prefix")
    accepted = [*["--strict"] * strict, *["--allow-fa2"] * allow_fa2, *["--accept-slow"] * accept_slow]
    words = ["--preset", recipe.preset, "--out", str(out), *accepted, *limits.words()]
    for key in (key for key, source in recipe.sources.items() if source.startswith("-")):
        section, name = key.split(".")
        value = getattr(getattr(recipe, section), name)
        words += ["-o", f"{key}={','.join(value) if isinstance(value, tuple) else value}"]
    Trial(out, recipe, words, ranks=ranks, bucket=bucket, seconds=60 * minutes, console=console).run()
