"""`speedrun plan`: its numbers, its page, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from job.cli.commands import main
from job.errors import UsageError
from job.machine.gpus import GPUS
from job.plan import money, published_runs
from job.plan.measured import KEY, Measured
from job.plan.page import WIDTH, page
from job.plan.quote import make_plan, warnings
from job.recipe.config import preset_names, resolve
from job.recipe.leaderboard import GPT2_XL_CORE
from job.run.launch import recipe_document
from job.store import open_store

GOLDEN = Path(__file__).with_name("plan_run6.txt")


def plan(*words: str) -> Result:
    return CliRunner().invoke(main, ["plan", *words])


def test_the_page_of_run_6() -> None:
    result = plan("--preset", "run6")
    assert result.exit_code == 0
    assert result.stdout == GOLDEN.read_text(encoding="utf-8"), (
        f"if the change is meant: speedrun plan --preset run6 > {GOLDEN.name}"
    )


@pytest.mark.parametrize("given", [(), ("h100", 1)])
@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_page_that_fits(name: str, given: tuple) -> None:
    made = make_plan(resolve(name), *given)
    lines = page(made).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert not any(line != line.rstrip() for line in lines)
    assert f"{made.derived.steps:,}" in page(made)


@pytest.mark.parametrize("name", preset_names())
def test_json_has_everything_and_nothing_else_is_printed(name: str) -> None:
    document = json.loads(plan("--preset", name, "--json").stdout)
    made = make_plan(resolve(name))
    assert document["derived"]["steps"]["value"] == made.derived.steps
    assert document["text"]["rows"] == made.derived.rows
    node = document["node"]
    if made.on_node is None:
        assert node is None and document["cpu_minutes"]
        return
    assert node["minutes"] == pytest.approx([sum(s[end] for s in node["stages_minutes"]) for end in ("low", "high")])
    assert [m["rows"] for m in node["memory_bytes"]] == [8, 16, 32]
    assert all(m["total"] > m["parameters"] + m["gradients"] for m in node["memory_bytes"])


def test_run_6_takes_its_published_minutes_on_the_published_machine_only() -> None:
    trained = {}
    for words in ((), ("h200",), ("h100", 4)):
        stages = make_plan(resolve("run6"), *words).on_node.stages
        trained[words] = next(stage for stage in stages if stage.name == "training, timed")
    assert trained[()].low == trained[()].high == pytest.approx(5934 / 60)
    assert trained[("h200",)].low < 5934 / 60
    assert trained[("h100", 4)].low == pytest.approx(2 * 5934 / 60, rel=0.05)


def test_dollars_follow_minutes_and_price() -> None:
    made = make_plan(resolve("run6")).on_node
    assert made.node.price == 24
    assert made.dollars == pytest.approx([minutes * 24 / 60 for minutes in made.minutes])
    assert 44 < made.dollars[0] < 45 < made.dollars[1] < 52
    assert make_plan(resolve("run6"), price=12).on_node.dollars == pytest.approx([d / 2 for d in made.dollars])
    assert make_plan(resolve("run6"), gpus=1).on_node.node.price == 3


def test_a_gpu_without_a_known_price() -> None:
    assert make_plan(resolve("run6"), "H200").on_node.dollars is None
    assert "no price of the H200 SXM 141 GB is known here: give --price" in plan("--gpu", "h200").stdout.replace(
        "\n  ", " "
    )
    assert make_plan(resolve("run6"), "h200", price=30).on_node.dollars is not None


def test_try_costs_less_than_two_dollars_and_twenty_minutes_after_its_boot() -> None:
    made = make_plan(resolve("try")).on_node
    assert (made.node.gpus, made.node.gpu.name) == (1, "h100")
    boot = made.stages[0]
    assert made.minutes[1] - boot.high < 21 and made.dollars[1] < 2


def test_fast_is_faster_than_the_record_that_it_follows() -> None:
    made = make_plan(resolve("fast"))
    assert made.run.name == "PR #830" and made.differences == ["without gains in some norms; its step count is derived"]
    assert not made.is_published
    training = next(stage for stage in made.on_node.stages if stage.name == "training, timed")
    assert training.low < 80 < training.high < 85
    assert made.on_node.largest.rows == 32


def test_a_changed_recipe_is_not_the_published_run() -> None:
    made = make_plan(resolve("run6", overrides=["model.depth=26"]))
    assert made.run.name == "Run 6" and "depth 24 -> 26" in made.differences
    assert "not a published recipe" in page(made)


def test_shards_and_crop() -> None:
    text = make_plan(resolve("run6")).text
    assert (text.rows, text.val_rows, text.shards, text.available) == (2_850_816, 20_480, 147, 6542)
    assert text.raw_tokens == pytest.approx(8.93e9, rel=1e-3)
    small = make_plan(resolve("smoke")).text
    assert (small.crop_share, small.shards, small.raw_tokens) == (0.0, None, small.rows * 256)


def test_more_text_than_there_is() -> None:
    made = make_plan(resolve("run1", overrides=["train.param_data_ratio=200"]))
    assert any("more than fineweb-edu has (1,822)" in warning for warning in warnings(made))


def test_odd_depths_are_allowed_and_advised_against() -> None:
    made = make_plan(resolve("run6", overrides=["model.depth=25"]))
    assert made.derived.config.width == 1664
    assert any(warning.startswith("depth 25 is odd: its width is rounded up to 1664") for warning in warnings(made))
    assert warnings(make_plan(resolve("run6"))) == []


def test_a_device_batch_that_does_not_fit_names_the_one_that_does() -> None:
    made = make_plan(resolve("run6", overrides=["train.device_batch_size=32"]))
    assert any(
        "do not fit the H100 SXM 80 GB: take -o train.device_batch_size=16" in warning for warning in warnings(made)
    )
    tight = make_plan(resolve("run1", overrides=["model.depth=60"]), "a100-80gb")
    assert any("take a smaller model or a larger card" in warning for warning in warnings(tight))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--gpu b200", f"--gpu b200 is not known; known are {', '.join(GPUS)}, and cpu"),
        ("--price 0", "--price 0 cannot be used: give the whole node's price in dollars an hour"),
        ("--price -24", "--price -24 cannot be used"),
        ("--price nan", "--price nan cannot be used"),
        ("--gpus 0", "--gpus 0 cannot be planned: a run takes one node, give a number from 1 to 8"),
        ("--gpus 16", "--gpus 16 cannot be planned"),
        ("--gpus 3", "16 rows of 2048 tokens on each of 3 ranks (98,304): take 983,040 or 1,081,344"),
        (
            "--gpu a100-80gb",
            "the A100 SXM 80 GB has no fp8 (Ada, Hopper or newer have): plan bf16 with -o train.fp8=false",
        ),
        ("--preset smoke --gpus 8", "--gpus and --price are for a plan with GPUs: add --gpu h100"),
        ("-o train.device_batch_size=24", "take 786,432 or 1,179,648"),
        ("-o data.vocab_size=65537", "data.vocab_size=65537 cannot be used: give a size from 266"),
        ("-o model.depth=0", "model.depth=0 cannot be used: give a number of blocks from 1 to 100"),
        ("--preset run5", "no preset 'run5'; did you mean run"),
    ],
)
def test_bad_input_is_one_sentence(words: str, sentence: str) -> None:
    result = plan(*words.split())
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("speedrun: ") and result.stderr.count("\n") == 1
    assert sentence in result.stderr


def test_a_plan_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan().exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_make_plan_raises_usage_errors() -> None:
    with pytest.raises(UsageError, match="--price -1 cannot be used"):
        make_plan(resolve("run6"), price=-1)


def trial(**seconds: float) -> dict[str, Any]:
    """As `speedrun try8` leaves it."""
    steps = {variant: {"median": median, "steps": 10} for variant, median in seconds.items()}
    stack = {"gpu": "NVIDIA H100 80GB HBM3", "gpus": 8, "revision": "0123456789abcdef"}
    return {"passed": True, "stack": stack, "run": recipe_document(resolve("try"), "try8"), "step_seconds": steps}


def test_a_measured_step_prices_the_plan(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put(KEY, json.dumps(trial(on=1.5, off=2.0)).encode(), "application/json")
    for place in (str(tmp_path), str(tmp_path / KEY)):
        said = plan("--preset", "run6", "--measured", place).stdout
        assert "step 1,500 ms in 4 micro-steps" in said and "by what was measured" in said
        assert re.search(r"measured on 8 x NVIDIA H100 80GB HBM3 with image\s+0123456789ab", said)
        assert re.search(r"^training, timed +138.9  the measured step$", said, re.MULTILINE), said
    measured = Measured.at(str(tmp_path))
    other, fitted = (make_plan(resolve("fast"), measured=given).on_node for given in (measured, None))
    scale = 1.5 / make_plan(resolve("run6")).on_node.step_seconds
    assert other.step_seconds == pytest.approx(scale * fitted.step_seconds)
    assert other.training[0] < other.training[1], "carried to another model it has the fit's error"
    later = make_plan(resolve("run6", {}, ["comm.overlap=false"]), measured=measured)
    assert later.on_node.step_seconds == pytest.approx(2.0)
    with pytest.raises(UsageError, match="did not come to measure"):
        make_plan(resolve("run6", {}, ["comm.bf16=true"]), measured=measured)
    with pytest.raises(UsageError, match="the trial was of 8 x NVIDIA H100 80GB HBM3, the plan is of 4 x H100 SXM"):
        make_plan(resolve("run6"), gpus=4, measured=measured)
    ended_early = trial()
    ended_early["stack"]["gpus"] = 1
    with pytest.raises(UsageError, match="did not come to measure"):
        make_plan(resolve("run6"), measured=Measured.of(ended_early))


def test_a_place_without_a_trial(tmp_path: Path) -> None:
    said = plan("--measured", str(tmp_path))
    assert said.exit_code == 11 and said.stderr.startswith(
        f"speedrun: {tmp_path} has no runs/try8/try8.json, and no runs/try/report/result.json: name "
    )
    (tmp_path / "other.json").write_text("[]")
    assert "holds no trial of `speedrun try8`" in plan("--measured", str(tmp_path / "other.json")).stderr


def test_the_documents_tables_are_what_plan_prints() -> None:
    root = Path(__file__).parents[3]
    printed = plan("run6", "fast").stdout
    quoted = "\n".join(f"    {line}".rstrip() for line in printed.splitlines())
    assert quoted in (root / "docs" / "results.md").read_text(encoding="utf-8")
    readme = (root / "README.md").read_text(encoding="utf-8")
    table = [line.strip("| ").split(" | ")[1:] for line in readme.splitlines() if re.match(r"\| `(run6|fast)`", line)]
    rows = [re.split("  +", line)[1:] for line in printed.splitlines()[1:]]
    assert len(table) == 2
    for column, figures in enumerate(table):
        assert len(figures) == 3 and set(figures) <= {row[column] for row in rows if len(row) == 2}


def test_presets_side_by_side() -> None:
    table = plan("run6", "smoke", "try").stdout
    assert table.splitlines()[0].split() == ["run6", "smoke", "try"]
    assert "a CPU, minutes" in table and "CORE  " in table
    (scored,) = (line for line in table.splitlines() if line.startswith("CORE"))
    assert scored.count("published") == 1, "50 steps do not score as 5,568 did"
    documents = json.loads(plan("run6", "fast", "--json").stdout)
    assert [document["preset"] for document in documents] == ["run6", "fast"]
    said = plan("run6", "--preset", "fast")
    assert (said.exit_code, said.stderr) == (
        2,
        "speedrun: --preset fast and run6 contradict each other; give one of them\n",
    )


def test_a_try_on_one_gpu_prices_the_run_on_eight(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    result = {"clocks": {"training_s": 39 * 9.0}, "steps": 50}
    result["provenance"] = {"gpus": ["NVIDIA H100 80GB HBM3"], "commit": "0123456789abcdef"}
    store.put("runs/try/report/result.json", json.dumps(result).encode(), "application/json")
    recipe = json.dumps(recipe_document(resolve("try"), "try")).encode()
    store.put("runs/try/recipe.json", recipe, "application/json")
    measured = Measured.at(str(tmp_path))
    mine = make_plan(resolve("try"), measured=measured).on_node
    assert mine.step_seconds == pytest.approx(9.0) and mine.training[0] == mine.training[1]
    eight, fitted = (make_plan(resolve("run6"), measured=given).on_node for given in (measured, None))
    apart, one = 0.0253, make_plan(resolve("try")).on_node.step_seconds
    assert eight.step_seconds == pytest.approx((fitted.step_seconds - apart) * 9.0 / one + apart, rel=5e-3)
    assert eight.training[0] < eight.training[1], "carried to eight it has the fit's error"


def test_the_offers_are_priced_with_what_is_paid_besides() -> None:
    made = make_plan(resolve("run6"))
    upload = made.on_node.upload
    assert upload.checkpoints / 1e9 == pytest.approx(2 * 9.97, rel=0.02), "at 45 and 90 minutes"
    assert (upload.checkpoints + upload.last / 2) / 12 < 0.21 * 10e9, "a fifth of twelve checkpoints"
    often = make_plan(resolve("run6", overrides=["train.upload_minutes=0"])).on_node.upload
    assert often.checkpoints == pytest.approx(11 * upload.checkpoints / 2)
    bids = {bid["offer"]["cloud"]: bid for bid in made.document()["node"]["bids"] if bid["offer"]["spot"]}
    assert bids["nebius"]["egress"] is None, "what nobody told us stays unknown"
    assert bids["gcp"]["egress"] == pytest.approx(0.12 * upload.total / 1e9)
    assert bids["aws"]["ceiling"] > bids["aws"]["node"][1]


@pytest.mark.parametrize(("margin", "runs"), [(0.006, 9), (0.0125, 5), (0.002, 48)])
def test_the_runs_that_would_show_it(margin: float, runs: int) -> None:
    """Published: about 9, 5 and 50."""
    assert published_runs.runs_needed(GPT2_XL_CORE + margin) == runs
    assert published_runs.runs_needed(GPT2_XL_CORE - margin) is None


def test_the_chance_of_one_run() -> None:
    """Published: 54 % at a mean of 0.2571, 86 % at 0.2626, 99 % at 0.2690."""
    chances = [published_runs.chance_of_passing(mean) for mean in (0.2571, 0.2626, 0.2690)]
    assert [round(chance, 2) for chance in chances] == [0.54, 0.86, 0.99]


def test_minutes_beside_training_are_the_quotes_other_rows() -> None:
    stages = make_plan(resolve("run6")).on_node.stages
    low, high = money.beside_training(stages)
    by_name = {stage.name: stage for stage in stages}
    left_out = sum(by_name[name].low for name in (money.BOOT, money.TEXT, money.TRAINING, money.IDLE))
    assert low == pytest.approx(money.total(stages)[0] - left_out)
    assert (low + high) / 2 == pytest.approx(6.9, abs=0.1), "the middle; LOG says so"
    assert all(stage.basis and 0 <= stage.low <= stage.high for stage in stages), "a source or a range"
