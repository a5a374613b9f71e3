"""The options that several commands share, as decorators. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from job.cli.completion import complete_keys, complete_presets, run_id_option
from job.cli.published_line import line_options, recipe_flags
from job.console import Console
from job.errors import UsageError

PATH = click.Path(path_type=Path)


def out_option(command: Callable) -> Callable:
    words = "Where everything is written."
    return click.option("--out", type=PATH, default=Path("out"), show_default=True, metavar="DIR", help=words)(command)


MIRROR = "Mirror everything to s3://bucket/prefix (or a folder: /x, ./x), and go on from what is there."


def bucket_url_option(command: Callable, words: str = MIRROR) -> Callable:
    """The command is given `url`, or None."""
    return click.option(
        "--bucket", "url", envvar="SPEEDRUN_BUCKET", metavar="URL", help=f"{words}  [env: SPEEDRUN_BUCKET]"
    )(command)


def bucket_options(command: Callable) -> Callable:
    """Options of the commands that work with a bucket; the command is given `bucket`, ready, or None."""

    @bucket_url_option
    @click.option(
        "--bucket-wait",
        type=click.FloatRange(min=0),
        default=10.0,
        show_default=True,
        metavar="MINUTES",
        help="How long the end of a run waits for its uploads.",
    )
    @functools.wraps(command)
    def wrapped(url: str | None, bucket_wait: float, **others: Any) -> Any:
        from job.run.bucket import Bucket, check_place

        bucket = None
        elsewhere = others.get("hf") or others.get("figures") or others.get("table")
        if url is not None and not elsewhere:
            check_place(url, others["out"], strict=others.get("strict", False))
            bucket = Bucket.at(url, 60 * bucket_wait, dry=others.get("dry_run", False))
        return command(bucket=bucket, **others)

    return wrapped


def talk_options(command: Callable) -> Callable:
    """The command is given `console` instead of -q and -v."""

    @click.option("-v", "--verbose", is_flag=True, help="Say every event as well.")
    @click.option("-q", "--quiet", is_flag=True, help="Say errors only.")
    @functools.wraps(command)
    def wrapped(quiet: bool, verbose: bool, **others: Any) -> Any:
        if quiet and verbose:
            raise UsageError("-q and -v contradict each other; give one of them")
        return command(console=Console(-1 if quiet else int(verbose)), **others)

    return wrapped


def json_option(what: str) -> Callable:
    return click.option("--json", "as_json", is_flag=True, help=f"Print {what}, and nothing else, on stdout.")


result_json_option = json_option("result.json (of a dry run: the plan)")


def recipe_options(
    default_preset: str, *, published_line: bool = False, several: bool = False
) -> Callable[[Callable], Callable]:
    """The options that make a recipe, with or without the leaderboard's flags; the command is given `recipe`, or
    `recipes` where it takes several presets by their names alone."""

    named = f"Named recipe: `speedrun presets`.  [default: {default_preset}]"
    several_presets = click.argument("presets", nargs=-1, metavar="[PRESET]...", shell_complete=complete_presets)

    def decorate(command: Callable) -> Callable:
        @(line_options if published_line else lambda command: command)
        @(several_presets if several else lambda command: command)
        @click.option("--preset", metavar="NAME", shell_complete=complete_presets, help=named)
        @click.option(
            "-o",
            "overrides",
            multiple=True,
            metavar="SECTION.KEY=VALUE",
            shell_complete=complete_keys,
            help="Override one value of the recipe: `speedrun keys`; may be repeated.",
        )
        @click.option(
            "--data",
            multiple=True,
            metavar="PATH",
            help="Your text: a folder (without its subfolders) or a file; parquet, jsonl or txt; may be repeated.",
        )
        @click.option(
            "--core-bundle", metavar="PATH", help="The CORE bundle: folder, .zip, .tar.zst, or the address of one."
        )
        @functools.wraps(command)
        def wrapped(
            preset: str | None,
            overrides: tuple[str, ...],
            data: tuple[str, ...],
            core_bundle: str | None,
            presets: tuple[str, ...] = (),
            **others: Any,
        ) -> Any:
            from job.recipe.config import resolve

            flags: dict[str, tuple[str, Any]] = {}
            if published_line:
                preset, flags = recipe_flags(preset, others)
            if data:
                flags["data.source"] = ("--data", "local")
                flags["data.paths"] = ("--data", data)
            if core_bundle is not None:
                flags["eval.core_bundle"] = ("--core-bundle", core_bundle)
            if presets and preset:
                raise UsageError(f"--preset {preset} and {presets[0]} contradict each other; give one of them")
            if several:
                names = presets or (preset or default_preset,)
                return command(recipes=[resolve(name, flags, overrides) for name in names], **others)
            return command(recipe=resolve(preset or default_preset, flags, overrides), **others)

        return wrapped

    return decorate


def dry_option(command: Callable) -> Callable:
    return click.option("--dry-run", is_flag=True, help="Say what would be done, and write nothing.")(command)


def existing_runs(out: Path, run_ids: Sequence[str], bucket: Any) -> list[Path]:
    """The folders of these runs, with the results that the bucket has of them."""
    from job.run.launch import existing_run

    runs = [existing_run(out, run_id, bucket) for run_id in run_ids]
    if bucket:
        for run in runs:
            bucket.pull_results(run)
    return runs


def page_option(words: str) -> Callable:
    """The command is given `page`, for `write_page`, or None."""
    return click.option("--page", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help=words)


def write_page(page: Path, html: str) -> None:
    from job.store.sealed import atomic_write

    try:
        atomic_write(page, html.encode())
    except OSError as error:
        raise UsageError(f"--page {page} cannot be written ({error.strerror}): name another file") from None


def ranks_option(command: Callable) -> Callable:
    words = "Processes on each machine.  [default: one a GPU, else 1]"
    return click.option("--ranks", type=click.IntRange(1, 64), metavar="N", help=words)(command)


def confirm_fresh(asked: bool, preset: str, run: Path, bucket: Any, *, dry: bool) -> None:
    """Where `asked`, have a person agree that a finished or stored run is discarded (smoke's own, called so, needs
    nobody; in a dry run they would be asked).

    UsageError where they do not, or where there is no terminal to ask on.
    """
    from job.run.launch import fresh_would_discard

    discarded = None
    if asked and (preset, run.name) != ("smoke", "smoke"):
        discarded = fresh_would_discard(run, bucket)
    if discarded is None:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"--fresh would discard {discarded}: add --yes, or take another --run-id")
    if not dry and not click.confirm(f"--fresh discards {discarded}; go on?", err=True):
        raise UsageError(f"--fresh discarded nothing; take another --run-id for a new run beside {run.name}")


def run_options(command: Callable) -> Callable:
    """Options of the commands that make or continue a run."""
    name = "Name of the run; the same name goes on where it stopped.  [default: the preset's name]"
    run_id = run_id_option(name)
    discard = "Discard what this run id has and start anew; prepared data are kept."
    fresh = click.option("--fresh", is_flag=True, help=discard)
    yes = click.option("--yes", is_flag=True, help="With --fresh, discard a finished or stored run without asking.")
    talk = (talk_options, result_json_option, dry_option)
    for option in (*talk, yes, fresh, ranks_option, run_id, money_options, bucket_options, out_option):
        command = option(command)
    return command


def money_options(command: Callable) -> Callable:
    """What the run may cost (job/plan/cap.py); the command is given `limits`."""

    @click.option(
        "--max-usd",
        type=float,
        metavar="DOLLARS",
        help="Stop in time, with a checkpoint and exit code 20, so that all attempts together cost no more.",
    )
    @click.option("--max-hours", type=float, metavar="HOURS", help="The same, of hours of this machine.")
    @click.option(
        "--price",
        type=float,
        metavar="DOLLARS",
        help="What all machines of the run cost an hour.  [default: by SkyPilot's variables, where it rented them]",
    )
    @click.option(
        "--price-at-most", type=float, metavar="DOLLARS", help="The price that counts where nobody says another."
    )
    @functools.wraps(command)
    def wrapped(
        max_usd: float | None, max_hours: float | None, price: float | None, price_at_most: float | None, **others: Any
    ) -> Any:
        from job.plan.cap import Limits

        return command(limits=Limits(max_usd, max_hours, price, price_at_most), **others)

    return wrapped


def machine_options(command: Callable) -> Callable:
    """Options of the commands that train on rented machines (job/run/preflight.py)."""
    strict = "Refuse a machine that would train slowly, and a run without s3://; for machines that cost money."
    accept_slow = "With --strict, accept a machine whose GPUs, links or disk were found slow."
    allow_fa2 = "With --strict, accept FlashAttention 2 where a faster kernel is missing."
    command = click.option("--accept-slow", is_flag=True, help=accept_slow)(command)
    command = click.option("--allow-fa2", is_flag=True, help=allow_fa2)(command)
    return click.option("--strict", is_flag=True, help=strict)(command)
