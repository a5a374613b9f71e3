"""The command line: thin commands over `job.run.launch`.

Nothing heavy is imported before a command runs: `--help` answers without torch.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import click

from job.cli.certify import certify
from job.cli.compare import compare
from job.cli.completion import run_id_option
from job.cli.doctor import doctor
from job.cli.inference import export, import_, play, sample
from job.cli.listing import LISTS
from job.cli.options import (
    PATH,
    bucket_options,
    confirm_fresh,
    dry_option,
    existing_runs,
    json_option,
    machine_options,
    out_option,
    ranks_option,
    recipe_options,
    result_json_option,
    run_options,
    talk_options,
)
from job.cli.plan import plan
from job.cli.published_line import scored_at_the_end
from job.cli.refusals import EPILOG, Commands
from job.cli.rehearse import rehearse
from job.cli.try8 import try8
from job.console import Console
from job.errors import UsageError

STAGES = ("prepare", "pretrain", "evaluate", "report")


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gpt2-speedrun", prog_name="speedrun")
def main() -> None:
    """Train a GPT-2-grade model and score it: prepare, pretrain, evaluate, report, or `run` for all of it.

    \b
    Example:
      speedrun smoke          the whole pipeline on a CPU, in minutes
    """


for command in (*LISTS, certify, compare, doctor, export, import_, plan, play, rehearse, sample, try8):
    main.add_command(command)


@main.command()
@recipe_options("smoke")
@run_options
@machine_options
@click.option("--export", "with_export", is_flag=True, help="At the end also leave the model as transformers loads it.")
@click.option(
    "--from", "parent", metavar="RUN", help="Go on with this run's last checkpoint and recipe, as another run."
)
@click.option("--at", type=click.IntRange(min=1), metavar="STEP", help="With --from: the checkpoint before this step.")
def run(with_export: bool, parent: str | None, at: int | None, **options: Any) -> None:
    """All stages, one after the other; what is sealed is not done again.

    \b
    Example:
      speedrun run --preset smoke --data my-texts/ --run-id mine
      speedrun run --from mine --run-id mine-longer -o train.steps=480
    """
    if at and not parent:
        raise UsageError("--at names a checkpoint of the run that --from names: give --from RUN as well")
    options["origin"] = None
    if parent:
        from job.run.go_on import begin

        given = {key: options[key] for key in ("out", "run_id", "recipe", "bucket", "fresh")}
        options["recipe"], options["origin"], options["note"] = begin(parent, at, **given)
    _run((*STAGES, "export") if with_export else STAGES, **options)


@main.command()
@recipe_options("smoke")
@run_options
def smoke(**options: Any) -> None:
    """The whole pipeline on a CPU in minutes, from text that Python itself carries.

    \b
    Example:
      speedrun smoke --fresh
    """
    _run(STAGES, **options)


@main.command()
@recipe_options("smoke")
@out_option
@bucket_options
@talk_options
@dry_option
def prepare(recipe: Any, out: Path, bucket: Any, console: Console, dry_run: bool) -> None:
    """Tokenizer and packed rows, sealed below OUT/prepared; runs with the same data share them.

    \b
    Example:
      speedrun prepare --preset smoke --data my-texts/
    """
    from job.run import launch
    from job.run.dry_run import plan_of, text_of
    from job.run.prepare_alone import prepare_alone

    launch.check_text(out, recipe)
    if dry_run:
        click.echo(text_of(plan_of(out, None, recipe, ("prepare",), ranks=1, bucket=bucket)))
        return
    prepare_alone(out, recipe, console=console, bucket=bucket)


@main.command()
@recipe_options("smoke", published_line=True)
@run_options
@machine_options
def pretrain(
    core_every: int | None, run_id: str | None, run_name: str | None, model_tag: str | None, **options: Any
) -> None:
    """Train the model (preparing its data first where that is not done). Takes the leaderboard's own flags; with
    --core-metric-every the model is scored when it is trained.

    \b
    Example:
      speedrun pretrain --preset smoke -o train.steps=100
      speedrun pretrain --generation run2 --depth=26 --target-param-data-ratio=8.5 --device-batch-size=16 --fp8
      --dry-run
    """
    scoring = scored_at_the_end(core_every, options["recipe"])
    stages = STAGES if scoring else STAGES[:2]
    _run(stages, run_id=run_id or model_tag or run_name, note=scoring, **options)


@main.command()
@out_option
@bucket_options
@run_id_option("The run whose finished model is scored.")
@click.option("--hf", type=PATH, metavar="DIR", help="Score this local Hugging Face model instead of a run's.")
@click.option(
    "--core-bundle",
    metavar="PATH",
    help="The CORE bundle: folder, .zip, .tar.zst, or the address of one.  [default: what the run's recipe says; with"
    " --hf, the published one]",
)
@click.option(
    "-o", "overrides", multiple=True, metavar="eval.KEY=VALUE", help="Override one value of the recipe's eval section."
)
@ranks_option
@dry_option
@result_json_option
@talk_options
def evaluate(
    out: Path,
    bucket: Any,
    run_id: str | None,
    hf: Path | None,
    core_bundle: str | None,
    overrides: tuple[str, ...],
    ranks: int | None,
    dry_run: bool,
    as_json: bool,
    console: Console,
) -> None:
    """Score a finished model: bits per byte, tasks, samples; then its report. Evaluations stand side by side; the run's
    score is the fullest of them (CORE before a smoke score, more items before fewer).

    \b
    Example:
      speedrun evaluate --run-id smoke --core-bundle core_bundle.zip -o eval.cap=20
      speedrun evaluate --hf models/gpt2 -o eval.cap=1000
    """
    from job.evaluation import rescore
    from job.evaluation.ledger import Ledger, newest, table_lines
    from job.run import launch
    from job.run.dry_run import plan_of, shown
    from job.run.nodes import nodes_here

    if (run_id is None) == (hf is None):
        raise UsageError("say what is scored: --run-id ID for a run's model, or --hf DIR for another")
    nodes = nodes_here(ranks, run_id or "hf")
    if not nodes.is_first:
        console.say("the first node evaluates; there is nothing to do on this one")
        return
    nodes = nodes.alone()
    if hf is not None:
        _evaluate_hf(out, hf, core_bundle, overrides, nodes.ranks, dry_run, as_json, console)
        return

    assert run_id is not None
    (run_path,) = existing_runs(out, [run_id], None if dry_run else bucket)
    recipe = rescore.recipe_for_evaluation(run_path, core_bundle, overrides)
    stages = ("prepare", *STAGES[2:]) if bucket else STAGES[2:]  # which pulls what this machine lacks
    with rescore.asking(run_path, recipe, launch.recipe_document(recipe, run_id)) as asked:
        kept = ["the run has a fuller score, which stays its own; this one goes beside it"] if asked.is_lesser else []
        if dry_run:
            planned = plan_of(out, run_path, recipe, STAGES[2:], ranks=nodes.ranks)
            click.echo(shown(planned, kept, as_json=as_json))
            return
        launch.execute(out, run_path, recipe, stages, console=console, nodes=nodes, asked=asked, bucket=bucket)
    if not as_json and console.verbosity >= 0:
        click.echo("\n".join([*table_lines(Ledger.open(newest(run_path / "eval"))), *kept, ""]))
    _show_result(run_path, as_json, console)


@main.command()
@out_option
@bucket_options
@run_id_option("The run that is reported.", required=True)
@json_option("result.json")
@talk_options
def report(out: Path, bucket: Any, run_id: str, as_json: bool, console: Console) -> None:
    """Write the page and result.json of a run, finished or not.

    \b
    Example:
      speedrun report --run-id smoke --json
    """
    from job.report.render import write_report

    (run_path,) = existing_runs(out, [run_id], bucket)
    write_report(run_path)
    _show_result(run_path, as_json, console)


@main.command("wandb-sync")
@out_option
@run_id_option("The run that wandb is to have, finished or not.", required=True)
def wandb_sync(out: Path, run_id: str) -> None:
    """Send wandb what it has not got yet of a run that was offline, or that lost wandb on the way.

    \b
    Example:
      speedrun wandb-sync --run-id mine
    """
    from job.run import launch, wandb_client

    wandb_client.sync(launch.existing_run(out, run_id), Console())


def _run(
    stages: tuple[str, ...],
    recipe: Any,
    out: Path,
    bucket: Any,
    run_id: str | None,
    ranks: int | None,
    fresh: bool,
    dry_run: bool,
    as_json: bool,
    console: Console,
    limits: Any,
    yes: bool,
    strict: bool = False,
    allow_fa2: bool = False,
    accept_slow: bool = False,
    note: str | None = None,
    origin: dict[str, Any] | None = None,
) -> None:
    """`note`: a sentence to say first of all. origin: what checkpoint of another run a new one goes on from."""
    from job.machine import container

    container.check_temporary_folder()  # torch wants one as it is imported
    from job.machine.host import gpu_count
    from job.run import launch, preflight
    from job.run.admission import check_machine
    from job.run.dry_run import show_plan
    from job.run.join import join
    from job.run.nodes import nodes_here
    from job.run.supervise import ignore_signals

    run_id = run_id or recipe.preset
    nodes = nodes_here(ranks, run_id, recipe.preset)
    notes = [*([note] if note else []), *preflight.about_comm(recipe, nodes.world_size)]
    asked = fresh and not yes and nodes.is_first
    confirm_fresh(asked, recipe.preset, launch.run_folder(out, run_id), bucket, dry=dry_run)
    cap = limits.here(gpu_count(), nodes.count)
    begin = {"fresh": fresh, "ranks": nodes.world_size, "bucket": bucket, "origin": origin}
    checks = {"strict": strict, "allow_fa2": allow_fa2, "accept_slow": accept_slow, "cap": cap, "console": console}
    check = functools.partial(check_machine, recipe, out, run_id, notes, nodes=nodes, bucket=bucket, **checks)
    if dry_run:
        show_plan(out, run_id, recipe, stages, notes, check, cap=cap, as_json=as_json, **begin)
        return
    quote = check()
    for sentence in notes:
        console.say(sentence)
    if not nodes.is_first:
        join(out, run_id, recipe, fresh=fresh, console=console, nodes=nodes, bucket=bucket)
        return
    run_path = launch.open_run(out, run_id, recipe, **begin)
    given = {"console": console, "nodes": nodes, "bucket": bucket, "fresh": fresh, "cap": cap, "quote": quote}
    launch.execute(out, run_path, recipe, stages, **given)
    ignore_signals()  # all is sealed
    if "report" in stages:
        _show_result(run_path, as_json, console)


def _evaluate_hf(
    out: Path,
    folder: Path,
    core_bundle: str | None,
    overrides: tuple[str, ...],
    ranks: int,
    dry_run: bool,
    as_json: bool,
    console: Console,
) -> None:
    from job.evaluation.ledger import table_lines
    from job.run import hf_launch

    asked = hf_launch.options(core_bundle, overrides)
    hf_launch.check(folder)
    if dry_run:
        answers, bundle = str(hf_launch.folder_of(out, folder)), asked.core_bundle
        planned = {"model": str(folder), "core_bundle": bundle, "cap": asked.cap or None, "answers": answers}
        items = f"at most {asked.cap:,} items a task" if asked.cap else "all items"
        said = f"{folder}: {items} of {bundle}; answers below {answers}"
        click.echo(json.dumps(planned, indent=1) if as_json else said)
        return
    ledger = hf_launch.evaluate(out, folder, asked, ranks=ranks, console=console)
    if as_json:
        click.echo(json.dumps(ledger.as_dict(), indent=1))
    elif console.verbosity >= 0:
        page = hf_launch.folder_of(out, folder) / "report" / "report.html"
        click.echo("\n".join([*table_lines(ledger), f"page  {page}"]))


def _show_result(run_path: Path, as_json: bool, console: Console) -> None:
    from job.report.words import summary_lines

    text = (run_path / "report" / "result.json").read_text(encoding="utf-8")
    if as_json:
        click.echo(text, nl=False)
    elif console.verbosity >= 0:
        click.echo("\n".join(summary_lines(json.loads(text), run_path / "report" / "report.html")))
