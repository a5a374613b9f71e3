"""Runs that an older program made: two finished ones still open with `report`, and an interrupted one still goes on.

All three were made by commit 7f2d394 (Python 3.11, torch 2.13.0 on a CPU); the commands are in their attempts. `smoke`
is the default flow with embedded text; `ranks` had two ranks, the older architecture, two files of text, validations
and a bucket; `interrupted` got SIGTERM in its second step. They are as small as a recipe can be: one block, 16 tokens a
row, fp32 so that every machine can go on.

Weights do not compress, so those of the two finished runs are left out: `report` wants the files to be there and does
not read them. The interrupted run is whole, which makes it 2.3 MB.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from helpers import KEPT_RUNS, unpacked_run

TOLERANCE = 1e-3
"""Of a step's loss. Torch's plain kernels instead of this CPU's gave losses that differ by at most 5e-7; with the first
moments of the optimizer set to zero in the checkpoint the step after the first already differs by 7e-3 (both measured
on this run)."""


def result_of(run: Path) -> dict:
    return json.loads((run / "report" / "result.json").read_text())


@pytest.mark.parametrize("name", ["smoke", "ranks"])
def test_a_finished_run_opens_with_report(tmp_path: Path, speedrun, name: str) -> None:
    run = unpacked_run(name, tmp_path)
    kept = result_of(run)
    for path in (run / "report").iterdir():
        path.unlink()
    speedrun(speedrun.command("report", "--run-id", name, "--out", str(tmp_path / "out")))
    result = result_of(run)
    for key in ("state", "val_bpb", "bigram_bpb", "steps", "tokens", "parameters"):
        assert result[key] == kept[key] and kept[key], key
    scores = [[(task["task"], task["accuracy"]) for task in found["smoke_score"]["tasks"]] for found in (result, kept)]
    assert scores[0] == scores[1] and len(scores[1]) == 22
    assert result["smoke_score"]["metric"] == kept["smoke_score"]["metric"]
    assert result["unhashed"][:2] == ["eval/bpb", "eval/ledger"] and len(result["unhashed"]) > 2
    assert f"{kept['val_bpb']:.3f}" in (run / "report" / "report.html").read_text()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path: Path, speedrun) -> None:
    run = unpacked_run("interrupted", tmp_path)
    undisturbed = json.loads((KEPT_RUNS / "undisturbed.json").read_text())
    command = speedrun.command(*json.loads((run / "attempts" / "1").read_text())["argv"])
    ended = subprocess.run(
        command, cwd=tmp_path, env=speedrun.environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    events = [
        json.loads(line)
        for attempt in (1, 2)
        for line in (run / "events" / f"{attempt}.jsonl").read_text().splitlines()
    ]
    steps = [(event["attempt"], event["step"]) for event in events if event["kind"] == "train.step"]
    assert steps == [(1, 0), (1, 1), *((2, step) for step in range(2, 12))], "no step was done twice, none left out"
    assert {event["attempt"] for event in events if event["kind"] in ("prepare.tokenizer", "prepare.rows")} == {1}
    losses = [event["loss"] for event in events if event["kind"] == "train.step"]
    assert losses == pytest.approx(undisturbed["losses"], abs=TOLERANCE)
    assert [event["exit_code"] for event in events if event["kind"] == "attempt.ended"] == [75, 0]
    assert result_of(run)["val_bpb"] == pytest.approx(undisturbed["val_bpb"], abs=TOLERANCE)
