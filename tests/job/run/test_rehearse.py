"""The rehearsal itself: it sees a difference; and a whole one on a folder, in which nothing is lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from helpers import unpacked_run, wait_for
from job.cli.commands import main
from job.console import Console
from job.errors import UsageError
from job.run.rehearse import Rehearsal, differences, processes_below


def test_a_difference_is_seen(tmp_path: Path) -> None:
    first, second = (unpacked_run("interrupted", tmp_path / name) for name in ("one", "other"))
    assert differences(first, second) == []
    (events,) = second.glob("events/*.jsonl")
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    step = next(line for line in lines if line["kind"] == "train.step")
    step["loss"] += 1e-9
    events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (sentence,) = differences(first, second)
    assert sentence.startswith("losses: {0: ")


def test_an_out_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = CliRunner().invoke(main, ["rehearse", "--out", str(tmp_path / "file" / "x")])
    assert ended.exit_code == 2 and "cannot be written (Not a directory)" in ended.stderr


def test_the_processes_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")  # ps would cut a command line to a terminal's width
    rank = ["-c", "import time; time.sleep(60)", "-m", "job.run.rank", "pretrain", "/prepared/by the uploader"]
    child = f"import subprocess, sys; subprocess.run([sys.executable, *{rank}])"
    process = subprocess.Popen([sys.executable, "-c", child])
    try:
        wait_for(lambda: [name for _, name in processes_below(process.pid)] == ["pretrain"], 30)
    finally:
        for pid, _ in processes_below(process.pid):
            subprocess.run(["kill", "-9", str(pid)], check=True)
        process.wait(10)


def test_a_folder_that_is_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not empty"):
        Rehearsal(tmp_path, seed=0, ranks=1, bucket=None, console=Console(-1))


@pytest.mark.slow
def test_nothing_is_lost_on_a_folder(speedrun: Any, tmp_path: Path) -> None:
    words = ["rehearse", "--kills", "30", "--seed", "17", "--out", str(tmp_path / "out")]
    done = speedrun(speedrun.command(*words), seconds=3000)
    assert done.stdout.startswith("nothing was lost: 30 kills, ")
    assert len(re.findall(r"^ *\d+\. ", done.stderr, re.M)) == 30
