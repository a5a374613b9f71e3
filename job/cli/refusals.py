"""What is said to a command line that cannot be used: one sentence with the remedy, and the code of job/errors.py.

click's own errors (no such option, a missing argument, a wrong type) read as the program's.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import click

from job.errors import MEANING, ExitCode, SpeedrunError, UsageError
from job.recipe import names

EPILOG = (
    "\b\nExit codes:\n"
    + "\n".join(f"  {int(code):>2}  {meaning}" for code, meaning in MEANING.items())
    + '\n\n\b\nCompletion (presets, keys, runs):\n  eval "$(_SPEEDRUN_COMPLETE=bash_source speedrun)"    or zsh_source'
)
COMMANDS = {
    "benchmark": "plan, doctor or try8",
    "chat": "sample or play",
    "config": "keys, or any command's --dry-run",
    "cost": "plan",
    "delete": "no command: delete the folder out/runs/RUN",
    "download": "prepare",
    "estimate": "plan",
    "eval": "evaluate",
    "generate": "sample",
    "help": "--help, of speedrun and of each command",
    "info": "status",
    "launch": "run on this machine, and sky launch sky/speedrun.yaml on a rented one",
    "logs": "status; the lines are in out/runs/RUN/logs",
    "ls": "list",
    "resume": "run: the same command goes on where it stopped",
    "score": "evaluate",
    "serve": "play",
    "show": "status",
    "stop": "no command: Ctrl-C or SIGTERM ends a run with a checkpoint",
    "tokenize": "prepare",
    "train": "run, or pretrain without the score",
    "upload": "run --bucket, or export --hub",
    "version": "--version",
}
"""what commands are called in other tools, and what does it here"""
OPTIONS = {
    "--checkpoint": ("--fresh", "the default: the same --run-id goes on from its newest checkpoint"),
    "--config": ("--preset", "--preset NAME, and -o section.key=value for single values"),
    "--continue": ("--fresh", "the default: the same --run-id goes on where it stopped"),
    "--dataset": ("--data", "--data PATH, or -o data.source=climbmix"),
    "--debug": ("--verbose", "--verbose"),
    "--device": ("--ranks", "no option: GPUs are used where there are any"),
    "--force": ("--fresh", "--fresh (with --yes where nobody can be asked)"),
    "--gpus": ("--ranks", "--ranks N (the default is one process a GPU)"),
    "--name": ("--run-id", "--run-id ID"),
    "--nnodes": ("--ranks", "no option: SkyPilot's variables say which nodes there are"),
    "--nodes": ("--ranks", "no option: SkyPilot's variables say which nodes there are"),
    "--nproc-per-node": ("--ranks", "--ranks N (the default is one process a GPU)"),
    "--output": ("--out", "--out DIR"),
    "--output-dir": ("--out", "--out DIR"),
    "--overwrite": ("--fresh", "--fresh (with --yes where nobody can be asked)"),
    "--report-to": ("--fresh", "no option: wandb is used where WANDB_API_KEY or WANDB_MODE is set"),
    "--resume": ("--fresh", "the default: the same --run-id goes on where it stopped, and --fresh starts anew"),
    "--s3": ("--bucket", "--bucket s3://bucket/prefix"),
    "--seed": ("-o", "-o train.seed=N (weights) and -o data.seed=N (order of rows)"),
    "--steps": ("-o", "-o train.steps=N"),
    "--wandb": ("--fresh", "no option: wandb is used where WANDB_API_KEY or WANDB_MODE is set"),
    "--workers": ("--ranks", "--ranks N, and -o train.threads=N for threads of the CPU"),
}
"""what options are called in other tools, an option of the commands that this is about, and what does it there"""
VALUES = (
    (r"(.+) is not in the range (.+)", "give a number in the range {}"),
    (r"(.+) is not a valid integer(.*)", "give a whole number"),
    (r"(.+) is not a valid float(.*)", "give a number"),
)
"""click's words about a value, and the remedy"""


class Refused(click.ClickException):
    """Ends the program: click prints it with `show`, and exits with `exit_code`."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = int(exit_code)  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        click.echo(f"speedrun: {self.message}", file=file, err=True)


class Commands(click.Group):
    """Expected failures, click's among them, are one sentence with the exit code of the table."""

    def make_context(self, info_name: str | None, args: list[str], *given: Any, **named: Any) -> click.Context:
        with _refusing(self):
            if foreign := next((word for word in args if not _is_text(word)), None):
                raise UsageError(f"{foreign!r} is not UTF-8, which all records are: give names and addresses in UTF-8")
            return super().make_context(info_name, args, *given, **named)

    def invoke(self, ctx: click.Context) -> Any:
        with _refusing(self, ctx):
            return super().invoke(ctx)


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:  # of a byte that no UTF-8 has
        return False
    return True


@contextlib.contextmanager
def _refusing(group: click.Group, context: click.Context | None = None) -> Iterator[None]:
    try:
        yield
    except SpeedrunError as error:
        raise Refused(str(error), error.exit_code) from None
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.Abort:  # the end of what comes in, instead of an answer
        raise Refused("nothing was done: the question has no answer", ExitCode.USAGE) from None
    except click.UsageError as error:
        called = context.invoked_subcommand if context else None
        raise Refused(sentence(error, group.commands.get(called or "", group)), ExitCode.USAGE) from None


def sentence(error: click.UsageError, command: click.Command) -> str:
    """What is wrong with the command line of `command`, and what to write."""
    match error:
        case click.NoSuchOption():
            return _no_option(error)
        case click.exceptions.NoSuchCommand():
            return _no_command(error)
        case click.MissingParameter():
            return _missing(error)
        case click.BadParameter():
            return _bad_value(error)
        case click.BadOptionUsage():
            return _bad_option(error, command)
    return _too_many(error)


def _no_option(error: click.NoSuchOption) -> str:
    assert error.ctx
    name, path = error.option_name, error.ctx.command_path
    known, others = _options(error.ctx.command), _commands_with(error.ctx, name)
    needed, elsewhere = OPTIONS.get(name.replace("_", "-"), ("", ""))
    key, by_word = name.lstrip("-").replace("-", "_"), {option.lstrip("-"): option for option in known}
    match = names.nearest(name.lstrip("-"), by_word)
    if isinstance(error.ctx.command, click.Group) and not match:
        remedy = f": options stand behind the command, as in speedrun {others[0] if others else 'run'} {name}"
    elif needed in known:
        remedy = f": here that is {elsewhere}"
    elif key in names.ELSEWHERE and "-o" in known:
        remedy = f": here that is -o {names.ELSEWHERE[key]}"
    elif others:
        remedy = f": {', '.join(others[:3])} {'has' if len(others) == 1 else 'have'} it"
    elif match:
        remedy = f"; did you mean {by_word[match]}?"
    else:
        remedy = ": " + "long options begin with two dashes, and " * (not name.startswith("--")) + f"{path} --help"
        remedy += " lists all"
    return f"{path} has no option {name}{remedy}"


def _no_command(error: click.exceptions.NoSuchCommand) -> str:
    from job.recipe.config import preset_names

    assert error.ctx and isinstance(error.ctx.command, click.Group)
    name = error.command_name
    match = names.nearest(name, [*COMMANDS, *error.ctx.command.commands])
    if name in preset_names():
        remedy = f": for the preset write speedrun run --preset {name}"
    elif match in COMMANDS:
        remedy = f"; did you mean {match}?" * (match != name) or ":"
        remedy += f" here that is {COMMANDS[match]}"
    else:
        remedy = f"; did you mean {match}?" if match else ": speedrun --help lists them"
    return f"there is no command {name}{remedy}"


def _missing(error: click.MissingParameter) -> str:
    assert error.ctx and error.param
    written = " ".join(piece for piece in error.ctx.command.collect_usage_pieces(error.ctx) if piece != "[OPTIONS]")
    if isinstance(error.param, click.Option):
        help_text = (error.param.help or "").rstrip(".")
        written = f"{_called(error.param)} {error.param.metavar or ''} ({help_text[:1].lower()}{help_text[1:]})"
    return f"something is missing: write {error.ctx.command_path} {written}"


def _bad_value(error: click.BadParameter) -> str:
    assert error.param
    name, message = _called(error.param), error.message.rstrip(".")
    for pattern, remedy in VALUES:
        if found := re.fullmatch(pattern, message):
            return f"{name} {found[1]} cannot be used: {remedy.format(found[2])}"
    return f"{name} cannot be used: {message}"


def _bad_option(error: click.BadOptionUsage, command: click.Command) -> str:
    name, option = error.option_name, _options(command)[error.option_name]
    if option.is_flag:
        return f"{name} takes no value: write it without = and what is behind"
    return f"{name} lacks its value: write {name} {option.metavar or option.type.name.upper()}"


def _too_many(error: click.UsageError) -> str:
    """A word too many, or a combination that click refuses in its own words."""
    found = re.search(r"\((.+)\)$", error.message.rstrip("."))
    if not error.ctx or not found:
        return error.message.rstrip(".")
    from job.recipe.config import known_keys, preset_names

    word, known, path = found[1].split()[0], _options(error.ctx.command), error.ctx.command_path
    if word in preset_names() and "--preset" in known:
        remedy = f"a preset is named by --preset {word}"
    elif word.partition("=")[0] in known_keys() and "-o" in known:
        remedy = f"a key of the recipe is given by -o {word}"
    elif any(isinstance(parameter, click.Argument) for parameter in error.ctx.command.params):
        remedy = f"put words that belong together into quotes, and see {path} --help"
    elif "--run-id" in known:
        remedy = f"a run is named by --run-id {word}"
    else:
        remedy = f"{path} --help says what it takes"
    return f"{path} has no place for {word}: {remedy}"


def _options(command: click.Command) -> dict[str, click.Option]:
    """By each of its names."""
    options = (each for each in command.get_params(click.Context(command)) if isinstance(each, click.Option))
    return {name: option for option in options for name in option.opts}


def _commands_with(context: click.Context, option: str) -> list[str]:
    """The names of the commands that have an option of this name."""
    group = context.find_root().command
    assert isinstance(group, click.Group)
    found = (name for name, command in group.commands.items() if option in _options(command))
    return sorted(found, key=lambda name: (name != "run", name))


def _called(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len)
    return parameter.human_readable_name
