"""The command line by its exact output: help, expected failures, and what stays untouched."""

from __future__ import annotations

import inspect
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest

from job.cli.commands import main
from job.errors import MEANING
from job.machine import container

ROOT = Path(__file__).parents[3]


def walk() -> list[tuple[str, click.Command]]:
    return sorted(main.commands.items())


def test_the_commands_are_these() -> None:
    assert [name for name, _ in walk()] == [
        "certify",
        "compare",
        "doctor",
        "evaluate",
        "export",
        "import",
        "keys",
        "list",
        "plan",
        "play",
        "prepare",
        "presets",
        "pretrain",
        "rehearse",
        "report",
        "run",
        "sample",
        "smoke",
        "status",
        "try8",
        "wandb-sync",
    ]


@pytest.mark.parametrize(("name", "command"), walk())
def test_every_command_has_help_an_example_and_described_options(name: str, command: click.Command) -> None:
    _, _, examples = inspect.cleandoc(command.help or "").partition("Example:\n")
    assert examples.strip().startswith(f"speedrun {name}")
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts} has no help"


@pytest.mark.parametrize(("name", "command"), walk())
def test_every_example_is_a_command_line_that_parses(name: str, command: click.Command) -> None:
    for line in (command.help or "").splitlines():
        words = line.split()
        if words[:1] == ["speedrun"]:
            command.make_context(words[1], words[2:], resilient_parsing=False)


def test_help_imports_neither_torch_nor_boto3_and_answers_at_once() -> None:
    script = (
        "import sys\nfrom job.cli.commands import main\nmain(['--help'], standalone_mode=False)\n"
        "assert not {'torch', 'boto3', 'numpy'} & set(sys.modules)"
    )
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        said = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.4, f"{spent} s of CPU time"
    for code, meaning in MEANING.items():
        assert f"{int(code):>2}  {meaning}" in said


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["run", "--preset", "smoek"], 2, "speedrun: no preset 'smoek'; did you mean smoke? (presets: "),
        (["run", "-o", "train.stepz=3"], 2, "speedrun: unknown key 'train.stepz'; did you mean train.steps?\n"),
        (["run", "-o", "model.depth=x"], 2, "speedrun: model.depth=x cannot be used: give a whole number\n"),
        (
            ["run", "--run-id", "a/b"],
            2,
            "speedrun: --run-id 'a/b' cannot be used: write letters, digits, dots, dashes and underscores",
        ),
        (
            ["run", "-o", "train.total_batch_size=5120"],
            2,
            "speedrun: train.total_batch_size or train.device_batch_size cannot be used: a batch of 5,120 tokens is"
            " not a multiple of"
            " 16 rows of 256 tokens on each of 1 rank (4,096): take 4,096 or 8,192\n",
        ),
        (["evaluate", "--run-id", "nothing"], 2, "speedrun: no run nothing below "),
        (["report", "--run-id", "nothing"], 2, "speedrun: no run nothing below "),
        (["run", "-q", "-v"], 2, "speedrun: -q and -v contradict each other; give one of them\n"),
    ],
)
def test_usage_errors_are_one_sentence_and_write_nothing(
    tmp_path: Path, speedrun, words: list[str], code: int, sentence: str
) -> None:
    ended = speedrun.here(speedrun.command(*words, "--out", str(tmp_path / "out")), code=code)
    assert ended.stderr.startswith(sentence)
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""
    assert not (tmp_path / "out" / "runs").exists()


def test_an_output_folder_that_cannot_be_written(tmp_path: Path, speedrun) -> None:
    (tmp_path / "file").write_text("")
    ended = speedrun.here(speedrun.tiny("run", tmp_path / "file" / "out"), code=2)
    remedy = (
        container.remedy_for(tmp_path / "file" / "out") if container.inside() else "choose another folder or give user"
    )
    assert f"cannot be written (Not a directory); {remedy}" in ended.stderr


def test_missing_and_empty_data_end_with_11(tmp_path: Path, speedrun) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        ended = speedrun(speedrun.command("prepare", "--data", str(path), "--out", str(tmp_path / "out")), code=11)
        assert str(path) in ended.stderr
        assert ended.stderr.startswith("speedrun: ")
        assert ended.stderr.count("\n") == 1


def test_dry_run_says_all_and_writes_nothing(tmp_path: Path, speedrun) -> None:
    ended = speedrun.here(speedrun.tiny("run", tmp_path / "out", "--dry-run"))
    assert "train.steps              12               -o\n" in ended.stdout
    assert f"run folder: {tmp_path / 'out' / 'runs' / 't'}\n" in ended.stdout
    assert ended.stdout.endswith("  prepare: to do\n  pretrain: to do\n  evaluate: to do\n  report: to do\n")
    assert list(tmp_path.iterdir()) == []
