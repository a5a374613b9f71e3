"""`speedrun evaluate --hf DIR`: models whose folders have the same name share a folder of answers and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.console import Console
from job.evaluation.ledger import Ledger, TaskResult, folder_of, newest, seal_ledger
from job.run import hf_launch


def test_the_page_of_a_model_has_no_score_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, scores = tmp_path / "out", {"mine": 0.2, "other": 0.3}
    monkeypatch.setattr(hf_launch, "check", lambda folder: None)
    monkeypatch.setattr(hf_launch, "start_ranks", lambda arguments, **_: arguments)

    def scored(_stage: str, arguments: list[str], **_: Any) -> None:
        question = json.loads(Path(arguments[2]).read_text())
        name = Path(question["model"]).parent.name
        task = TaskResult("copa", "multiple_choice", 10, 0, scores[name], 0.5, scores[name], 0.01, 1.0, 1.0)
        made_from = {"weights": name, "bundle": "b", "cap": question["cap"], "dtype": "bf16", "backend": "cpu"}
        ledger = Ledger("core", scores[name], 0.01, (task,), made_from)
        seal_ledger(folder_of(Path(arguments[3]), made_from), ledger)

    monkeypatch.setattr(hf_launch, "supervise", scored)
    for name, cap in (("mine", 20), ("other", 20), ("mine", 10), ("other", 10)):
        asked = hf_launch.options("bundle.zip", [f"eval.cap={cap}"])
        ledger = hf_launch.evaluate(out, tmp_path / name / "export", asked, ranks=1, console=Console(-1))
        result = json.loads((out / "hf" / "export" / "report" / "result.json").read_text())
        assert ledger.metric == result["core"]["metric"] == scores[name], "the fullest of this model"
        assert {each["weights"] for each in result["evaluations"]} == {name}
    assert len(result["evaluations"]) == 2 and Ledger.open(newest(out / "hf" / "export")).metric == scores["other"]
