"""A whole run through the command line: stages, sealed results, resume, interruption. Every stage is the real one,
tiny."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from conftest import Finished
from helpers import command_line, events, ranks_of, result, wait_for, wait_for_event, weights
from job.recipe.config import resolve
from job.run.launch import open_run
from job.run.supervise import Interrupts
from job.store.attempt import Attempt, fold, read_events
from job.store.fence import TakenOver


def prepared_hashes(out: Path) -> dict[str, str]:
    """SHA-256 by path of the files below out/prepared; manifests hold times, and notes say what was verified."""
    import hashlib

    files = (p for p in (out / "prepared").rglob("*") if p.is_file() and p.name != "manifest.json")
    files = (p for p in files if ".verified-" not in p.name)
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_run_folder_is_as_designed(finished: Finished) -> None:
    run = finished.out / "runs" / "t"
    assert {p.name for p in run.iterdir()} == {
        "recipe.json",
        "attempts",
        "events",
        "logs",
        "checkpoints",
        "eval",
        "report",
    }
    assert sorted(p.name for p in (run / "report").iterdir()) == [
        "manifest.json",
        "report.html",
        "report.md",
        "result.json",
    ]
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [f"{rows:015d}" for rows in (32, 64, 96)]
    assert [p.name for p in sorted((run / "checkpoints" / f"{96:015d}").iterdir())] == [
        "manifest.json",
        "optimizer-00000.safetensors",
        "weights-00000.safetensors",
    ]
    assert json.loads((run / "recipe.json").read_text())["sources"]["train.steps"] == "-o"
    found = result(finished.out)
    assert found["core"] is None
    assert len(found["smoke_score"]["tasks"]) == 22
    assert found["steps"] == 12
    assert found["tokens"] == 12 * 512
    assert found["val_bpb"] > 0
    assert found["bigram_bpb"] > 0


def test_events_tell_the_story_in_order(finished: Finished) -> None:
    kinds = [e["kind"] for e in read_events(finished.out / "runs" / "t")]
    assert kinds[0] == "attempt.started"
    assert kinds[-1] == "attempt.ended"
    assert kinds.count("train.step") == 12
    assert kinds.index("checkpoint.sealed") < kinds.index("eval.done")
    stages = [e["stage"] for e in read_events(finished.out / "runs" / "t") if e["kind"] == "stage.done"]
    assert stages == ["prepare", "pretrain", "evaluate", "report"]


def test_the_same_command_again_does_nothing_twice(finished: Finished, tmp_path: Path, speedrun) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished.out, out)
    before = weights(out)
    Attempt.claim(out / "runs" / "t").close()
    said = speedrun(speedrun.tiny("run", out)).stderr
    assert f"warning: attempt 2 of this run goes on in process {os.getpid()}: it will stop" in said
    assert "pretrain: done already" in said
    assert "evaluate: done already" in said
    assert weights(out) == before
    assert len(events(out, "train.step")) == 12


def test_json_prints_the_result_and_nothing_else(finished: Finished) -> None:
    assert json.loads(finished.stdout) == result(finished.out)


def test_a_changed_recipe_is_refused_and_fresh_starts_anew_and_may_diverge(
    finished: Finished, tmp_path: Path, speedrun
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished.out, out)
    refused = speedrun.here(speedrun.tiny("run", out, "-o", "train.steps=10"), code=2)
    assert refused.stderr == (
        "speedrun: run t was begun with another recipe (train.steps: 12 -> 10); take another --run-id (--from t"
        " goes on with its weights), or --fresh to discard the old run\n"
    )
    assert weights(out) == weights(finished.out)
    said = speedrun(speedrun.tiny("pretrain", out, "-o", "train.lr_scale=1e30", "--fresh", "--yes"), code=13).stderr
    assert [e["attempt"] for e in events(out, "attempt.started")] == [1]
    assert "training diverged at step " in said
    assert said.rstrip().endswith("lower train.lr_scale and start with --fresh")


def test_an_attempt_that_is_still_alive_learns_of_one_that_began_anew(tmp_path: Path) -> None:
    """Counted from 1 again, the new one would have the number of the old one, and each would seal the other's parts."""

    def begun(fresh: bool = True) -> Attempt:
        return Attempt.claim(open_run(tmp_path, "t", resolve("smoke"), fresh=fresh))

    begun(fresh=False).emit("attempt.ended", exit_code=75, reason="interrupted")
    alive = begun()
    assert alive.number == 1, "nobody is left of the one before"
    new = begun()
    with pytest.raises(TakenOver, match="attempt 2 took over run t"):
        alive.check_newest()
    new.check_newest()
    assert {path.name for path in new.run.iterdir()} == {"recipe.json", "attempts", "events"}
    assert [path.name for path in (new.run / "events").iterdir()] == ["2.jsonl"]


def test_a_wrong_variable_is_refused_before_an_attempt_is_claimed(
    tmp_path: Path, speedrun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEEDRUN_STOP_SECONDS", "soon")
    said = speedrun.here(speedrun.tiny("run", tmp_path), code=2).stderr
    assert said == "speedrun: SPEEDRUN_STOP_SECONDS=soon cannot be used: give a positive number of seconds\n"
    assert not (tmp_path / "runs" / "t" / "attempts").exists()


def test_an_evaluation_that_is_refused_changes_nothing(finished: Finished, tmp_path: Path, speedrun) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished.out, out)
    before = (out / "runs" / "t" / "recipe.json").read_bytes()
    words = speedrun.command("evaluate", "--run-id", "t", "--out", str(out), "-o", "eval.cap=2")
    said = speedrun.here(words, code=2).stderr
    assert "a cap of 2 examples per task leaves too few for the" in said
    assert (out / "runs" / "t" / "recipe.json").read_bytes() == before


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_while_stepping_seals_a_checkpoint_and_the_same_command_makes_the_same_bytes(
    finished: Finished, tmp_path: Path, speedrun, name: str
) -> None:
    process = speedrun.start(speedrun.tiny("pretrain", tmp_path))
    wait_for_event(tmp_path, process, "train.step", step=1)
    process.send_signal(signal.Signals[name])
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert time.monotonic() - began < 20
    assert "with a checkpoint; the same command goes on" in said
    assert "Traceback" not in said
    stopped_after = len(events(tmp_path, "train.step"))
    assert stopped_after < 12
    assert int(max((tmp_path / "runs" / "t" / "checkpoints").iterdir()).name) == stopped_after * 8
    speedrun(speedrun.tiny("pretrain", tmp_path))
    assert len(events(tmp_path, "train.step")) == 12, "no step was done twice"
    assert prepared_hashes(tmp_path) == prepared_hashes(finished.out)
    assert weights(tmp_path) == weights(finished.out)
    assert [life.exit_code for life in fold(tmp_path / "runs" / "t").attempts] == [75, 0]


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    with Interrupts() as interrupts:
        for wished in (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupts.count == wished and interrupts.name == "SIGTERM"
            time.sleep(Interrupts.TOGETHER * 1.5)


KILLED_AT = (
    ("stage.started", {"stage": "prepare"}),
    ("prepare.tokenizer", {}),
    ("stage.started", {"stage": "pretrain"}),
    ("train.step", {"step": 5}),
    ("stage.started", {"stage": "evaluate"}),
    ("eval.task", {}),
    ("stage.started", {"stage": "report"}),
)


@pytest.mark.slow
def test_sigkill_in_any_stage_and_the_same_command_again(finished: Finished, tmp_path: Path, speedrun) -> None:
    """One run is killed at each of these events in turn, then left to end."""
    for attempt, (kind, fields) in enumerate(KILLED_AT, 1):
        process = speedrun.start(speedrun.tiny("run", tmp_path))
        wait_for_event(tmp_path, process, kind, attempt=attempt, **fields)
        process.kill()
        process.communicate()
    speedrun(speedrun.tiny("run", tmp_path))
    assert weights(tmp_path) == weights(finished.out)
    assert prepared_hashes(tmp_path) == prepared_hashes(finished.out)
    mine, undisturbed = result(tmp_path), result(finished.out)
    for key in ("val_bpb", "bigram_bpb", "tokens", "steps"):
        assert mine[key] == undisturbed[key], key
    scores = [[(t["task"], t["accuracy"]) for t in r["smoke_score"]["tasks"]] for r in (mine, undisturbed)]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_75_and_nothing_stays_behind(prepared: Path, speedrun) -> None:
    process = speedrun.start(speedrun.tiny("run", prepared))
    wait_for_event(prepared, process, "train.step", step=0)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 1
    os.kill(ranks[0], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "rank 0 of pretrain was killed by SIGKILL" in said


@pytest.mark.slow
def test_ranks_end_when_their_supervisor_is_killed(prepared: Path, speedrun) -> None:
    process = speedrun.start(speedrun.tiny("run", prepared, "-o", "train.steps=4000"))
    wait_for_event(prepared, process, "train.step", step=0)
    ranks = ranks_of(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not any("job.run.rank" in command_line(p) for p in ranks), 10, "a rank outlived its supervisor")


@pytest.mark.slow
def test_two_ranks_train_the_same_rows(finished: Finished, prepared: Path, speedrun) -> None:
    speedrun(speedrun.tiny("pretrain", prepared, "--ranks", "2"))
    losses = [[e["loss"] for e in events(out, "train.step")] for out in (prepared, finished.out)]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4), (
        "the first step has the same weights and the same rows"
    )
    assert len(weights(prepared)) == 2


@pytest.mark.slow
def test_a_full_disk_ends_with_12_and_with_space_the_same_command_goes_on(
    finished: Finished, tmp_path: Path, speedrun
) -> None:
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        said = speedrun(speedrun.tiny("pretrain", tmp_path), code=12).stderr
        assert "the disk is full: writing " in said
        assert "Traceback" not in said
        assert not list(tmp_path.rglob(".*.tmp-*"))
        subprocess.run(["mount", "-o", "remount,size=400m", str(tmp_path)], check=True)
        speedrun(speedrun.tiny("pretrain", tmp_path))
        assert weights(tmp_path) == weights(finished.out)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.slow
def test_fp8_trains_on_a_cpu_and_says_how_well_and_that_it_is_for_tests(prepared: Path, speedrun) -> None:
    ended = speedrun(
        speedrun.tiny("pretrain", prepared, "-o", "train.fp8=true", "-o", "train.dtype=bf16", "-o", "train.steps=4")
    )
    assert re.search(r"^cpu: fp8 agrees with fp32 \(at most \d", ended.stderr, re.MULTILINE)
    assert "it is for tests" in events(prepared, "train.start")[0]["fp8"]
    assert len(events(prepared, "train.step")) == 4
