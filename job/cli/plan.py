"""`speedrun plan`: what would it need and cost?"""

from __future__ import annotations

import json
from typing import Any

import click

from job.cli.options import recipe_options

AS_PRESET = "[default: what the preset is made for]"
PRICE = "[default: the leaderboard's $3 an H100]"


@click.command()
@recipe_options("run6")
@click.option("--gpu", metavar="NAME", help=f"h100, h200, a100-80gb, or cpu for a plan without a GPU.  {AS_PRESET}")
@click.option("--gpus", type=int, metavar="N", help=f"How many, in one node.  {AS_PRESET}")
@click.option("--price", type=float, metavar="DOLLARS", help=f"What the whole node costs an hour.  {PRICE}")
@click.option(
    "--measured",
    metavar="PLACE",
    help="Take the step that `speedrun try8` measured: the bucket where it was tried, or its try8.json.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, and nothing else, on stdout.")
def plan(
    recipe: Any, gpu: str | None, gpus: int | None, price: float | None, measured: str | None, as_json: bool
) -> None:
    """What a run would need and cost, before anything is rented: steps, text, memory, minutes, dollars. Computes, and
    does nothing else.

    \b
    Example:
      speedrun plan --preset run6 --price 24
    """
    from job.plan.measured import Measured
    from job.plan.page import page
    from job.plan.quote import make_plan

    made = make_plan(recipe, gpu, gpus, price, measured=Measured.at(measured) if measured else None)
    click.echo(json.dumps(made.document(), indent=1) if as_json else page(made))
