"""Runs in a list and on a screen: the state of each, and the last word."""

from __future__ import annotations

import json
import shutil

import pytest

from job.report.overview import GONE, cells, rows_here, rows_there, screen
from job.report.result import build_result
from job.run.bucket import Bucket
from job.store.stores import FolderStore


def stopped(run, exit_code=75, reason="SIGTERM: stopped before step 100"):
    attempt = run.start()
    run.prepare(attempt)
    run.pretrain(attempt, last=100)
    if exit_code is not None:
        run.checkpoint(attempt, 100)
        attempt.emit("attempt.ended", exit_code=exit_code, reason=reason)
    attempt.close()
    return run


def test_each_state_here(make_run, clock):
    make_run(run_id="begun")
    make_run(run_id="whole").whole()
    stopped(make_run(run_id="stopped"))
    out = stopped(make_run(run_id="live"), exit_code=None).out
    (make_run(run_id="damaged").path / "recipe.json").write_text("{")
    clock.pass_(10)
    rows = {row["run_id"]: row for row in rows_here(out, clock.now)}
    assert list(rows) == ["live", "stopped", "whole", "begun", "damaged"], "the newest first"
    assert {name: row["state"] for name, row in rows.items()} == {
        "begun": "begun",
        "whole": "complete",
        "stopped": "stopped",
        "live": "running",
        "damaged": "damaged",
    }
    assert rows["live"]["last_word"] == "seen 10 s ago"
    assert rows["stopped"]["last_word"].endswith("UTC, exit 75: SIGTERM: stopped before step 100")
    assert "recipe.json cannot be read" in rows["damaged"]["last_word"]
    assert cells(rows["whole"])[1:6] == ["complete", "200 of 200", "1.700", "smoke 0.0944", "–"]
    assert cells(rows["begun"])[1:] == ["begun", "0 of 200", "–", "–", "–", ""]
    clock.pass_(GONE)
    row = next(row for row in rows_here(out, clock.now) if row["run_id"] == "live")
    assert (row["state"], row["last_word"]) == ("no end seen", "seen 15 min 10 s ago")


def test_a_score_with_a_cap_is_not_shown_as_core_itself(make_run, clock):
    run = make_run()
    attempt = run.start()
    run.pretrain(attempt)
    run.evaluate(attempt, core=True, cap=20)
    assert cells(rows_here(run.out, clock.now)[0])[4] == "CORE 0.0944 of 20 items"


def test_a_bucket_is_read_by_the_results_in_it(make_run, clock, tmp_path):
    make_run(run_id="begun")
    whole = build_result(make_run(run_id="whole").whole().path)
    out = make_run(run_id="damaged").out
    store = FolderStore(tmp_path / "bucket")
    for run in (out / "runs").iterdir():
        shutil.copytree(run, tmp_path / "bucket" / "runs" / run.name, ignore=shutil.ignore_patterns("events"))
    store.put("runs/damaged/report/result.json", b'{"state": 1}')
    store.put("runs/whole/report/result.json", json.dumps(whole).encode())
    rows = {row["run_id"]: row for row in rows_there(store, Bucket(store, 0).run_ids(), clock.now)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "begun": "begun",
        "whole": "complete",
        "damaged": "damaged",
    }
    assert rows["whole"] == rows_here(out, clock.now)[0]
    assert "result.json has no run_id that can be used" in rows["damaged"]["last_word"]


def test_a_result_of_an_earlier_version_has_a_state(make_run, clock, tmp_path):
    run = make_run().whole()
    old = {key: value for key, value in build_result(run.path).items() if key != "newest_attempt"}
    store = FolderStore(tmp_path / "bucket")
    store.put("runs/smoke/report/result.json", json.dumps(old).encode())
    row = rows_there(store, {"smoke"}, clock.now)[0]
    assert (row["state"], row["last_word"], row["val_bpb"]) == ("complete", "", 1.7)


def test_the_screen_of_a_run_that_stopped(make_run, clock):
    run = stopped(make_run(run_id="mine"))
    result, said = screen(run.path, None, clock.now)
    assert result["steps"] == 100
    assert said[0] == "Training has stopped before its end."
    assert f"  page            {run.path}/report/report.html" in said
    assert said[said.index("") + 1 :] != []
    state = next(index for index, line in enumerate(said) if line.startswith("stopped: attempt 1, seen 20"))
    assert said[state + 1].startswith("Step 100 of 200 (50 %), loss 3.7")
    assert said[state + 2 :] == [
        "Attempt 1 ended with exit 75: SIGTERM: stopped before step 100",
        f"The checkpoint of step 100 is safe: {run.path}/checkpoints/000000000003200",
        "Go on with:",
        "  speedrun smoke --run-id mine",
    ]


@pytest.mark.parametrize("uploaded", [True, False])
def test_the_screen_of_a_run_in_a_bucket_says_what_is_safe_there(make_run, clock, uploaded):
    run = make_run(run_id="mine")
    attempt = run.start()
    run.pretrain(attempt, last=100)
    run.checkpoint(attempt, 100)
    if uploaded:
        attempt.emit("upload.done", folder="runs/mine/checkpoints/000000000003200", bytes=7, seconds=0.1)
    attempt.emit("attempt.ended", exit_code=20, reason="the budget is reached")
    shutil.rmtree(run.path / "checkpoints")  # which are not copied from the bucket
    _, said = screen(run.path, "s3://bucket/p", clock.now)
    assert "  page            s3://bucket/p/runs/mine/report/report.html" in said
    safe = "The checkpoint of step 100 is safe: s3://bucket/p/runs/mine/checkpoints/000000000003200"
    assert (safe in said) == uploaded


def test_the_screen_of_a_finished_run_has_nothing_to_go_on_with(make_run, clock):
    _, said = screen(make_run().whole().path, None, clock.now)
    assert said[0] == "The model has learned." and said[-1].startswith("complete: attempt 1, seen 20")
