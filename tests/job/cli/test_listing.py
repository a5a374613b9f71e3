"""`list`, `status`, `presets`, `keys`: what a person and what a program is shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers import unpacked_run
from job.cli.listing import NARROWEST, table
from job.recipe.config import preset_names, resolve


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return unpacked_run("interrupted", tmp_path)


def test_list_here_and_in_a_bucket(run: Path, speedrun, tmp_path: Path) -> None:
    here = ["--out", str(tmp_path / "out")]
    lines = speedrun.here(speedrun.command("list", *here)).stdout.splitlines()
    assert lines[0].split() == ["run", "state", "steps", "bpb", "score", "$", "last", "word"]
    assert lines[1].split()[:5] == ["interrupted", "stopped", "2", "of", "12"]
    assert "exit 75: stopped before step 2 of 12" in " ".join(" ".join(lines[2:]).split())
    row = json.loads(speedrun.here(speedrun.command("list", *here, "--json")).stdout)[0]
    assert (row["run_id"], row["state"], row["steps"], row["planned_steps"]) == ("interrupted", "stopped", 2, 12)
    bucket = tmp_path / "bucket"
    there = [*here, "--bucket", str(bucket)]
    bucket.mkdir()
    said = speedrun.here(speedrun.command("list", *there)).stdout
    assert said == f"no runs in {bucket}; begin one with: speedrun run\n"
    shutil.copytree(run, bucket / "runs" / run.name)
    assert "interrupted  begun" in speedrun.here(speedrun.command("list", *there)).stdout


def test_status_of_a_bucket_writes_nothing_here(run: Path, speedrun, tmp_path: Path) -> None:
    bucket, out = tmp_path / "bucket", tmp_path / "laptop"
    shutil.copytree(run, bucket / "runs" / run.name)
    there = ["--out", str(out), "--bucket", str(bucket)]
    before = sorted(bucket.rglob("*"))
    said = speedrun.here(speedrun.command("status", run.name, *there)).stdout
    assert said.startswith("Training has stopped before its end.\n") and "speedrun-" not in said
    assert [line for line in said.splitlines()[:-1] if len(line) > 80 and "/" not in line] == []
    assert f"{bucket}/runs/interrupted/report/report.html" in said
    assert said.splitlines()[-1].startswith("  speedrun run --preset smoke --run-id interrupted")
    mine = speedrun.here(speedrun.command("status", run.name, "--out", str(tmp_path / "out"), "--json")).stdout
    theirs = json.loads(speedrun.here(speedrun.command("status", run.name, *there, "--json")).stdout)
    assert theirs["steps"] == 2 and theirs["newest_attempt"] == json.loads(mine)["newest_attempt"]
    assert not out.exists() and sorted(bucket.rglob("*")) == before
    ended = speedrun.here(speedrun.command("status", "interupted", *there), code=2)
    assert f"no run interupted below {bucket}; did you mean interrupted?; there are: interrupted" in ended.stderr


def test_presets_are_all_with_the_plans_minutes_and_dollars(speedrun) -> None:
    rows = {row["preset"]: row for row in json.loads(speedrun.here(speedrun.command("presets", "--json")).stdout)}
    assert sorted(rows) == preset_names()
    node = json.loads(speedrun.here(speedrun.command("plan", "run6", "--json")).stdout)["node"]
    assert (rows["run6"]["minutes"], rows["run6"]["dollars"]) == (node["minutes"], node["dollars"])
    assert (rows["smoke"]["machine"], rows["smoke"]["dollars"]) == ("cpu", None)
    assert all(row["for"].endswith(".") for row in rows.values())


def test_keys_are_all_that_a_recipe_has(speedrun) -> None:
    rows = json.loads(speedrun.here(speedrun.command("keys", "--json")).stdout)
    values = resolve("smoke").values()
    assert [row["key"] for row in rows] == [f"{name}.{key}" for name in values for key in values[name]]
    kinds = {"int": int, "float": float, "bool": bool, "str": str, "list": list}
    assert all(type(row["default"]) is kinds[row["type"]] and row["meaning"] for row in rows)
    shown = speedrun.here(speedrun.command("keys")).stdout
    assert 'train.attention           str    "fastest"\n' in shown
    assert "    number of transformer blocks; a number of blocks from 1 to 100\n" in shown
    assert "train.seed                int    42          seed of the initial weights\n" in shown


def test_the_last_column_takes_the_rest_or_the_lines_below() -> None:
    rows = [["name", "meaning"], ["a", "one two three"], ["b", "/a/path/that/is/longer/than/the/column/it/is/in"]]
    beside = list(table(rows, 6 + NARROWEST))
    assert beside == ["name  meaning", "a     one two three", "b     /a/path/that/is/longer/than/the/column/it/is/in"]
    wide = [["name", "meaning"], ["a", "word " * 12]]
    assert list(table(wide, 6 + NARROWEST))[2] == "      " + " ".join(["word"] * 4)
    assert list(table(rows, 20)) == [
        "name  meaning",
        "a     one two three",
        "b",
        "    /a/path/that/is/longer/than/the/column/it/is/in",
    ]


def test_an_empty_last_cell_needs_no_room() -> None:
    rows = [["run", "last word"], ["a", ""]]
    assert [list(table(rows, width))[-1] for width in range(5, 9)] == ["a"] * 4
