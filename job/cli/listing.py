"""`speedrun list`, `status`, `presets`, `keys`: what is there?"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from job.cli.completion import complete_runs
from job.cli.options import bucket_url_option, json_option, out_option
from job.console import wrapped

NARROWEST = 40
"""columns that a long last cell needs to stand in its row; with fewer it goes below"""


def in_bucket_option(command: Callable) -> Callable:
    return bucket_url_option(command, "Look in s3://bucket/prefix (or a folder: /x, ./x) instead of --out.")


def _bucket_at(url: str, out: Path) -> Any:
    """That of a command that only reads there."""
    from job.run.bucket import Bucket, check_place
    from job.store import open_store

    check_place(url, out)
    return Bucket(open_store(url), wait=0)


@click.command("list")
@out_option
@in_bucket_option
@json_option("JSON")
def list_(out: Path, url: str | None, as_json: bool) -> None:
    """The runs here, or in a bucket. Of each: state, steps, bits per byte, score, dollars, and how the newest attempt
    ended; what a bucket says of a run that goes on is a minute old.

    \b
    Example:
      speedrun list --bucket s3://bucket/prefix
    """
    from job.report import overview

    if url is None:
        rows = overview.rows_here(out, time.time())
    else:
        bucket = _bucket_at(url, out)
        rows = overview.rows_there(bucket.store, bucket.run_ids(), time.time())
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    elif rows:
        _print([overview.HEAD, *map(overview.cells, rows)])
    else:
        click.echo(f"no runs {'below ' + str(out) if url is None else 'in ' + url}; begin one with: speedrun run")


@click.command()
@click.argument("run_id", metavar="RUN", shell_complete=complete_runs)
@out_option
@in_bucket_option
@json_option("what result.json would be now")
def status(run_id: str, out: Path, url: str | None, as_json: bool) -> None:
    """One run on a screen. How far it is, its figures, what went wrong, what is safe, how to go on; writes nothing, and
    with a bucket needs nothing of the run on this machine.

    \b
    Example:
      speedrun status run6 --bucket s3://bucket/prefix
    """
    from job.report.overview import screen
    from job.run.launch import existing_run, run_folder

    if url is None:
        result, said = screen(existing_run(out, run_id), None, time.time())
    else:
        run_folder(out, run_id)
        bucket = _bucket_at(url, out)
        with tempfile.TemporaryDirectory(prefix="speedrun-") as folder:
            result, said = screen(bucket.pull_run(Path(folder), run_id), bucket.store.url, time.time())
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    for line in said:
        click.echo("\n".join(wrapped(line, _width())) if line[:1].strip() else line)


@click.command()
@json_option("JSON")
def presets(as_json: bool) -> None:
    """The named recipes, what for. Of each: the machine that it is made for, and minutes and dollars by the plan.

    \b
    Example:
      speedrun presets
    """
    from job.plan.quote import make_plan
    from job.recipe.config import preset_header, preset_names, resolve

    rows: list[dict[str, Any]] = []
    for name in preset_names():
        header, plan = preset_header(name), make_plan(resolve(name))
        minutes = plan.on_node.minutes if plan.on_node else sorted(plan.cpu_minutes.values())
        dollars, evidence = plan.on_node and plan.on_node.dollars, plan.recipe.evidence
        row = {"preset": name, "machine": header.machine, "minutes": minutes, "dollars": dollars}
        rows.append(row | {"evidence": evidence, "for": header.purpose})
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    shown = [{**row, "minutes": _span(row["minutes"]), "dollars": _span(row["dollars"])} for row in rows]
    _print([list(rows[0]), *(list(row.values()) for row in shown)])
    said = (
        "Minutes and dollars are estimated, from boot to teardown; on CPUs the training, on a server to two slow cores."
    )
    click.echo("\n".join(wrapped(f"{said} `speedrun plan PRESET` says by what.", _width())))


@click.command()
@json_option("JSON")
def keys(as_json: bool) -> None:
    """The keys of a recipe. Of each, for `-o section.key=value`: its type, its default, what it means and takes.

    \b
    Example:
      speedrun keys
    """
    from job.recipe.config import SECTIONS

    rows = [
        {
            "key": f"{name}.{field.name}",
            "type": "list" if str(field.type).startswith("tuple") else field.type,
            "default": field.default,
            "meaning": field.metadata["help"],
            "values": field.metadata.get("give"),
        }
        for name, section in SECTIONS.items()
        for field in dataclasses.fields(section)
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    head = ["key", "type", "default", "meaning; what it takes"]
    meanings = ["; ".join(filter(None, (row["meaning"], row["values"]))) for row in rows]
    defaults = [json.dumps(row["default"]) for row in rows]
    cells = [[row["key"], row["type"], value, said] for row, value, said in zip(rows, defaults, meanings, strict=True)]
    _print([head, *cells])


LISTS = (keys, list_, presets, status)


def _span(ends: Sequence[float] | None) -> str:
    """Two numbers, as one where they round to the same."""
    return "free" if ends is None else " to ".join(dict.fromkeys(f"{end:,.{int(end < 9.95)}f}" for end in ends))


def _width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def _print(rows: Sequence[Sequence[str]]) -> None:
    """A table with its head; the last column takes what the terminal leaves, or the lines below."""
    click.echo("\n".join(table(rows, _width())))


def table(rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    indent = sum(widths) + 2 * len(widths)
    for *cells, last in rows:
        line = "".join(f"{cell:<{size + 2}}" for cell, size in zip(cells, widths, strict=True))
        room = width - indent
        if len(last) > room and room < NARROWEST:
            yield line.rstrip()
            yield from (f"    {part}" for part in wrapped(last, width - 4))
        else:
            first, *more = wrapped(last, max(room, 1)) or [""]
            yield f"{line}{first}".rstrip()
            yield from (" " * indent + rest for rest in more)
