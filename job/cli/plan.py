"""`speedrun plan`: what would it need and cost?"""

from __future__ import annotations

import json
from typing import Any

import click

from job.cli.options import json_option, recipe_options

AS_PRESET = "[default: what the preset is made for]"
PRICE = "[default: the leaderboard's $3 an H100]"


@click.command()
@recipe_options("run6", several=True)
@click.option("--gpu", metavar="NAME", help=f"h100, h200, a100-80gb, or cpu for a plan without a GPU.  {AS_PRESET}")
@click.option("--gpus", type=int, metavar="N", help=f"How many, in one node.  {AS_PRESET}")
@click.option("--price", type=float, metavar="DOLLARS", help=f"What the whole node costs an hour.  {PRICE}")
@click.option(
    "--measured",
    metavar="PLACE",
    help="Take the step that was measured: the bucket with a trial of sky/try8.yaml or sky/try.yaml, or a try8.json.",
)
@json_option("the plan as JSON")
def plan(
    recipes: list[Any], gpu: str | None, gpus: int | None, price: float | None, measured: str | None, as_json: bool
) -> None:
    """What a run would need and cost, before anything is rented: steps, text, memory, minutes, dollars. Computes, and
    does nothing else. Several presets stand side by side.

    \b
    Example:
      speedrun plan run6 --price 24
      speedrun plan run6 fast
    """
    from job.plan.measured import Measured
    from job.plan.page import page, side_by_side
    from job.plan.quote import make_plan

    found = Measured.at(measured) if measured else None
    made = [make_plan(recipe, gpu, gpus, price, measured=found) for recipe in recipes]
    if as_json:
        documents = [each.document() for each in made]
        click.echo(json.dumps(documents if len(made) > 1 else documents[0], indent=1))
    else:
        click.echo(side_by_side(made) if len(made) > 1 else page(made[0]))
