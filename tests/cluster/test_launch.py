"""sky/*.yaml launched for real: SkyPilot, a Slurm of two nodes, an S3 server; a managed job that is preempted in
training.

Only `resources` differ from what users launch. A preemption is `scancel`: the nodes and what is on their disks are
gone.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from helpers import wait_for

pytestmark = pytest.mark.slow

OPTIONS = (
    "-o model.depth=2 -o model.seq_len=64 -o data.vocab_size=512 -o data.max_chars=400000 "
    "-o eval.cap=12 -o eval.samples=0 "
    "-o train.steps=120 -o train.total_batch_size=1024 -o train.device_batch_size=4 -o train.checkpoint_every=20 "
    "-o train.val_every=0 -o train.val_tokens=4096 -o train.threads=1 -o train.dtype=fp32"
)


def stored(s3: Any, key: str) -> bytes:
    return s3.client().get_object(Bucket=s3.bucket, Key=f"{s3.prefix}/{key}")["Body"].read()


def events(s3: Any, run: str, attempt: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stored(s3, f"runs/{run}/events/{attempt}.jsonl").splitlines()]


def weights(manifest: dict[str, Any]) -> dict[str, str]:
    """name -> SHA-256 of a sealed checkpoint's files."""
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def sealed_steps(s3: Any, run: str) -> list[str]:
    """Manifests of the stored checkpoints, the last step's last."""
    return [key for key in s3.keys() if key.startswith(f"runs/{run}/checkpoints/") and key.endswith("manifest.json")]  # noqa: SIM118


def test_launch(cluster: Any, s3: Any) -> None:
    task = cluster.task("smoke", cpus="2+")
    cluster.call("launch", "-y", "-c", "smoke", *cluster.given(s3, OPTIONS=OPTIONS), str(task), seconds=600)
    cluster.sky("down", "-y", "smoke", seconds=120).wait()
    result = json.loads(stored(s3, "runs/smoke/report/result.json"))
    assert (result["state"], result["steps"], result["attempts"]) == ("complete", 120, 1)
    assert stored(s3, "runs/smoke/report/report.html").startswith(b"<!DOCTYPE html>")
    assert s3.secret not in cluster.said()


def test_managed_job_on_two_nodes_is_preempted_and_recovers(
    cluster: Any, s3: Any, speedrun: Any, tmp_path: Path
) -> None:
    plain = speedrun.command(
        "run", "--preset", "smoke", "--run-id", "whole", "--ranks", "4", "--out", str(tmp_path), *OPTIONS.split()
    )
    speedrun(plain)
    manifest = sorted((tmp_path / "runs" / "whole" / "checkpoints").glob("*/manifest.json"))[-1]

    task = cluster.task("speedrun", accelerators="H100:2")
    given = cluster.given(s3, PRESET="smoke", RUN_ID="job", OPTIONS=OPTIONS)
    asked = ["--infra", "slurm", "--no-use-spot", "--num-nodes", "2"]
    job = cluster.sky("jobs", "launch", "-y", *asked, *given, str(task), seconds=900)
    try:
        wait_for(lambda: sealed_steps(s3, "job") or job.poll() is not None, 600, cluster.said, every=0.5)
        assert job.poll() is None, cluster.said()
        first = cluster.slurm("squeue", "--noheader", "--format=%i", "--states=RUNNING")
        cluster.slurm("scancel", first)
        preempted = time.time()
        assert job.wait(920) == 0, cluster.said()
    finally:
        job.kill()

    final = json.loads(stored(s3, sealed_steps(s3, "job")[-1]))
    assert weights(final) == weights(json.loads(manifest.read_text()))
    result = json.loads(stored(s3, "runs/job/report/result.json"))
    assert (result["state"], result["steps"], result["attempts"]) == ("complete", 120, 2)
    assert result["machine"]["world_size"] == 4
    recovered = events(s3, "job", 2)
    began = next(event for event in recovered if event["kind"] == "train.start")
    assert began["step"] > 0, "it went on from a checkpoint in the bucket: the first nodes' disks are gone"
    print("\n".join(recovery_table(cluster.state / "disks", preempted, recovered)))


def recovery_table(disks: Path, preempted: float, recovered: list[dict[str, Any]]) -> list[str]:
    """Seconds from the preemption to the first new step, by part."""
    started = min(began for path in disks.glob("*/started") if (began := float(path.read_text())) > preempted)
    moments = [("scancel to the recovered job's start (SkyPilot: notice, allocate, set up)", started)]
    parts = {
        "attempt.started": "imports, the nodes meet, the attempt is claimed in the bucket",
        "stage.started pretrain": "prepared set pulled and verified",
        "train.start": "newest checkpoint pulled; ranks start, load, join",
        "train.step": "first new step",
    }
    for kind, words in parts.items():
        name, _, stage = kind.partition(" ")
        moments.append((words, next(e["t"] for e in recovered if e["kind"] == name and stage in ("", e.get("stage")))))
    before = [preempted, *(t for _, t in moments)]
    rows = [f"{t - earlier:7.1f} s  {words}" for (words, t), earlier in zip(moments, before, strict=False)]
    return ["", *rows, f"{moments[-1][1] - started:7.1f} s  from the recovered job's start to its first new step"]
