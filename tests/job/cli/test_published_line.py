"""The leaderboard's own command lines, repeated word for word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from job.cli.commands import main
from job.cli.published_line import DEFAULTS, LINE
from job.recipe.config import resolve
from job.recipe.derive import derive
from job.report.words import published_sentence
from model.scaling import RULES

REST = "--sample-every=-1 --save-every=-1 --core-metric-max-per-task=-1"
LINES = {
    "run1": f"--depth=24 --run=d24-jan29 --model-tag=d24_jan29 --device-batch-size=16 {REST} --core-metric-every=3000"
    " --target-param-data-ratio=12",
    "run2": f"--depth=26 --run=d26-feb2-fp8-ratio8.5 --model-tag=d26_feb2_fp8_ratio8.5 --device-batch-size=16 {REST}"
    " --core-metric-every=999999 --target-param-data-ratio=8.5 --fp8",
    "run3": "--depth=26 --run=d26_feb4 --model-tag=d26_feb4_double_batch_ratio8.25 --device-batch-size=16"
    f" --total-batch-size=1048576 {REST}"
    " --core-metric-every=999999 --target-param-data-ratio=8.25 --fp8",
    "run4": "--depth=26 --run=d26_r725_05M --model-tag=d26_r725_05M --device-batch-size=16 --total-batch-size=524288"
    f" {REST}"
    " --core-metric-every=999999 --target-param-data-ratio=7.25 --fp8",
    "run6": "--depth=24 --target-param-data-ratio=8 --device-batch-size=16 --fp8 --run=dummy",
}
STEPS = {"run1": 16704, "run2": 14889, "run3": 7226, "run4": 12700, "run6": 5568}


def pretrain(tmp_path: Path, *words: str, dry: bool = True) -> Result:
    return CliRunner().invoke(main, ["pretrain", *words, "--out", str(tmp_path), *(["--dry-run"] if dry else [])])


def refused(tmp_path: Path, *words: str, dry: bool = True) -> str:
    result = pretrain(tmp_path, *words, dry=dry)
    assert result.stdout == "" and result.exit_code in (2, 10)
    assert list(tmp_path.iterdir()) == []
    return result.stderr


def said(result: Result, name: str) -> list[str]:
    """The words of the dry run's line about `name`, on a machine that may refuse the run for want of a GPU."""
    assert result.exit_code in (0, 10), result.output
    return next(line.split() for line in result.stdout.splitlines() if line.split()[:1] == [name])


@pytest.mark.parametrize("run", LINES)
def test_a_published_line_gives_the_published_run(tmp_path: Path, run: str) -> None:
    result = pretrain(tmp_path, "--generation", run, *LINES[run].split())
    assert said(result, "steps")[1] == f"{STEPS[run]:,}"
    assert said(result, "model.generation")[1] == ("head" if run == "run6" else "feb")
    assert said(result, "train.total_batch_size")[1:] in (
        ["524,288", "--generation", run],
        ["0", "--generation", run],
        [said(result, "batch_tokens")[1], "--total-batch-size"],
    )
    assert said(result, "train.checkpoint_every")[1] == "0"
    scored = run != "run6"  # the only line that says nothing of CORE
    assert ("  evaluate: to do\n" in result.stdout) == ("CORE is scored once" in result.stdout) == scored


def test_a_score_within_the_steps_is_made_after_the_last_one_and_that_is_said(tmp_path: Path) -> None:
    last = pretrain(tmp_path, "--generation", "run1", *LINES["run1"].split()).stdout.splitlines()[-1]
    assert last == (
        "--core-metric-every=3000: CORE is scored once, after the last of 16,704 steps, not every 3,000 steps: neither"
        " the weights nor the"
        " timed seconds change by that"
    )
    last = pretrain(
        tmp_path, "--preset", "smoke", "--core-metric-every=999999", "-o", "train.steps=12"
    ).stdout.splitlines()[-1]
    assert (
        last
        == "--core-metric-every=999999: the smoke score (no --core-bundle) is scored once, after the last of 12 steps"
    )
    assert "evaluate" not in pretrain(tmp_path, "--preset", "smoke", "--core-metric-every=-1").stdout


@pytest.mark.slow
def test_the_model_is_scored(tmp_path: Path, speedrun) -> None:
    ended = speedrun(speedrun.tiny("pretrain", tmp_path, "--core-metric-every=5", "--json"))
    assert ended.stderr.startswith(
        "--core-metric-every=5: the smoke score (no --core-bundle) is scored once, after the last of 12 steps, not"
    )
    assert len(json.loads(ended.stdout)["smoke_score"]["tasks"]) == 22


@pytest.mark.parametrize("run", LINES)
def test_it_is_asked_for_where_the_line_leaves_it_open(tmp_path: Path, run: str) -> None:
    sentence = refused(tmp_path, *LINES[run].split())
    assert sentence.startswith("speedrun: --depth leaves open which version of the training program is meant")
    assert "add --generation run1, run2, run3, run4 or run6, or name a --preset" in sentence


def test_the_version_decides_the_batch_that_a_line_leaves_open(tmp_path: Path) -> None:
    line = ["--depth=26", "--target-param-data-ratio=8.5", "--fp8", "--device-batch-size=16"]
    batches = {
        run: said(pretrain(tmp_path, "--generation", run, *line), "batch_tokens")[1]
        for run in ("run1", "run2", "run3", "run4")
    }
    assert batches == {"run1": "524,288", "run2": "524,288", "run3": "1,048,576", "run4": "1,048,576"}


def test_the_version_decides_the_ratio_and_the_validation(tmp_path: Path) -> None:
    result = pretrain(tmp_path, "--generation", "run1", "--depth=12")
    assert said(result, "train.param_data_ratio")[1:] == ["10.5", "--generation", "run1"]
    assert said(result, "train.device_batch_size")[1] == "32"
    assert said(result, "train.val_tokens")[1] == "10,485,760"
    assert said(pretrain(tmp_path, "--generation", "run6", "--depth=12"), "train.param_data_ratio")[1] == "12"


def test_the_ratios_left_open_are_those_of_the_rules() -> None:
    ratios = {run: ratio for run, (ratio, _) in DEFAULTS.items()}
    assert {run: RULES[resolve(run).model.generation].ratio for run in DEFAULTS} == ratios


def test_a_preset_settles_everything_as_well(tmp_path: Path) -> None:
    result = pretrain(
        tmp_path, "--preset", "smoke", "--depth", "4", "--target-param-data-ratio", "2", "--save-every", "7"
    )
    assert said(result, "model.depth")[1:] == ["4", "--depth"]
    assert said(result, "train.steps")[1] == "0"  # the ratio decides, not the preset's steps
    assert said(result, "train.checkpoint_every")[1] == "7"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--run=a", "--model-tag=b"], "b"),
        (["--run=a"], "a"),
        (["--run=a", "--model-tag=b", "--run-id=c"], "c"),
        ([], "smoke"),
    ],
)
def test_the_run_has_the_name_that_the_line_gives(tmp_path: Path, words: list[str], name: str) -> None:
    result = pretrain(tmp_path, "--preset", "smoke", *words)
    assert f"run folder: {tmp_path / 'runs' / name}\n" in result.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--core-metric-every=0"], "--core-metric-every=0 cannot be used: give a number of steps, or -1 for no score"),
        (["--sample-every=100"], "--sample-every=100 cannot be used: samples are drawn when training is done"),
        (["--preset", "run1"], "--preset run1 and --generation run1 both say what the rest is; give one of them"),
        (["--device-batch-size=0"], "train.device_batch_size=0 cannot be used: give a positive number of rows"),
        (
            ["--device-batch-size=12"],
            "not a multiple of 12 rows of 2048 tokens on each of 1 rank (24,576): take 516,096 or 540,672",
        ),
    ],
)
def test_what_cannot_be_repeated_is_refused(tmp_path: Path, words: list[str], sentence: str) -> None:
    assert sentence in refused(tmp_path, "--generation", "run1", *LINES["run1"].split(), *words)


def test_a_generation_needs_a_line(tmp_path: Path) -> None:
    assert "give its --depth; the run itself is --preset run2" in refused(tmp_path, "--generation", "run2")
    assert "'run5' is not one of 'run1', 'run2', 'run3', 'run4', 'run6'" in refused(tmp_path, "--generation", "run5")


def test_items_per_task_are_remembered_for_the_evaluation(tmp_path: Path) -> None:
    assert said(pretrain(tmp_path, "--preset", "smoke", "--core-metric-max-per-task=500"), "eval.cap")[1:] == [
        "500",
        "--core-metric-max-per-task",
    ]


def test_a_plan_of_a_published_dataset_needs_no_data(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["plan", "--preset", "run6", "--json"])
    assert json.loads(result.stdout)["text"]["shards"] == 147


def test_rates_schedule_windows_and_validation_of_a_line(tmp_path: Path) -> None:
    line = "--window-pattern=L --eval-every=250 --eval-tokens=1048576 --warmup-steps=0 --warmdown-ratio=0.5"
    line += " --final-lr-frac=0"
    rates = "--matrix-lr=0.04 --embedding-lr=0.2 --unembedding-lr=0.004 --scalar-lr=0.25 --num-iterations=100"
    result = pretrain(tmp_path, "--preset", "smoke", "--target-param-data-ratio=2", *line.split(), *rates.split())
    found = {key: said(result, key)[1] for key in ("train.val_every", "train.val_tokens", "train.steps", "steps")}
    assert found == {"train.val_every": "250", "train.val_tokens": "1,048,576", "train.steps": "100", "steps": "100"}
    words = {flag.key: (flag.name, word.partition("=")[2]) for flag in LINE.values() for word in
             (line + " " + rates).split() if word.startswith(f"{flag.name}=")}  # fmt: skip
    asked, plain = derive(resolve("smoke", words)), derive(resolve("smoke", {"train.steps": ("", 100)}))
    assert set(asked.config.windows) == {256}
    schedule = asked.schedule
    assert (schedule.warmup_steps, schedule.warmdown_ratio, schedule.final_lr) == (0, 0.5, 0)
    factors = {name: asked.specs[name].lr / spec.lr for name, spec in plain.specs.items()}
    wte, head, scalars = 2 / 3, 0.5, 0.5
    assert factors == pytest.approx(
        {"matrices": 2, "wte": wte, "value_embeds": wte, "head": head, "resid_lambdas": scalars, "x0_lambdas": scalars}
        | {"smear_backout": 1}
    )


def test_what_the_published_program_does_anyhow_is_the_published_run(tmp_path: Path) -> None:
    """Its defaults of July 2026, given: the very mathematics, so that a run goes on with or without them."""
    line = "--window-pattern=SSSL --warmup-steps=40 --warmdown-ratio=0.65 --final-lr-frac=0.05 --matrix-lr=0.02"
    line += " --embedding-lr=0.3 --unembedding-lr=0.008 --scalar-lr=0.5 --num-iterations=-1"
    result = pretrain(tmp_path, "--generation", "run6", *LINES["run6"].split(), *line.split())
    assert said(result, "steps")[1] == "5,568"
    given = {flag.key: ("", word.partition("=")[2]) for flag in LINE.values() for word in line.split()
             if word.startswith(f"{flag.name}=") and flag.key != "train.steps"}  # fmt: skip
    recipe, published = resolve("run6", given), resolve("run6")
    assert derive(recipe).mathematics(recipe) == derive(published).mathematics(published)
    assert published_sentence(recipe) == "It repeats Run 6 (a825e63, 14 Mar 2026)."
    slower = resolve("run6", {"train.matrix_lr": ("", 0.01), "train.lr_scale": ("", 2)})
    assert published_sentence(slower) == (
        "It repeats no published run; from the nearest, Run 6 (a825e63, 14 Mar 2026), it differs in lr_scale 1 -> 2;"
        " matrix_lr 0.02 -> 0.01."
    )


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("--warmdown-ratio=1.5", "train.warmdown_ratio=1.5 cannot be used: give a number from 0 to 1, or -1 for the"),
        ("--matrix-lr=-0.02", "train.matrix_lr=-0.02 cannot be used: give a number from 0 to 100, or -1 for the"),
        ("--window-pattern=SSX", "window_pattern is 'SSX': write it with S (short) and L (long), for example SSSL"),
    ],
)
def test_a_rate_or_a_window_that_cannot_be_is_one_sentence(tmp_path: Path, word: str, sentence: str) -> None:
    assert sentence in refused(tmp_path, "--preset", "smoke", word)
