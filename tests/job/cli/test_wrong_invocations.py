"""Sixty command lines that cannot be used: one sentence with the remedy, the right exit code, nothing on stdout."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from unittest import mock

import click
import pytest
from click.testing import CliRunner

from job.cli.commands import main
from job.cli.refusals import Commands

TWO_DASHES = "long options begin with two dashes, and speedrun run --help lists all"
WRONG = (
    # commands
    ("train", 2, "there is no command train: here that is run, or pretrain without the score"),
    ("trian", 2, "there is no command trian; did you mean train? here that is run, or pretrain without the score"),
    ("resume", 2, "there is no command resume: here that is run: the same command goes on where it stopped"),
    ("smok", 2, "there is no command smok; did you mean smoke?"),
    ("run6", 2, "there is no command run6: for the preset write speedrun run --preset run6"),
    ("frobnicate", 2, "there is no command frobnicate: speedrun --help lists them"),
    ("--preset run6 run", 2, "speedrun has no option --preset: options stand behind the command, as in speedrun run"),
    ("--hlep", 2, "speedrun has no option --hlep; did you mean --help?"),
    ("--version=3", 2, "--version takes no value: write it without = and what is behind"),
    (
        "run --core-bundle b\udcff",
        2,
        "'b\\udcff' is not UTF-8, which all records are: give names and addresses in UTF-8",
    ),
    # options
    ("run --resume", 2, "speedrun run has no option --resume: here that is the default: the same --run-id goes on"),
    ("run --gpus 8", 2, "has no option --gpus: here that is --ranks N (the default is one process a GPU)"),
    ("run --nproc_per_node 8", 2, "here that is --ranks N"),
    ("run --lr 0.01", 2, "has no option --lr: here that is -o train.lr_scale (a factor on every rate), or"),
    ("run --learning-rate 0.01", 2, "here that is -o train.lr_scale"),
    ("run --batch-size 32", 2, "here that is -o train.total_batch_size (tokens a step) or train.device_batch_size"),
    ("run --epochs 3", 2, "here that is -o train.steps, or train.param_data_ratio"),
    ("run --steps 100", 2, "here that is -o train.steps=N"),
    ("run --seed 7", 2, "here that is -o train.seed=N (weights) and -o data.seed=N (order of rows)"),
    ("run --config x.yaml", 2, "here that is --preset NAME, and -o section.key=value for single values"),
    ("run --output-dir x", 2, "here that is --out DIR"),
    ("run --wandb", 2, "here that is no option: wandb is used where WANDB_API_KEY or WANDB_MODE is set"),
    ("run --presett run6", 2, "speedrun run has no option --presett; did you mean --preset?"),
    ("plan --hlep", 2, "speedrun plan has no option --hlep; did you mean --help?"),
    ("run --max-use 3", 2, "did you mean --max-usd?"),
    ("run -preset run6", 2, f"speedrun run has no option -p: {TWO_DASHES}"),
    ("smoke --strict", 2, "speedrun smoke has no option --strict: run, doctor, pretrain have it"),
    ("report --license mit", 2, "speedrun report has no option --license: export, import have it"),
    ("run --out", 2, "--out lacks its value: write --out DIR"),
    ("run -o", 2, "-o lacks its value: write -o SECTION.KEY=VALUE"),
    ("run --dry-run=1", 2, "--dry-run takes no value: write it without = and what is behind"),
    ("run --ranks x", 2, "--ranks 'x' cannot be used: give a whole number"),
    ("run --ranks 0", 2, "--ranks 0 cannot be used: give a number in the range 1<=x<=64"),
    ("run --max-usd cheap", 2, "--max-usd 'cheap' cannot be used: give a number"),
    ("run -q -v", 2, "-q and -v contradict each other; give one of them"),
    # words
    ("run run6", 2, "speedrun run has no place for run6: a preset is named by --preset run6"),
    ("run mine", 2, "speedrun run has no place for mine: a run is named by --run-id mine"),
    ("run train.steps=3", 2, "a key of the recipe is given by -o train.steps=3"),
    ("sample Hello world", 2, "speedrun sample has no place for world: put words that belong together into quotes"),
    ("keys model", 2, "speedrun keys has no place for model: speedrun keys --help says what it takes"),
    ("compare a", 2, "something is missing: write speedrun compare A B"),
    ("status", 2, "something is missing: write speedrun status RUN"),
    ("report", 2, "something is missing: write speedrun report --run-id ID (the run that is reported)"),
    # presets and keys
    ("plan run7", 2, "no preset 'run7'; did you mean run6? (presets: cpu, d12, d20, fast, frontier, run1, run2"),
    ("run --preset gpt5", 2, "no preset 'gpt5' (presets: cpu, d12, d20"),
    ("run -o train.stepz=3", 2, "unknown key 'train.stepz'; did you mean train.steps?"),
    ("run -o depth=3", 2, "unknown key 'depth'; did you mean model.depth?"),
    ("run -o seed=3", 2, "unknown key 'seed'; did you mean data.seed or train.seed?"),
    ("run -o optimizer.lr=3", 2, "unknown key 'optimizer.lr'; here that is train.lr_scale"),
    ("run -o zebra.crossing=3", 2, "unknown key 'zebra.crossing'; speedrun keys lists all"),
    ("run -o train.steps", 2, "-o train.steps cannot be used: write -o section.key=value, e.g. -o train.steps=100"),
    ("run -o train.steps=-1", 2, "train.steps=-1 cannot be used: give a positive number of steps, or 0 to follow"),
    ("run -o train.fp8=maybe", 2, "train.fp8=maybe cannot be used: give true or false"),
    # runs and places
    ("report --run-id smokee", 2, "no run smokee below out/runs; did you mean smoke?; there are: smoke"),
    ("status elsewhere", 2, "no run elsewhere below out/runs; there are: smoke"),
    ("run --run-id a/b", 2, "--run-id 'a/b' cannot be used: write letters, digits, dots, dashes and underscores"),
    ("run --bucket gs://x", 2, "--bucket gs://x cannot be used: write s3://bucket/prefix, or a folder"),
    ("list --bucket nowhere", 2, "write s3://nowhere, or ./nowhere for a new folder"),
    ("run --strict --bucket ./there", 2, "the folder ./there would go with it: give --bucket s3://bucket/prefix"),
    ("evaluate --hf nowhere", 11, "nowhere holds no Hugging Face model (no config.json); give the folder of a local"),
    # plans, published lines, money
    ("plan --gpu tpu", 2, "--gpu tpu is not known; known are h100, h200, a100-80gb, and cpu for a plan without a GPU"),
    ("plan --measured nowhere", 11, "name the file of a trial, or a bucket with one (sky/try8.yaml, sky/try.yaml)"),
    ("run --preset cpu --max-usd 1", 2, "--max-usd needs a price, and nobody says what this machine costs: give"),
    ("pretrain --generation run5", 2, "--generation cannot be used: 'run5' is not one of 'run1', 'run2', 'run3'"),
    ("pretrain --depth 24", 2, "add --generation run1, run2, run3, run4 or run6, or name a --preset"),
    ("certify", 2, "say what is certified: RUN..., or --core X for each figure, or --table PLACE for a leaderboard"),
    ("evaluate", 2, "say what is scored: --run-id ID for a run's model, or --hf DIR for another"),
)


def test_a_word_that_no_record_can_hold() -> None:
    ended = CliRunner().invoke(main, ["run", "--core-bundle", "b\udcff"], prog_name="speedrun")
    assert ended.exit_code == 2
    assert (
        ended.stderr == "speedrun: 'b\\udcff' is not UTF-8, which all records are: give names and addresses in UTF-8\n"
    )


@pytest.mark.parametrize(("line", "code", "piece"), WRONG, ids=[line for line, *_ in WRONG])
def test_one_sentence_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: int, piece: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "runs" / "smoke").mkdir(parents=True)
    with mock.patch.dict(os.environ):
        os.environ.pop("SPEEDRUN_BUCKET", None)
        ended = CliRunner().invoke(main, shlex.split(line), prog_name="speedrun")
    assert ended.exit_code == code, ended.output
    assert isinstance(ended.exception, SystemExit)
    assert ended.stdout == ""
    assert ended.stderr.startswith("speedrun: ") and ended.stderr.count("\n") == 1
    assert piece in ended.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "runs", "smoke"]


def test_they_are_sixty() -> None:
    assert len({line for line, *_ in WRONG}) == len(WRONG) >= 60


def test_a_question_without_an_answer_is_no_bug() -> None:
    group = Commands("speedrun", commands=[click.Command("ask", callback=lambda: click.confirm("Go on?"))])
    ended = CliRunner().invoke(group, ["ask"], input="")
    assert (ended.exit_code, ended.stderr) == (2, "speedrun: nothing was done: the question has no answer\n")


def test_without_a_word_it_is_the_help() -> None:
    ended = CliRunner().invoke(main, [], prog_name="speedrun")
    assert ended.exit_code == 2 and ended.stderr.startswith("Usage: speedrun [OPTIONS] COMMAND")
