"""The leaderboard's own flags, so that a published command line can be repeated.

    torchrun --nproc_per_node=8 -m scripts.base_train -- --depth=26 --run=r --target-param-data-ratio=8.5 --fp8 ...
    speedrun pretrain --ranks 8 --generation run2        --depth=26 --run=r --target-param-data-ratio=8.5 --fp8 ...

Such a line leaves defaults open (batch, ratio, softcap, weight decay rule, text, validation tokens) that later versions of the training
program changed. `--generation` says which version is meant and fills them in; without it, and without a preset, the line is refused.
A flag that asks for something else than this program does is refused as well: none is ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from job.errors import UsageError
from job.recipe.derive import derive

if TYPE_CHECKING:
    from job.recipe.config import Recipe

HALF_MILLION = 524_288
RULE = 0
DEFAULT_BATCH = {"run1": HALF_MILLION, "run2": HALF_MILLION, "run3": RULE, "run4": RULE, "run6": RULE}
"""tokens a step that the program of each run took when the line named none; 0 = the rule by depth"""
DEFAULT_RATIO = {"run1": 10.5, "run2": 10.5, "run3": 10.5, "run4": 10.5, "run6": 12.0}
DEFAULT_DEVICE_BATCH = 32
OPTIONS = {
    "depth": "--depth",
    "ratio": "--target-param-data-ratio",
    "device_batch": "--device-batch-size",
    "total_batch": "--total-batch-size",
    "fp8": "--fp8",
    "save_every": "--save-every",
    "sample_every": "--sample-every",
    "core_every": "--core-metric-every",
    "core_cap": "--core-metric-max-per-task",
}


def line_options(command: Callable) -> Callable:
    """The flags of the published lines, and --generation."""
    options = (
        click.option(
            "--generation",
            type=click.Choice(list(DEFAULT_BATCH)),
            help="Whose training program the flags below are for.",
        ),
        click.option("--run", "run_name", metavar="ID", help="The same as --run-id."),
        click.option("--model-tag", metavar="ID", help="The same as --run-id; counts more than --run."),
        click.option("--depth", type=int, help="Transformer blocks (model.depth)."),
        click.option(
            "--target-param-data-ratio",
            "ratio",
            type=float,
            help="Tokens per scaling parameter (train.param_data_ratio).",
        ),
        click.option(
            "--device-batch-size",
            "device_batch",
            type=int,
            help="Rows per micro-step and rank (train.device_batch_size).",
        ),
        click.option(
            "--total-batch-size",
            "total_batch",
            type=int,
            help="Tokens per step (train.total_batch_size); -1 = by depth.",
        ),
        click.option("--fp8", is_flag=True, default=None, help="Large matrix products in fp8 (train.fp8)."),
        click.option(
            "--save-every", type=int, help="Steps between checkpoints (train.checkpoint_every); -1 = at the end only."
        ),
        click.option("--sample-every", type=int, help="Only -1: samples are drawn after training."),
        click.option(
            "--core-metric-every",
            "core_every",
            type=int,
            help="Any number: CORE is scored once, after the last step; -1: not at all.",
        ),
        click.option("--core-metric-max-per-task", "core_cap", type=int, help="Items per task (eval.cap); -1 = all."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def recipe_flags(preset: str | None, options: dict[str, Any]) -> tuple[str | None, dict[str, tuple[str, Any]]]:
    """The preset to start from and what the line says, {key: (flag, value)}; UsageError where it leaves something open.

    Takes its own out of a command's `options`, but for core_every, which `scored_at_the_end` needs. Nothing given: (preset, {}).
    """
    generation = options.pop("generation")
    line = {name: options.get(name) if name == "core_every" else options.pop(name) for name in OPTIONS}
    given = {name: value for name, value in line.items() if value is not None}
    if generation is not None:
        if preset is not None:
            raise UsageError(
                f"--preset {preset} and --generation {generation} both say what the rest is; give one of them"
            )
        if "depth" not in given:
            raise UsageError(
                f"--generation {generation} completes a published line: give its --depth; the run itself is --preset {generation}"
            )
    elif given and preset is None:
        raise UsageError(
            f"{OPTIONS[next(iter(given))]} leaves open which version of the training program is meant, and its defaults (batch, softcap, weight"
            f" decay) changed: add --generation {', '.join(list(DEFAULT_BATCH)[:-1])} or {list(DEFAULT_BATCH)[-1]}, or name a --preset"
        )
    flags = _defaults(generation) if generation else {}
    for name, value in given.items():
        flags.update(_FLAGS[name](value, OPTIONS[name]))
    return generation or preset, flags


def scored_at_the_end(every: int | None, recipe: Recipe) -> str | None:
    """What --core-metric-every asks for, in a sentence: None where it asks for no score, UsageError where it means nothing.

    The leaderboard's program scores every so many steps and after the last one. Here it is after the last one alone, which
    changes neither the weights nor the timed seconds.
    """
    if every is None or every == -1:
        return None
    if every < 1:
        raise UsageError(f"--core-metric-every={every} cannot be used: give a number of steps, or -1 for no score")
    steps = derive(recipe).steps
    score = "CORE" if recipe.eval.core_bundle else "the smoke score (no --core-bundle)"
    within = (
        f", not every {every:,} steps: neither the weights nor the timed seconds change by that"
        if every < steps
        else ""
    )
    return f"--core-metric-every={every}: {score} is scored once, after the last of {steps:,} steps{within}"


def _defaults(generation: str) -> dict[str, tuple[str, Any]]:
    source = f"--generation {generation}"
    values = {
        "train.param_data_ratio": DEFAULT_RATIO[generation],
        "train.total_batch_size": DEFAULT_BATCH[generation],
        "train.device_batch_size": DEFAULT_DEVICE_BATCH,
        "train.fp8": False,
        "train.checkpoint_every": 0,
    }
    return {key: (source, value) for key, value in values.items()}


def _as(key: str) -> Callable[[Any, str], dict[str, tuple[str, Any]]]:
    return lambda value, flag: {key: (flag, value)}


def _or_zero(key: str) -> Callable[[int, str], dict[str, tuple[str, Any]]]:
    """-1, the leaderboard's "off", is 0 here."""
    return lambda value, flag: {key: (flag, 0 if value == -1 else value)}


def _ratio(value: float, flag: str) -> dict[str, tuple[str, Any]]:
    return {"train.param_data_ratio": (flag, value), "train.steps": (flag, 0)}


def _no_samples(value: int, flag: str) -> dict[str, tuple[str, Any]]:
    if value != -1:
        raise UsageError(
            f"{flag}={value} cannot be used: samples are drawn when training is done (speedrun evaluate); give -1"
        )
    return {}


_FLAGS: dict[str, Callable[[Any, str], dict[str, tuple[str, Any]]]] = {
    "depth": _as("model.depth"),
    "ratio": _ratio,
    "device_batch": _as("train.device_batch_size"),
    "total_batch": _or_zero("train.total_batch_size"),
    "fp8": _as("train.fp8"),
    "save_every": _or_zero("train.checkpoint_every"),
    "sample_every": _no_samples,
    "core_every": lambda value, flag: {},
    "core_cap": _or_zero("eval.cap"),
}
