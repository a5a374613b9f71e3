"""The leaderboard's own flags, so that a published command line can be repeated.

    torchrun --nproc_per_node=8 -m scripts.base_train -- --depth=26 --run=r --target-param-data-ratio=8.5 --fp8 ...
    speedrun pretrain --ranks 8 --generation run2        --depth=26 --run=r --target-param-data-ratio=8.5 --fp8 ...

Such a line leaves defaults open (batch, ratio, softcap, weight decay rule, text, validation tokens) that later versions
of the training program changed. `--generation` says which version is meant and fills them in; without it, and without a
preset, the line is refused. A flag that asks for something else than this program does is refused: none is ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from job.errors import UsageError
from job.recipe.derive import derive

if TYPE_CHECKING:
    from job.recipe.config import Recipe

HALF_MILLION = 524_288
DEFAULTS = {
    "run1": (10.5, HALF_MILLION),
    "run2": (10.5, HALF_MILLION),
    "run3": (10.5, 0),
    "run4": (10.5, 0),
    "run6": (12.0, 0),
}
"""ratio and tokens a step that the program of each run took when the line named none; 0 = the rule by depth"""
DEFAULT_DEVICE_BATCH = 32


class Flag(NamedTuple):
    """A published flag; `off` says what -1, the leaderboard's "off", means where the recipe's key says 0."""

    name: str
    type: type
    words: str
    key: str | None = None
    off: str | None = None


LINE = {
    "depth": Flag("--depth", int, "Transformer blocks", "model.depth"),
    "ratio": Flag("--target-param-data-ratio", float, "Tokens per scaling parameter", "train.param_data_ratio"),
    "iterations": Flag("--num-iterations", int, "Steps; count more than the ratio", "train.steps", off="by the ratio"),
    "window_pattern": Flag(
        "--window-pattern", str, "Windows of the layers, S short and L long", "model.window_pattern"
    ),
    "matrix_lr": Flag("--matrix-lr", float, "Base learning rate of Muon's matrices", "train.matrix_lr"),
    "embedding_lr": Flag("--embedding-lr", float, "That of the embeddings", "train.embedding_lr"),
    "unembedding_lr": Flag("--unembedding-lr", float, "That of the head", "train.unembedding_lr"),
    "scalar_lr": Flag("--scalar-lr", float, "That of the residual stream's factors", "train.scalar_lr"),
    "warmup_steps": Flag("--warmup-steps", int, "Steps of linear warm-up", "train.warmup_steps"),
    "warmdown_ratio": Flag(
        "--warmdown-ratio", float, "Last share of the steps, rates going down", "train.warmdown_ratio"
    ),
    "final_lr_frac": Flag("--final-lr-frac", float, "Factor of the rates at the end", "train.final_lr_frac"),
    "eval_every": Flag("--eval-every", int, "Steps between validations", "train.val_every", off="at the end only"),
    "eval_tokens": Flag("--eval-tokens", int, "Validation tokens", "train.val_tokens"),
    "device_batch": Flag("--device-batch-size", int, "Rows per micro-step and rank", "train.device_batch_size"),
    "total_batch": Flag("--total-batch-size", int, "Tokens per step", "train.total_batch_size", off="by depth"),
    "fp8": Flag("--fp8", bool, "Large matrix products in fp8", "train.fp8"),
    "save_every": Flag(
        "--save-every", int, "Steps between checkpoints", "train.checkpoint_every", off="at the end only"
    ),
    "sample_every": Flag("--sample-every", int, "Only -1: samples are drawn after training"),
    "core_every": Flag(
        "--core-metric-every", int, "Any number: CORE is scored once, after the last step; -1: not at all"
    ),
    "core_cap": Flag("--core-metric-max-per-task", int, "Items per task", "eval.cap", off="all"),
}
"""by the name of the command's parameter"""


def line_options(command: Callable) -> Callable:
    """The flags of the published lines, and --generation."""
    for parameter, flag in reversed(LINE.items()):
        words = flag.words + (f" ({flag.key})" if flag.key else "") + (f"; -1 = {flag.off}." if flag.off else ".")
        typed: dict[str, Any] = {"is_flag": True, "default": None} if flag.type is bool else {"type": flag.type}
        command = click.option(flag.name, parameter, help=words, **typed)(command)
    command = click.option("--model-tag", metavar="ID", help="The same as --run-id; counts more than --run.")(command)
    command = click.option("--run", "run_name", metavar="ID", help="The same as --run-id.")(command)
    versions = click.Choice(list(DEFAULTS))
    return click.option("--generation", type=versions, help="Whose training program the flags below are for.")(command)


def recipe_flags(preset: str | None, options: dict[str, Any]) -> tuple[str | None, dict[str, tuple[str, Any]]]:
    """The preset to start from and what the line says, {key: (flag, value)}; UsageError where it leaves something open.

    Takes its own out of a command's `options`, but for core_every, which `scored_at_the_end` needs.
    """
    generation = options.pop("generation")
    line = {name: options.get(name) if name == "core_every" else options.pop(name) for name in LINE}
    given = {name: value for name, value in line.items() if value is not None}
    if generation is not None and preset is not None:
        raise UsageError(f"--preset {preset} and --generation {generation} both say what the rest is; give one of them")
    if generation is not None and "depth" not in given:
        raise UsageError(
            f"--generation {generation} completes a published line: give its --depth; the run itself is --preset"
            f" {generation}"
        )
    if given and generation is None and preset is None:
        *most, last = DEFAULTS
        raise UsageError(
            f"{LINE[next(iter(given))].name} leaves open which version of the training program is meant, and its"
            f" defaults (batch, softcap, weight decay) changed: add --generation {', '.join(most)} or {last}, or name a"
            " --preset"
        )
    if given.get("sample_every", -1) != -1:
        raise UsageError(
            f"--sample-every={given['sample_every']} cannot be used: samples are drawn when training is done (speedrun"
            " evaluate); give -1"
        )
    flags: dict[str, tuple[str, Any]] = {}
    if generation:
        source, (ratio, batch) = f"--generation {generation}", DEFAULTS[generation]
        flags = {
            "train.param_data_ratio": (source, ratio),
            "train.total_batch_size": (source, batch),
            "train.device_batch_size": (source, DEFAULT_DEVICE_BATCH),
            "train.fp8": (source, False),
            "train.checkpoint_every": (source, 0),
        }
    for name, value in given.items():  # iterations after the ratio, which they overrule
        flag = LINE[name]
        if flag.key:
            flags[flag.key] = flag.name, 0 if flag.off and value == -1 else value
        if name == "ratio":
            flags["train.steps"] = flag.name, 0
    return generation or preset, flags


def scored_at_the_end(every: int | None, recipe: Recipe) -> str | None:
    """What --core-metric-every asks for, in a sentence; None where it asks for no score.

    The leaderboard's program scores every so many steps and after the last one. Here it is after the last one alone,
    which changes neither the weights nor the timed seconds.
    """
    if every is None or every == -1:
        return None
    if every < 1:
        raise UsageError(f"--core-metric-every={every} cannot be used: give a number of steps, or -1 for no score")
    steps = derive(recipe).steps
    score = "CORE" if recipe.eval.core_bundle else "the smoke score (no --core-bundle)"
    said = f"--core-metric-every={every}: {score} is scored once, after the last of {steps:,} steps"
    if every < steps:
        said += f", not every {every:,} steps: neither the weights nor the timed seconds change by that"
    return said
