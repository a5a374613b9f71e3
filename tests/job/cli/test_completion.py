"""The tab key, through click's own completion."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from job.cli.commands import main
from job.recipe.config import preset_names


def offered(*words: str) -> list[str]:
    *before, begun = words
    found = ShellComplete(main, {}, "speedrun", "_SPEEDRUN_COMPLETE").get_completions(before, begun)
    return [item.value for item in found]


def test_presets_and_keys() -> None:
    assert offered("plan", "") == offered("run", "--preset", "") == preset_names()
    assert offered("smoke", "--preset", "run") == ["run1", "run2", "run3", "run4", "run6"]
    assert offered("run", "-o", "train.st") == ["train.steps="]
    assert "presets" in offered("pr") and "--preset" in offered("run", "--pre")


@pytest.mark.parametrize("words", [("status",), ("report", "--run-id"), ("compare", "mine"), ("certify", "a", "b")])
def test_runs_of_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    for out, name in (("out", "mine"), ("out", "other"), ("elsewhere", "mine-too")):
        (tmp_path / out / "runs" / name).mkdir(parents=True)
        (tmp_path / out / "runs" / name / "recipe.json").write_text("{}")
    (tmp_path / "out" / "runs" / "no-run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert offered(*words, "") == ["mine", "other"]
    assert offered(words[0], "--out", "elsewhere", *words[1:], "mi") == ["mine-too"]
