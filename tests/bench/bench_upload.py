"""What a bucket costs training: step times while the store answers, while it blocks, and without any.

make bench, or: python -m pytest tests/bench/bench_upload.py --override-ini "python_files=bench_*.py" --capture=no
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gate import Gate
from job.recipe.leaderboard import UNTIMED_STEPS
from job.store.attempt import read_events

STEPS = 200
TURN = 2.0
"""seconds for which the store answers, then blocks, in turn"""
OPTIONS = ("-o", f"train.steps={STEPS}", "-o", "train.checkpoint_every=10", "-o", "train.val_every=0")


def steps_of(out: Path) -> list[dict[str, Any]]:
    events = [e for e in read_events(out / "runs" / "t") if e["kind"] == "train.step"]
    return events[UNTIMED_STEPS:]


def turning(run: Any, out: Path, url: str, hole: Any) -> list[tuple[float, float]]:
    """Train while `hole` is shut and opened in turn; the (start, end) of the times in which it was shut."""
    process = run.start(run.tiny("pretrain", out, "--bucket", url, "--bucket-wait", "0.02", *OPTIONS))
    shut = []
    while not steps_of(out):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    for turn in itertools.count():
        began = time.time()
        if turn % 2:
            hole.shut.set()
        time.sleep(TURN)
        if hole.shut.is_set():
            shut.append((began, time.time()))
            hole.shut.clear()
        if process.poll() is not None or len(steps_of(out)) >= STEPS - UNTIMED_STEPS:
            break
    process.communicate()
    return shut


def test_a_blocked_store_against_a_good_one_in_the_same_run(tmp_path: Path, speedrun: Any, s3: Any) -> None:
    (tmp_path / "without").mkdir()
    speedrun(speedrun.tiny("pretrain", tmp_path / "without", *OPTIONS))
    hole = Gate(urlsplit(s3.endpoint).port)
    run = dataclasses.replace(speedrun, variables=s3.variables() | {"AWS_ENDPOINT_URL": hole.url})
    (tmp_path / "with").mkdir()
    (tmp_path / "with" / "prepared").symlink_to(tmp_path / "without" / "prepared")
    shut = turning(run, tmp_path / "with", s3.url, hole)
    blocked, answered = [], []
    for event in steps_of(tmp_path / "with"):
        inside = any(began + event["ms"] / 1000 < event["t"] < ended for began, ended in shut)
        (blocked if inside else answered).append(event["ms"])
    columns = {
        "the store answers": answered,
        "it blocks, same run": blocked,
        "no bucket, run before": [e["ms"] for e in steps_of(tmp_path / "without")],
    }
    print(f"\n\nms a step of the tests' tiny model, a checkpoint every 10 steps, the store turning every {TURN:.0f} s")
    print(f"{'':>24} {'steps':>6} {'median':>8} {'p90':>8}")
    for name, values in columns.items():
        p90 = statistics.quantiles(values, n=10)[-1]
        print(f"{name:>24} {len(values):>6} {statistics.median(values):>8.1f} {p90:>8.1f}")
    print(f"blocked / answering, medians: {statistics.median(blocked) / statistics.median(answered):.3f}")
