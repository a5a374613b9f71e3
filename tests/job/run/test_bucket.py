"""Runs with a bucket, through the command line and against a real S3 server: mirrored, resumed elsewhere, fenced, never
waited for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from conftest import Finished
from gate import Gate
from helpers import children, wait_for_event
from job.console import Console
from job.evaluation.ledger import newest
from job.run.bucket import Bucket
from job.store import open_store
from job.store.attempt import Attempt, read_events
from job.store.sealed import MANIFEST, open_sealed

FINAL = f"{96:015d}"


def kinds(out: Path) -> list[str]:
    return [e["kind"] for e in read_events(out / "runs" / "t")]


def weights(out: Path) -> dict[str, str]:
    """SHA-256 by file of the finished model's weights."""
    files = open_sealed(out / "runs" / "t" / "checkpoints" / FINAL, kind="checkpoint").files
    return {name: entry["sha256"] for name, entry in files.items() if name.startswith("weights-")}


def contents(out: Path) -> dict[str, str]:
    """MD5 by path of all that a run leaves on disk and a bucket should have: of logs those that say something."""
    files = (p for p in out.rglob("*") if p.is_file() and p.suffix != ".lock" and ".verified-" not in p.name)
    files = (p for p in files if p.parent.name != "logs" or (p.suffix == ".log" and p.stat().st_size))
    return {p.relative_to(out).as_posix(): hashlib.md5(p.read_bytes()).hexdigest() for p in files}


def stored(s3: Any) -> dict[str, str]:
    """The bucket's ETags by key, which are MD5s."""
    pages = s3.client().get_paginator("list_objects_v2").paginate(Bucket=s3.bucket, Prefix=s3.prefix)
    objects = [entry for page in pages for entry in page.get("Contents", [])]
    return {entry["Key"][len(s3.prefix) + 1 :]: entry["ETag"].strip('"') for entry in objects}


def family(pid: int) -> list[int]:
    """The process and all that it started, directly or not."""
    return [pid, *(member for child in children(pid) for member in family(child))]


@pytest.fixture
def with_s3(speedrun: Any, finished: Finished) -> Any:
    """The command line with the test server's credentials."""
    return dataclasses.replace(speedrun, variables=finished.s3.variables())


def test_the_bucket_has_all_that_the_disk_has(finished: Finished) -> None:
    out = finished.out
    assert stored(finished.s3) == contents(out)
    assert kinds(out)[-1] == "attempt.ended"
    uploads = [e for e in read_events(out / "runs" / "t") if e["kind"] == "upload.done"]
    ledger = newest(out / "runs" / "t" / "eval") / "ledger"
    assert {"runs/t/checkpoints/" + FINAL, str(ledger.relative_to(out))} <= {e["folder"] for e in uploads}


def test_a_log_keeps_no_address_that_shows_the_page(finished: Finished) -> None:
    said, s3 = finished.stderr, finished.s3
    assert f"live page, renewed every minute: {s3.url}/runs/t/report/report.html\n" in said
    assert "Signature" not in said and s3.secret not in said


def test_a_terminal_is_shown_one(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    s3.enter(monkeypatch)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bucket, run = Bucket(open_store(s3.url), 1.0), tmp_path / "runs" / "t"
    bucket.store.put("runs/t/report/report.html", b"<html>", "text/html; charset=utf-8")
    bucket.begin(run, Attempt.claim(run), int(FINAL), Console(), fresh=False)
    said = capsys.readouterr().err
    assert "live page, renewed every minute (the address expires in 7 days):\n" in said
    link = re.search(r"^http\S+report\.html\S+$", said, re.MULTILINE)[0]
    with urllib.request.urlopen(link) as answer:
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert b"<html" in answer.read()
    assert s3.secret not in said


def test_on_a_fresh_machine_the_same_command_finds_everything_done(
    finished: Finished, tmp_path: Path, with_s3: Any
) -> None:
    said = with_s3(with_s3.tiny("run", tmp_path, "--bucket", finished.s3.url)).stderr
    assert "pretrain: done already" in said
    assert "evaluate: done already" in said
    assert weights(tmp_path) == weights(finished.out)
    assert kinds(tmp_path).count("train.step") == 12
    mine, theirs = (json.loads((o / "runs/t/report/result.json").read_text()) for o in (tmp_path, finished.out))
    changed = {key for key in mine if mine[key] != theirs[key]}
    assert changed <= {"attempts", "newest_attempt", "clocks", "stages_s"}


def test_a_fresh_machine_with_another_recipe_is_refused(finished: Finished, tmp_path: Path, with_s3: Any) -> None:
    said = with_s3.here(
        with_s3.tiny("run", tmp_path, "--bucket", finished.s3.url, "-o", "train.steps=10"), code=2
    ).stderr
    assert said == (
        "speedrun: run t was begun with another recipe (train.steps: 12 -> 10); take another --run-id (--from t"
        " goes on with its weights), or --fresh to discard the old run\n"
    )
    assert not (tmp_path / "runs").exists()


def test_report_on_a_machine_without_the_run(finished: Finished, tmp_path: Path, with_s3: Any) -> None:
    command = with_s3.command("report", "--run-id", "t", "--out", str(tmp_path), "--bucket", finished.s3.url, "--json")
    result = json.loads(with_s3.here(command).stdout)
    assert result["state"] == "complete"
    assert result["smoke_score"] == json.loads((finished.out / "runs/t/report/result.json").read_text())["smoke_score"]


@pytest.mark.slow
def test_killed_in_mid_upload_a_fresh_machine_ends_with_the_same_weights(
    finished: Finished, prepared: Path, tmp_path: Path, with_s3: Any, s3: Any
) -> None:
    """The last checkpoint is taken away, made again, and the gate shuts when its upload begins: the one before is what
    the bucket has."""
    with_s3(with_s3.tiny("pretrain", prepared, "--bucket", s3.url))
    shutil.rmtree(prepared / "runs" / "t" / "checkpoints" / FINAL)
    gone = [{"Key": f"{s3.prefix}/{key}"} for key in stored(s3) if key.startswith(f"runs/t/checkpoints/{FINAL}/")]
    s3.client().delete_objects(Bucket=s3.bucket, Delete={"Objects": gone})
    blocking = Gate(urlsplit(s3.endpoint).port, shut_on=f"checkpoints/{FINAL}/".encode())
    first = dataclasses.replace(with_s3, variables=with_s3.variables | {"AWS_ENDPOINT_URL": blocking.url})
    process = first.start(first.tiny("pretrain", prepared, "--bucket", s3.url))
    assert blocking.shut.wait(240), process.communicate()
    process.kill()
    process.communicate()
    fresh = tmp_path / "fresh"
    with_s3(with_s3.tiny("run", fresh, "--bucket", s3.url))
    assert weights(fresh) == weights(finished.out)
    events = list(read_events(fresh / "runs" / "t"))
    assert [e["step"] for e in events if e["kind"] == "train.step" and e["attempt"] == 3] == list(range(8, 12))


@pytest.mark.slow
def test_of_two_supervisors_the_older_publishes_nothing_after_the_newers_claim(
    finished: Finished, prepared: Path, tmp_path: Path, with_s3: Any, s3: Any
) -> None:
    older = with_s3.start(with_s3.tiny("run", prepared, "--bucket", s3.url))
    wait_for_event(prepared, older, "upload.done", folder=f"runs/t/checkpoints/{32:015d}")
    stopped = family(older.pid)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    newer = tmp_path / "newer"
    with_s3(with_s3.tiny("pretrain", newer, "--bucket", s3.url))
    after = stored(s3)
    for pid in reversed(stopped):
        os.kill(pid, signal.SIGCONT)
    _, said = older.communicate(timeout=300)
    assert older.returncode == 2, said
    assert "attempt 2 took over run t; this one (attempt 1) stopped and published nothing more" in said
    assert "Traceback" not in said
    assert stored(s3) == after
    assert weights(newer) == weights(finished.out)
    refused = with_s3(with_s3.tiny("pretrain", tmp_path / "first", "--bucket", s3.url))
    assert "pretrain: done already" in refused.stderr


@pytest.mark.slow
def test_a_store_that_blocks_for_ever_ends_with_12_and_the_path(
    finished: Finished, prepared: Path, with_s3: Any, s3: Any
) -> None:
    hole = Gate(urlsplit(s3.endpoint).port, shut_on=f"checkpoints/{32:015d}/".encode())
    blocked = dataclasses.replace(with_s3, variables=with_s3.variables | {"AWS_ENDPOINT_URL": hole.url})
    said = blocked(blocked.tiny("run", prepared, "--bucket", s3.url, "--bucket-wait", "0.1"), code=12).stderr
    assert hole.shut.is_set()
    last = said.splitlines()[-1]
    assert f"did not reach {s3.url} within 6 s" in last
    assert last.endswith(f"everything is on local disk in {prepared}/runs/t, and the same command uploads it")
    assert weights(prepared) == weights(finished.out)
    assert not any(key.startswith("runs/t/checkpoints") for key in stored(s3))
    with_s3(with_s3.tiny("run", prepared, "--bucket", s3.url))
    assert stored(s3) == contents(prepared)


@pytest.mark.slow
def test_a_signal_ends_with_75_and_everything_pushed(prepared: Path, with_s3: Any, s3: Any) -> None:
    process = with_s3.start(with_s3.tiny("run", prepared, "--bucket", s3.url, "-o", "train.steps=4000"))
    wait_for_event(prepared, process, "train.step", step=5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    mine, bucket = contents(prepared), stored(s3)
    assert {k: v for k, v in mine.items() if "/report/" not in k} == {
        k: v for k, v in bucket.items() if "/report/" not in k
    }
    result = json.loads(
        s3.client().get_object(Bucket=s3.bucket, Key=f"{s3.prefix}/runs/t/report/result.json")["Body"].read()
    )
    assert result["state"] == "incomplete"


@pytest.mark.slow
def test_fresh_discards_the_stored_run_and_the_older_folder_is_refused(
    finished: Finished, prepared: Path, tmp_path: Path, with_s3: Any, s3: Any
) -> None:
    with_s3(with_s3.tiny("pretrain", prepared, "--bucket", s3.url))
    other = tmp_path / "other"
    said = with_s3(
        with_s3.tiny("pretrain", other, "--bucket", s3.url, "--fresh", "--yes", "-o", "train.steps=4")
    ).stderr
    assert f"--fresh: discarded what {s3.url}/runs/t had" in said
    assert [key for key in stored(s3) if "/checkpoints/" in key and key.endswith(MANIFEST)] == [
        f"runs/t/checkpoints/{32:015d}/{MANIFEST}"
    ]
    assert sorted(key for key in stored(s3) if "/attempts/" in key) == ["runs/t/attempts/1", "runs/t/attempts/2"]
    said = with_s3(with_s3.tiny("pretrain", prepared, "--bucket", s3.url), code=2).stderr
    assert "run t was begun anew in " in said


@pytest.mark.slow
def test_evaluate_on_a_machine_without_the_run(finished: Finished, tmp_path: Path, with_s3: Any) -> None:
    command = [
        "evaluate",
        "--run-id",
        "t",
        "--out",
        str(tmp_path / "b"),
        "--bucket",
        finished.s3.url,
        "-o",
        "eval.cap=13",
    ]
    with_s3(with_s3.command(*command))
    result = json.loads((tmp_path / "b" / "runs/t/report/result.json").read_text())
    assert result["smoke_score"]["cap"] == 13


def test_list_and_status_on_a_machine_without_the_run(finished: Finished, tmp_path: Path, with_s3: Any) -> None:
    place = ["--bucket", finished.s3.url, "--out", str(tmp_path / "out")]
    rows = json.loads(with_s3.here(with_s3.command("list", *place, "--json")).stdout)
    row = next(row for row in rows if row["run_id"] == "t")
    assert (row["state"], row["steps"], row["val_bpb"]) == ("complete", 12, json.loads(finished.stdout)["val_bpb"])
    said = with_s3.here(with_s3.command("status", "t", *place)).stdout
    assert f"{finished.s3.url}/runs/t/report/report.html" in said and "complete: attempt " in said
    assert not (tmp_path / "out").exists()
