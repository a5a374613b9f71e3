"""`speedrun doctor`: can this machine be trusted with a run?"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import click

from job.cli.completion import run_id_option
from job.cli.options import bucket_url_option, json_option, machine_options, out_option, ranks_option, recipe_options

PATIENCE = 10.0
"""seconds for which a call of the bucket is tried again: all takes less than a minute"""


@click.command()
@recipe_options("run6")
@out_option
@bucket_url_option
@machine_options
@ranks_option
@click.option("--price", type=float, metavar="DOLLARS", help="What the node costs an hour: slowness is priced by it.")
@click.option(
    "--deep",
    is_flag=True,
    help="Compute and compare on the GPU as well: attention, fp8's products and loss (a minute).",
)
@run_id_option("With --bucket: the run beside whose record doctor.json is put.  [default: the preset's name]")
@json_option("what was found as JSON")
def doctor(
    recipe: Any,
    out: Path,
    url: str | None,
    strict: bool,
    allow_fa2: bool,
    accept_slow: bool,
    ranks: int | None,
    price: float | None,
    deep: bool,
    run_id: str | None,
    as_json: bool,
) -> None:
    """What this machine is and whether a run could be trusted to it, a line a check, with its remedy; ends with 10
    where it could not.

    \b
    Example:
      speedrun doctor --preset run6 --bucket s3://bucket/prefix
    """
    from job.machine import container

    container.check_temporary_folder()  # torch wants one as it is imported
    from job.errors import PreflightError, StorageError
    from job.machine.host import gpu_count
    from job.plan.prices import price_here
    from job.run import doctor as report
    from job.run.bucket import check_place
    from job.run.examination import examine
    from job.run.launch import run_folder
    from job.run.nodes import Nodes
    from job.store.fence import run_key

    run_id = run_folder(out, run_id or recipe.preset).name
    ranks = Nodes.here(ranks, run_id, otherwise=0).ranks
    if url is not None:
        check_place(url, out, strict=strict)
    store, bucket_refused = _opened(url)
    known = price_here(price, None, gpus=gpu_count())
    price = known.hour if known else None
    findings = examine(recipe, out, store, ranks=ranks, price=price, bucket_refused=bucket_refused)
    accepted = {"strict": strict, "allow_fa2": allow_fa2, "accept_slow": accept_slow}
    document = report.look(recipe, findings, ranks=ranks, deep=deep, **accepted)
    text = json.dumps(document, indent=1)
    click.echo(text if as_json else report.page(document))
    refused = PreflightError(document["refused"]) if document["refused"] else None
    if store is not None:
        with contextlib.suppress(*[StorageError] * bool(refused)):  # that the store fails is a line then
            store.put(f"{run_key(run_id)}/doctor.json", text.encode() + b"\n", "application/json")
    if refused:
        raise refused


def _opened(url: str | None) -> tuple[Any, str]:
    """The store at `url`, ready, or None and why it cannot be used."""
    from job.errors import StorageError, UsageError
    from job.run.bucket import Bucket

    try:
        return Bucket.at(url, patience=PATIENCE).store if url is not None else None, ""
    except (UsageError, StorageError) as error:
        return None, str(error)
