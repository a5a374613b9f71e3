"""`speedrun rehearse`: is anything lost when processes and machines go away?"""

from __future__ import annotations

from pathlib import Path

import click

from job.cli.options import out_option, ranks_option, talk_options
from job.console import Console
from job.errors import DataError


@click.command()
@out_option
@click.option("--kills", type=click.IntRange(1), default=30, show_default=True, help="How often something is hit.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the moments and the victims.")
@click.option("--bucket", metavar="URL", help="Mirror the disturbed runs there, and lose whole machines too.")
@ranks_option
@talk_options
def rehearse(out: Path, kills: int, seed: int, bucket: str | None, ranks: int | None, console: Console) -> None:
    """Run the whole pipeline with a toy recipe, hit it at random moments until it is done, and compare it with a run
    that nothing disturbed: do it before you rent anything.

    \b
    Example:
      speedrun rehearse --kills 30 --out rehearsal --ranks 2 --bucket s3://bucket/rehearsal
    """
    from job.run.launch import check_writable
    from job.run.rehearse import Rehearsal

    check_writable(out)
    rehearsal = Rehearsal(out, seed=seed, ranks=ranks or 1, bucket=bucket, console=console)
    if differing := rehearsal.run(kills):
        raise DataError(f"after {len(rehearsal.hits)} kills the run is not the same: {'; '.join(differing)}")
    click.echo(
        f"nothing was lost: {len(rehearsal.hits)} kills, {rehearsal.attempts} attempts; weights, losses, bits per byte,"
        " scores and samples are those of the run that nothing disturbed"
    )
