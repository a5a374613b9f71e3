"""The trial of sky/try8.yaml on eight small ranks over gloo, with a real S3 server: every part holds."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY
from job.console import Console
from job.errors import ExitCode, SpeedrunError, UsageError
from job.plan.measured import KEY, has_passed
from job.recipe.config import resolve
from job.run.bucket import Bucket
from job.run.try8 import Trial
from job.store import open_store
from job.store.attempt import Attempt

EIGHT = ("train.device_batch_size=1", "train.dtype=bf16")  # which comm.bf16 wants
SMALL = (*TINY, *EIGHT, "train.steps=20", "train.checkpoint_every=10", "train.val_every=0", "eval.cap=4")


@pytest.mark.slow
def test_eight_ranks_pass(tmp_path: Path, s3: Any, speedrun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there = dataclasses.replace(speedrun, variables=s3.variables())
    words = ["try8", "--preset", "smoke", "--data", str(speedrun.data), "--out", str(tmp_path / "out"), "--ranks", "8"]
    said = there(there.command(*words, "--bucket", s3.url, *(word for value in SMALL for word in ("-o", value)))).stderr
    s3.enter(monkeypatch)
    store = open_store(s3.url)
    found = json.loads(store.get(KEY))
    assert found["passed"] and all(part["passed"] for part in found["parts"])
    verdicts = {part["part"]: part["said"] for part in found["parts"]}
    assert list(verdicts) == ["doctor", "warm-up", "SIGTERM", "resume", "silence", "exact resume", "CORE", "upload"]
    assert "rank 7 of pretrain fell silent" in said and verdicts["silence"].startswith("rank 7 is named, exit 75 ")
    assert verdicts["exact resume"].endswith("the first loss is equal, the others within 0.0e+00")
    assert verdicts["CORE"].startswith("22 tasks")
    assert set(found["step_seconds"]) == {"on", "off", "bf16"}
    assert all(each["median"] > 0 and each["steps"] >= 3 for each in found["step_seconds"].values())
    assert has_passed(store, found["stack"]["revision"], None) and not has_passed(store, "another", None)


def trial(tmp_path: Path, *overrides: str, seconds: float = 60.0) -> Trial:
    recipe, bucket = resolve("smoke", {}, (*SMALL, *overrides)), Bucket(open_store(str(tmp_path / "bucket")), 0)
    words = ["--preset", "smoke", "--out", str(tmp_path / "out")]
    return Trial(tmp_path / "out", recipe, words, ranks=None, bucket=bucket, seconds=seconds, console=Console(-1))


@pytest.mark.parametrize(
    ("program", "code", "sentence"),
    [
        ("raise SystemExit(10)", ExitCode.PREFLIGHT, "this machine is refused"),
        ("raise SystemExit(75)", ExitCode.DATA, "this machine is refused"),
        ("import time; time.sleep(60)", ExitCode.DATA, "no time was left for its end"),
    ],
)
def test_a_part_that_fails_ends_it_and_all_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, code: ExitCode, sentence: str
) -> None:
    tried = trial(tmp_path, seconds=0.1 if "time" in program else 60.0)
    monkeypatch.setattr(tried, "_command", ["python", "-c", program])
    with pytest.raises(SpeedrunError) as failed:
        tried.run()
    assert failed.value.exit_code == code and str(failed.value).startswith(f"try8 failed at doctor: {sentence}; ")
    found = json.loads((tmp_path / "bucket" / KEY).read_text())
    assert not found["passed"] and [part["said"] for part in found["parts"]] == [sentence, *["not reached"] * 7]


def test_only_what_the_newest_attempt_says_counts_whatever_the_date_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = trial(tmp_path)
    monkeypatch.setattr(tried, "_command", ["python", "-c", "pass"])
    for step, clock in ((1, 0.0), (2, -7200.0), (3, -7200.0)):
        tried._start("run", stdout=None)
        now = time.time() + clock
        monkeypatch.setattr("job.store.attempt.time.time", lambda now=now: now)
        assert tried._events("train.step") == []
        if step == 3:
            shutil.rmtree(tried._run)  # as --fresh does: attempts are counted from 1 again
        Attempt.claim(tried._run).emit("train.step", step=step)
        assert [event["step"] for event in tried._events("train.step")] == [step]


def test_checkpoints_that_leave_no_room_for_the_parts_are_refused(tmp_path: Path) -> None:
    for override in ("train.checkpoint_every=0", "train.checkpoint_every=17"):
        with pytest.raises(UsageError, match=r"train.checkpoint_every=\d+ cannot be tried: give 6 or more"):
            trial(tmp_path, override)
