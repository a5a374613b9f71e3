"""`speedrun compare`: in what do two runs differ, and what may be concluded?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from job.cli.completion import complete_runs
from job.cli.options import bucket_options, existing_runs, json_option, out_option, page_option, write_page


@click.command()
@click.argument("a", shell_complete=complete_runs)
@click.argument("b", shell_complete=complete_runs)
@page_option("Write it as HTML, too, with the curves.")
@out_option
@bucket_options
@json_option("JSON")
def compare(a: str, b: str, page: Path | None, out: Path, bucket: Any, as_json: bool) -> None:
    """Two runs side by side, paired item by item: tasks, bits per byte, recipe, clocks, and what may be concluded.

    \b
    Example:
      speedrun compare smoke smoke-longer --page compared.html
    """
    from job.report import compare as comparison

    document, records = comparison.compare(*existing_runs(out, (a, b), bucket))
    if page:
        write_page(page, comparison.html(document, records))
    click.echo(json.dumps(document, indent=1) if as_json else "\n".join(comparison.comparison_lines(document)))
