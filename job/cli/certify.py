"""`speedrun certify`: what do these runs show?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from job.cli.completion import complete_runs
from job.cli.options import bucket_options, existing_runs, json_option, out_option, page_option, write_page
from job.errors import UsageError


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...", shell_complete=complete_runs)
@click.option("--core", "figures", type=float, multiple=True, metavar="X", help="A CORE instead of a run; repeat it.")
@click.option("--sd", type=float, metavar="S", help="The standard deviation from run to run, where it is known.")
@click.option("--table", metavar="PLACE", help="Collect the results below a folder or s3://... into a leaderboard.")
@page_option("With --table: write it as HTML, too.")
@out_option
@bucket_options
@json_option("JSON")
def certify(
    runs: tuple[str, ...],
    figures: tuple[float, ...],
    sd: float | None,
    table: str | None,
    page: Path | None,
    out: Path,
    bucket: Any,
    as_json: bool,
) -> None:
    """Say what runs of one recipe show about GPT-2 XL's CORE: mean, interval, p, and whether that is "beats".

    \b
    Example:
      speedrun certify run6 run6-b run6-c
      speedrun certify --core 0.2729 --core 0.2626
    """
    if bool(runs) + bool(figures) + bool(table) != 1:
        raise UsageError(
            "say what is certified: RUN..., or --core X for each figure, or --table PLACE for a leaderboard"
        )
    if page and not table:
        raise UsageError("--page is for --table: give both")
    if table:
        _table(table, page, as_json)
        return
    from job.report import certify as statistics

    if twice := [run for run in runs if runs.count(run) > 1]:
        raise UsageError(f"run {twice[0]} is named twice: a run counts once")
    scored = [statistics.Run(figure) for figure in figures]
    scored += [statistics.load(path) for path in existing_runs(out, runs, bucket)]
    document = statistics.certificate(scored, sd)
    click.echo(json.dumps(document, indent=1) if as_json else "\n".join(statistics.certificate_lines(document)))


def _table(place: str, page: Path | None, as_json: bool) -> None:
    from job.report.page import fill
    from job.report.table import leaderboard

    document = leaderboard(place)
    if page:
        write_page(page, fill("table.html.j2", document))
    click.echo(json.dumps(document, indent=1) if as_json else fill("table.md.j2", document).rstrip())
