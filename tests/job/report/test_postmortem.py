"""postmortem.json: from the events of a run, and at the end of real attempts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from job.errors import MEANING, ExitCode
from job.report.postmortem import NAME, postmortem
from job.store.attempt import Attempt


def attempt(run: Path, *events: tuple[str, dict[str, Any]]) -> Attempt:
    claimed = Attempt.claim(run)
    for kind, fields in events:
        claimed.emit(kind, **fields)
    return claimed


def sealed(run: Path, rows: int, step: int) -> tuple[str, dict[str, Any]]:
    folder = run / "checkpoints" / f"{rows:015d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return "checkpoint.sealed", {"rows": rows, "step": step, "folder": folder.name}


def test_it_says_what_was_lost_and_what_is_safe(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "t"
    attempt(
        run,
        ("attempt.started", {}),
        ("stage.started", {"stage": "prepare"}),
        ("prepare.done", {"id": "a5"}),
        ("stage.started", {"stage": "pretrain"}),
        sealed(run, 320, 40),
        ("upload.done", {"folder": "runs/t/checkpoints/000000000000320"}),
        ("train.step", {"step": 47, "ms": 10}),
        ("attempt.ended", {"exit_code": 12, "reason": "the disk is full", "died": {"rank": "rank 0"}}),
    )
    found = postmortem(run, 1, ["run", "--preset", "run6", "--fresh", "--run-id", "my run"], "s3://bucket/p")
    node_s = found.pop("node_s")
    assert node_s >= 0
    assert found == {
        "schema": 1,
        "run_id": "t",
        "attempt": 1,
        "exit_code": 12,
        "meaning": MEANING[ExitCode.STORAGE],
        "reason": "the disk is full",
        "stage": "pretrain",
        "step": 47,
        "died": {"rank": "rank 0"},
        "usd": None,
        "safe": {
            "checkpoint": {
                "step": 40,
                "rows": 320,
                "disk": str(run / "checkpoints" / "000000000000320"),
                "bucket": "s3://bucket/p/runs/t/checkpoints/000000000000320",
            },
            "prepared": "a5",
            "tasks": [],
            "bucket": "s3://bucket/p/runs/t",
        },
        "command": "speedrun run --preset run6 --run-id 'my run'",
    }


@pytest.mark.parametrize("uploaded", [False, True])
def test_a_checkpoint_that_is_nowhere_is_not_safe(tmp_path: Path, uploaded: bool) -> None:
    run = tmp_path / "t"
    events = [("checkpoint.sealed", {"rows": 8, "step": 1, "folder": f"{8:015d}"})]
    events += [("upload.done", {"folder": f"runs/t/checkpoints/{8:015d}"})] * uploaded
    attempt(run, *events, ("attempt.ended", {"exit_code": 75, "reason": "SIGTERM"}))
    safe = postmortem(run, 1, [], "s3://b")["safe"]["checkpoint"]
    assert (safe and safe["bucket"]) == (f"s3://b/runs/t/checkpoints/{8:015d}" if uploaded else None)


@pytest.mark.slow
def test_a_failed_attempt_leaves_one_and_a_good_one_takes_it_away(speedrun: Any, tmp_path: Path) -> None:
    out, run = tmp_path / "out", tmp_path / "out" / "runs" / "t"
    corpus = tmp_path / "corpus"
    shutil.copytree(speedrun.data, corpus)
    (corpus / "bad.jsonl").write_text("no JSON\n")
    here = dataclasses.replace(speedrun, data=corpus)
    said = here(here.tiny("pretrain", out), code=11).stderr
    found = json.loads((run / NAME).read_text())
    assert (found["exit_code"], found["stage"], found["safe"]["checkpoint"]) == (11, "prepare", None)
    assert said.splitlines()[-1] == f"speedrun: {found['reason']}"
    (corpus / "bad.jsonl").unlink()
    here(here.tiny("pretrain", out))
    assert not (run / NAME).exists()
