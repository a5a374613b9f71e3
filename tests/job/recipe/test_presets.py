"""The presets against the leaderboard: steps and FLOPs to the digit, and what each says of itself."""

from __future__ import annotations

import pytest

from job.data.embedded import MOST_CHARS
from job.data.hub import CROP_SHARE, Dataset
from job.machine.gpus import check_count, find_gpu
from job.plan.published_runs import RUNS
from job.plan.quote import CHARS_PER_TOKEN
from job.recipe.config import known_keys, preset_header, preset_names, resolve
from job.recipe.derive import derive


@pytest.mark.parametrize(
    ("name", "steps", "flops", "batch", "val_tokens", "decay"),
    [
        ("run1", 16704, 43307841312289456128, 1 << 19, 20 << 19, 0.0500),
        ("run2", 14889, None, 1 << 19, 40 << 19, 0.0426),
        ("run3", 7226, None, 1 << 20, 40 << 19, 0.0426),
        ("run4", 12700, None, 1 << 19, 40 << 19, 0.0426),
        ("run6", 5568, None, 1 << 20, 80 << 19, 0.0597),
        ("fast", 5312, None, 1 << 20, 80 << 19, 0.0820),
    ],
)
def test_published_numbers(name: str, steps: int, flops: int | None, batch: int, val_tokens: int, decay: float) -> None:
    recipe = resolve(name)
    derived = derive(recipe)
    assert (derived.steps, derived.batch_tokens, recipe.train.val_tokens) == (steps, batch, val_tokens)
    assert derived.scaling.flops.value == (flops or derived.scaling.flops_per_token.value * steps * batch)
    assert round(derived.scaling.weight_decay.value, 4) == decay


def test_run_1_flops_as_published() -> None:
    assert float(derive(resolve("run1")).scaling.flops.value) == 4.330784131228946e19


def test_flops_of_the_other_runs() -> None:
    flops = {name: f"{derive(resolve(name)).scaling.flops.value:.4e}" for name in ("run2", "run3", "run4", "run6")}
    assert flops == {"run2": "4.8283e+19", "run3": "4.6866e+19", "run4": "4.1185e+19", "run6": "2.7880e+19"}


@pytest.mark.parametrize(
    ("preset", "name"),
    [("run1", "Run 1"), ("run2", "Run 2"), ("run3", "Run 3"), ("run4", "Run 4 (seed)"), ("run6", "Run 6")],
)
def test_a_run_preset_is_the_published_run(preset: str, name: str) -> None:
    recipe, run = resolve(preset), next(run for run in RUNS if run.name == name)
    derived = derive(recipe)
    assert derived.config == run.config
    assert (derived.steps, derived.batch_tokens) == (run.steps, run.batch_tokens)
    assert (recipe.train.fp8, recipe.data.source, recipe.train.device_batch_size) == (
        run.fp8,
        run.dataset,
        run.device_rows,
    )
    assert recipe.evidence == "published"


def test_no_preset_but_the_runs_is_published() -> None:
    published = {name for name in preset_names() if resolve(name).evidence == "published"}
    assert published == {"run1", "run2", "run3", "run4", "run6"}
    assert {"fast", "d12", "try", "cpu", "smoke"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_says_what_it_is_made_for(name: str) -> None:
    machine = preset_header(name).machine
    count, _, gpu = machine.partition("x")
    if machine != "cpu":
        find_gpu(gpu)
        check_count(int(count))
    assert resolve(name).train.fp8 is False or machine.endswith("h100")


def test_what_run_4_assumes_is_marked() -> None:
    notes = " ".join(preset_header("run4").notes)
    assert "Run 3's is assumed" in notes and "softcap" in notes and "validation tokens" in notes
    ours, theirs = derive(resolve("run4")), derive(resolve("run3"))
    assert ours.config.softcap == theirs.config.softcap == 15
    assert ours.scaling.weight_decay == theirs.scaling.weight_decay
    assert resolve("run4").train.val_tokens == resolve("run3").train.val_tokens


def test_try_is_run_6_for_a_few_steps() -> None:
    try_, run6 = resolve("try").values(), resolve("run6").values()
    assert try_["model"] == run6["model"]
    assert {key for key in known_keys() if _at(try_, key) != _at(run6, key)} == {
        "data.tokenizer_chars",
        "train.steps",
        "train.checkpoint_every",
        "train.val_tokens",
        "eval.cap",
    }


def _at(values: dict[str, dict], key: str) -> object:
    section, _, name = key.partition(".")
    return values[section][name]


def test_the_tokenizer_of_cpu_sees_all_of_the_embedded_text() -> None:
    data = resolve("cpu").data
    assert data.source == "embedded" and min(data.tokenizer_chars, data.document_chars) >= MOST_CHARS


def test_presets_whose_published_validation_is_part_of_a_shard_score_that_part_too() -> None:
    """The first four runs: a shard holds about 40 M tokens of rows, as many as the later ones validate on."""
    shard = Dataset.text_bytes / CHARS_PER_TOKEN * (1 - CROP_SHARE)
    for name in preset_names():
        recipe = resolve(name)
        part = recipe.evidence == "published" and recipe.train.val_tokens < shard
        assert recipe.eval.packed_val == part, name
