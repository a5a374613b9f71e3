"""Commands for a finished model: export, import, sample, play."""

from __future__ import annotations

import functools
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from job.cli.completion import run_id_option
from job.cli.options import PATH, bucket_options, out_option
from job.errors import UsageError


def model_options(command: Callable) -> Callable:
    """Options that say which model: `run_id`, `model`, `out` and `bucket`."""
    address = "A run's folder, a checkpoint, an export, or s3://bucket/prefix/runs/ID (also with /export behind it)."
    command = click.option("--model", metavar="PATH", help=address)(command)
    command = run_id_option("The run whose newest model is meant.")(command)
    return out_option(bucket_options(command))


def sampling_options(command: Callable) -> Callable:
    """The command is given `sampling`, and `max_tokens`."""
    options = (
        click.option("--temperature", type=float, default=0.8, show_default=True, help="0 takes the most probable."),
        click.option("--top-k", type=int, metavar="K", help="Draw among the K most probable tokens."),
        click.option("--top-p", type=float, default=1.0, help="Among the most probable that together have this much."),
        click.option("--min-p", type=float, default=0.0, help="Among those with this share of the best's probability."),
        click.option("--seed", type=int, default=0, show_default=True, help="Equal seeds draw equal texts."),
    )

    @functools.wraps(command)
    def wrapped(temperature: float, top_k: int | None, top_p: float, min_p: float, seed: int, **others: Any) -> Any:
        from model.config import ConfigError
        from model.generate import Sampling

        try:
            sampling = Sampling(temperature, top_k, top_p, min_p, seed)
        except ConfigError as error:
            raise UsageError(f"--{str(error).replace('_', '-', 1)}") from None
        return command(sampling=sampling, **others)

    decorated: Callable = wrapped
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


license_option = click.option(
    "--license", default="other", show_default=True, help="The model card's licence, as the Hub spells them."
)


@click.command()
@click.argument("prompt", required=False)
@model_options
@click.option("--file", type=PATH, metavar="PATH", help="Take the prompt from this file.")
@sampling_options
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens of a continuation.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
@click.option("--number", type=click.IntRange(1, 256), default=1, show_default=True, help="How many continuations.")
def sample(
    prompt: str | None, out: Path, bucket: Any, run_id: str | None, model: str | None, file: Path | None, **asked: Any
) -> None:
    """Continue a text: PROMPT, a file, what comes on stdin, or line by line what you type.

    \b
    Example:
      speedrun sample --run-id smoke Python
      speedrun sample --model out/runs/smoke/export --temperature 0 --stop . def
    """
    if prompt is not None and file is not None:
        raise UsageError("give the prompt itself or --file, not both")
    from job.inference.sample import TextModel
    from job.run.models import find_model

    loaded = TextModel.load(find_model(out, run_id, model, bucket))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if file is not None:
            _continue(loaded, _read(f"--file {file}", lambda: file.read_text(encoding="utf-8")), **asked)
        elif prompt is not None:
            _continue(loaded, prompt, **asked)
        elif not sys.stdin.isatty():
            _continue(loaded, _read("stdin", sys.stdin.read), **asked)
        else:
            click.echo("Type the beginning of a text; Ctrl-D ends.", err=True)
            while True:
                try:
                    _continue(loaded, input("> "), **asked)
                except UsageError as error:
                    click.echo(str(error), err=True)
    except (EOFError, KeyboardInterrupt):
        click.echo("", err=True)


def _read(name: str, read: Callable[[], str]) -> str:
    try:
        return read()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} cannot be read as UTF-8 text ({error})") from None


def _continue(loaded: Any, prompt: str, number: int, **asked: Any) -> None:
    """The first continuation as it comes, the others when all have come."""

    def write(text: str) -> None:
        click.echo(text, nl=False)
        sys.stdout.flush()

    loaded.ids(prompt)
    if number > 1:
        click.echo(f"--- 1 of {number}")
    write(prompt)
    texts, speed = loaded.continuations(prompt, number=number, write=write, **asked)
    click.echo()
    for count, text in enumerate(texts[1:], 2):
        click.echo(f"--- {count} of {number}\n{prompt}{text}")
    click.echo(speed, err=True)


@click.command()
@model_options
@click.option("--to", type=PATH, metavar="DIR", help="The folder.  [default: export in the run's folder]")
@license_option
@click.option("--hub", metavar="USER/NAME", help="Upload it there too, privately where it is new (HF_TOKEN).")
def export(
    out: Path, bucket: Any, run_id: str | None, model: str | None, to: Path | None, license: str, hub: str | None
) -> None:
    """A folder that transformers loads, compared with the model before it is called done.

    \b
    Example:
      speedrun export --run-id smoke --license mit
    """
    from job.inference import export as exporting
    from job.inference.sources import open_source
    from job.run.launch import check_writable
    from job.run.models import find_model
    from job.store.fence import run_key
    from job.store.stores import push_sealed

    source = open_source(find_model(out, run_id, model, bucket))
    if to is None and source.run is None:
        raise UsageError("this model is of no run: say where its export goes with --to DIR")
    target = to or source.run / "export"  # type: ignore[operator]
    check_writable(target, "--to" if to else "--out")
    if to:
        exporting.check_target(to)
    sealed = exporting.export(source, target, license)
    if bucket and source.run and to is None:
        push_sealed(bucket.store, f"{run_key(source.run.name)}/export", target)
    click.echo(_said(sealed))
    if hub:
        click.echo(f"uploaded to {exporting.push_to_hub(target, hub)}")


def _said(sealed: Any) -> str:
    checked = sealed.facts["checked"]
    return (
        f"{sealed.path}: {sealed.facts['bytes'] / 1e6:,.1f} MB, read back: the same bits, logits within"
        f" {checked['logits']} (fp32, {checked['tokens']} tokens), the same greedy text"
    )


@click.command("import")
@click.argument("folder", type=PATH)
@click.option(
    "--tokenizer",
    required=True,
    type=PATH,
    metavar="PATH",
    help="The tokenizer that it was trained with: tokenizer.pkl, its folder, or a sealed tokenizer of ours.",
)
@click.option("--step", type=int, metavar="N", help="Of several checkpoints this one.  [default: the newest]")
@click.option("-o", "switches", multiple=True, metavar="KEY=VALUE", help="What the files do not say, e.g. softcap=20.")
@click.option("--to", type=PATH, metavar="DIR", help="The folder.  [default: OUT/imported/NAME]")
@license_option
@out_option
def import_(
    folder: Path, tokenizer: Path, step: int | None, switches: tuple[str, ...], to: Path | None, license: str, out: Path
) -> None:
    """A checkpoint of the leaderboard's own program (model_*.pt, meta_*.json) as an export of ours: for sample, play,
    and evaluate --hf. Weights only; no code in a pickle is run.

    \b
    Example:
      speedrun import base_checkpoints/d24 --tokenizer tokenizer/
    """
    from job.inference import export as exporting
    from job.inference.leaderboard import open_leaderboard
    from job.inference.sources import SHAPE_KEYS
    from job.run.launch import check_writable

    values = {}
    for switch in switches:
        key, _, value = switch.partition("=")
        if key not in SHAPE_KEYS:
            raise UsageError(f"-o {switch} cannot be used: there are {', '.join(SHAPE_KEYS)}")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    source = open_leaderboard(folder, tokenizer, step, values)
    target = to or out / "imported" / folder.resolve().name
    check_writable(target, "--to" if to else "--out")
    if to:
        exporting.check_target(to)
    click.echo(_said(exporting.export(source, target, license)))


@click.command()
@model_options
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0 takes any that is free."
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="0.0.0.0 in a container, behind docker run -p 127.0.0.1:..."
)
def play(out: Path, bucket: Any, run_id: str | None, model: str | None, port: int, host: str) -> None:
    """A page in your browser: type, watch the model go on, see what else it might have said, go on from there.

    \b
    Example:
      speedrun play --run-id smoke
    """
    from job.inference.play import Player
    from job.inference.sample import TextModel
    from job.run.models import find_model

    player = Player(TextModel.load(find_model(out, run_id, model, bucket)), host, port)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    click.echo(f"open {player.link}\nCtrl-C ends.")
    try:
        player.serve_forever()
    except KeyboardInterrupt:
        click.echo("", err=True)
