"""Writes docs/commands.md, what the command line says of itself: `make docs`."""

from __future__ import annotations

import inspect
from pathlib import Path

import click

from job.cli.commands import main
from job.errors import MEANING


def text() -> str:
    """docs/commands.md: every command's words, examples and options, and the exit codes."""
    parts = [
        "# Commands",
        "Made by `make docs` from the command line itself; every command says the same with `--help`.",
        *(_section(name, command) for name, command in sorted(main.commands.items())),
        "## Exit codes",
        "| code | meaning |\n|---|---|\n"
        + "\n".join(f"| {int(code)} | {meaning} |" for code, meaning in MEANING.items()),
        "What ends a run with which of them: [runs.md](runs.md).",
    ]
    return "\n\n".join(parts) + "\n"


def _section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name)
    said, _, examples = inspect.cleandoc(command.help or "").partition("\b\nExample:\n")
    usage = " ".join(["speedrun", name, *command.collect_usage_pieces(context)])
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    records = [record for option in options if (record := option.get_help_record(context))]
    rows = [f"| `{option}` | {_cell(words)} |" for option, words in records]
    shown = "\n".join(f"    {line.strip()}" for line in examples.strip().splitlines())
    return "\n\n".join(
        [f"## {name}", f"`{usage}`", _cell(said), shown, "\n".join(["| option | |", "|---|---|", *rows])]
    )


def _cell(words: str) -> str:
    """`words` on one line, with nothing in it that Markdown would read as its own."""
    return " ".join(words.split()).replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")


if __name__ == "__main__":
    (Path(__file__).parent / "commands.md").write_text(text(), encoding="utf-8")
