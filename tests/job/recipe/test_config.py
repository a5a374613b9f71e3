"""The recipe: every value has an origin, every wrong key a nearest right one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from job.errors import DataError, UsageError
from job.recipe.config import SECTIONS, differing_keys, from_document, known_keys, preset_names, resolve
from job.recipe.derive import derive, differing_values
from job.run.launch import open_run
from job.store.checkpoint_folder import identity
from job.store.documents import hashed


@pytest.mark.parametrize("name", preset_names())
def test_presets_resolve_and_survive_a_round_trip(name: str) -> None:
    recipe = resolve(name)
    document = {"preset": name, "evidence": recipe.evidence, "recipe": recipe.values(), "sources": dict(recipe.sources)}
    again = from_document(json.loads(json.dumps(document)))
    assert again == recipe
    assert set(recipe.sources) == set(known_keys())
    assert recipe.evidence in ("published", "estimated", "measured")


def test_later_sources_win_and_are_named() -> None:
    recipe = resolve(
        "smoke",
        {"data.source": ("--data", "local"), "data.paths": ("--data", ["a"])},
        ["train.steps=7", "train.steps=9"],
    )
    assert recipe.train.steps == 9
    assert recipe.sources["train.steps"] == "-o"
    assert recipe.sources["data.paths"] == "--data"
    assert recipe.sources["model.depth"] == "preset smoke"
    assert recipe.sources["train.seed"] == "default"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stepps=3", "unknown key 'train.stepps'; did you mean train.steps?"),
        ("trian.steps=3", "unknown key 'trian.steps'; did you mean train.steps?"),
        ("train.steps", "-o train.steps cannot be used: write -o section.key=value, e.g. -o train.steps=100"),
        ("train.steps=many", "train.steps=many cannot be used: give a whole number"),
        ("train.steps=1.5", "train.steps=1.5 cannot be used: give a whole number"),
        ("train.lr_scale=fast", "train.lr_scale=fast cannot be used: give a number"),
        ("train.lr_scale=nan", "train.lr_scale=nan cannot be used: give a positive number, e.g. 1.0"),
        ("train.param_data_ratio=1e305", "train.param_data_ratio=1e+305 cannot be used: give a number below 1e+100"),
        (f"train.steps={10**130}", f"train.steps={10**130} cannot be used: give a number below 1e+100"),
        ("data.split_long=maybe", "data.split_long=maybe cannot be used: give true or false"),
        ("model.depth=0", "model.depth=0 cannot be used: give a number of blocks from 1 to 100"),
        ("model.depth=-4", "model.depth=-4 cannot be used: give a number of blocks from 1 to 100"),
        ("model.seq_len=0", "model.seq_len=0 cannot be used: give a sequence length from 16 to 65536"),
        ("model.seq_len=250", "model.seq_len=250 cannot be used: give a multiple of 16, e.g. 256"),
        ("train.device_batch_size=0", "train.device_batch_size=0 cannot be used: give a positive number of rows"),
        (
            "train.total_batch_size=-1",
            "train.total_batch_size=-1 cannot be used: give a positive number of tokens, or 0 for the published rule",
        ),
        (
            "data.vocab_size=0",
            "data.vocab_size=0 cannot be used: give a size from 266 (bytes, specials and a merge) to 65536 (uint16)",
        ),
        (
            "data.vocab_size=65537",
            "data.vocab_size=65537 cannot be used: give a size from 266 (bytes, specials and a merge) to 65536"
            " (uint16)",
        ),
        ("data.val_fraction=1", "data.val_fraction=1.0 cannot be used: give a share between 0 and 1, e.g. 0.01"),
        ("comm.sm_carveout=132", "comm.sm_carveout=132 cannot be used: give a number from 0 to 64"),
        ("train.dtype=fp16", 'train.dtype=fp16 cannot be used: give "auto", "bf16" or "fp32"'),
    ],
)
def test_bad_overrides_are_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve("smoke", overrides=[override])
    assert str(caught.value) == sentence


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="no preset 'smoek'; did you mean smoke"):
        resolve("smoek")


def test_local_text_needs_a_path() -> None:
    with pytest.raises(UsageError, match="name the text with --data"):
        resolve("smoke", overrides=["data.source=local"])


def test_differing_keys_are_named_with_both_values() -> None:
    old, new = resolve("smoke").values(), resolve("smoke", overrides=["train.steps=7", "data.paths=a,b"]).values()
    assert differing_keys(old, new) == ['data.paths: [] -> ["a", "b"]', f"train.steps: {old['train']['steps']} -> 7"]
    assert differing_keys(old, old) == []


def test_a_run_goes_on_with_another_way_to_communicate_and_with_keys_that_are_younger_than_it(tmp_path: Path) -> None:
    """An older recipe.json has no [comm] and not every key; absent is the default, which is what it ran with."""
    begun, now = resolve("smoke"), resolve("smoke", overrides=["comm.overlap=false", "comm.sm_carveout=16"])
    assert differing_keys(begun.values(), now.values()) == []
    assert differing_keys(begun.values(), now.values(), free=True) == [
        "comm.overlap: true -> false",
        "comm.sm_carveout: 0 -> 16",
    ]
    assert identity(begun, "p") == identity(now, "p")

    run = open_run(tmp_path, "t", begun, fresh=False)
    document = json.loads((run / "recipe.json").read_text())
    del document["recipe"]["comm"], document["recipe"]["train"]["fp8"], document["sha256"]
    document["sources"] = {key: source for key, source in document["sources"].items() if not key.startswith("comm.")}
    old = json.dumps(document)
    (run / "recipe.json").write_text(old)
    read = from_document(document)
    assert read == begun and read.sources["comm.overlap"] == "default"
    open_run(tmp_path, "t", begun, fresh=False)
    assert (run / "recipe.json").read_text() == old
    open_run(tmp_path, "t", now, fresh=False)
    assert from_document(json.loads((run / "recipe.json").read_text())) == now
    with pytest.raises(UsageError, match=r"was begun with another recipe \(train.fp8: false -> true\)"):
        open_run(tmp_path, "t", resolve("smoke", overrides=["train.fp8=true"]), fresh=False)


@pytest.mark.parametrize(
    "newer", [{"schema": 2}, {"recipe": {"train": {"soap": True}}}, {"recipe": {"lora": {"r": 1}}}]
)
def test_a_recipe_of_a_newer_version_is_refused(newer: dict[str, Any]) -> None:
    recipe = resolve("smoke")
    document = {"schema": 1, "preset": "smoke", "evidence": "", "recipe": recipe.values(), "sources": {}, **newer}
    with pytest.raises(DataError, match=r"newer version \((schema 2|train.soap|lora.r) is unknown here\)"):
        from_document(document)


def test_a_version_that_derives_something_else_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = open_run(tmp_path, "t", resolve("smoke"), fresh=False)
    document = json.loads((run / "recipe.json").read_text())
    document["derived"]["learning_rates.wte"]["value"] *= 10
    document["derived"] |= {"of another version": {"value": 1}}
    (run / "recipe.json").write_text(json.dumps(hashed(document)))
    with pytest.raises(UsageError, match=r"derives other values \(learning_rates.wte: [\d.]+ -> [\d.]+\); go on with"):
        open_run(tmp_path, "t", resolve("smoke"), fresh=False)


def test_values_that_are_younger_than_a_checkpoint_are_their_defaults() -> None:
    recipe = resolve("smoke")
    now = derive(recipe).mathematics(recipe)
    old = {name: value for name, value in now.items() if not name.endswith((".softcap", ".eps", ".warmup_steps"))}
    assert len(old) < len(now) and differing_values(old, now) == differing_values(now, now) == []
    assert differing_values(old, now | {"network.softcap": 20.0, "groups.wte.eps": 1e-8}) == [
        "groups.wte.eps: 1e-10 -> 1e-08",
        "network.softcap: 15.0 -> 20.0",
    ]
    rounded = now | {"groups.wte.lr": now["groups.wte.lr"] * (1 + 1e-15)}
    assert differing_values(now, rounded) == []
    assert differing_values(now | {"network.width": 64, "train.seed": 1}, now) == [
        f"network.width: 64 -> {now['network.width']}",
        "train.seed: 1 -> 42",
    ]


def test_levers_belong_to_a_checkpoint_where_they_change_numbers() -> None:
    recipe = resolve("run6", overrides=["train.levers=shared_input,relu_root"])
    now, plain = derive(recipe).mathematics(recipe), derive(recipe).mathematics(resolve("run6"))
    assert now["train.levers"] == ["relu_root"] and plain["train.levers"] == []
    old = {name: value for name, value in plain.items() if name != "train.levers"}
    assert differing_values(old, plain) == []
    assert differing_values(old, now) == ['train.levers: [] -> ["relu_root"]']
    with pytest.raises(UsageError, match=r"train\.levers=.*shared_imput.* cannot be used: give one of shared_input, "):
        resolve("run6", overrides=["train.levers=shared_imput"])


def test_every_key_is_documented() -> None:
    keys = {f"{name}.{field.name}": field for name, cls in SECTIONS.items() for field in dataclasses.fields(cls)}
    assert [key for key, field in keys.items() if not field.metadata.get("help")] == []
    ruled = [key for key, field in keys.items() if field.type in ("int", "float") and not key.endswith(".seed")]
    assert [key for key in ruled if "give" not in keys[key].metadata] == []
