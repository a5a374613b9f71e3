"""What somebody who watches a training sees: rows on a terminal of any width, lines where there is none."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, TINY, Speedrun
from job import console as consoles
from job.console import PLAIN_EVERY, Console
from job.recipe.config import resolve
from job.run.watch import Watch
from job.store.attempt import Attempt, fold
from terminal import Screen, in_terminal

STEPS = 12_000
WIDTHS = (80, 120)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def begin(run: Path, console: Console) -> Attempt:
    attempt = Attempt.claim(run)
    attempt.emit("attempt.started", price={"hour": 2.5, "source": "a test"})
    attempt.heard = Watch(fold(run), resolve("smoke"), console).take
    attempt.emit("train.start", step=0, rows=0, steps=STEPS)
    return attempt


def step(attempt: Attempt, number: int) -> None:
    attempt.emit("train.step", step=number, rows=number + 1, loss=2.5, ms=500.0, tokens=524_288)


@pytest.mark.parametrize("columns", WIDTHS)
def test_rows_on_a_terminal_fit_it_and_what_follows_has_a_row_of_its_own(
    tmp_path: Path, monkeypatch: Any, columns: int
) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setattr(consoles, "LIVE_EVERY", 0.0)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    console = Console()
    attempt = begin(tmp_path / "r", console)
    for number in range(3):
        step(attempt, number)
    console.say(f"warning: {'many words ' * 12}and https://{'an-address/' * 12} that stays whole")
    attempt.emit("train.val", step=3, rows=3, bpb=0.8125)
    step(attempt, STEPS - 2)
    console.close()
    print("pretrain: done in 5.0 s", file=terminal)
    screen = Screen(columns)
    screen.feed(terminal.getvalue())
    rows = [row.rstrip() for row in screen.rows]
    assert set(screen.wrapped) <= {row for row in rows if "an-address" in row}, "rows longer than the terminal is wide"
    end = rows.index("pretrain: done in 5.0 s")
    last = " ".join(rows[end - 2 : end])
    assert re.search(
        r"pretrain [━╸]+ step 11,999/12,000, 0\.5 s left +loss 2\.500  bpb 0\.812  1\.05 M tok/s  \$0\.00$", last
    )
    assert ("loss" in rows[end - 1]) and ("pretrain ━" in rows[end - 1]) == (columns == 120)
    assert sum("━" in row for row in rows) == 1, "an older state of the rows is left on the screen"
    assert any("(validated)" in row for row in rows)


def test_without_a_terminal_a_line_every_thirty_seconds_and_at_each_milestone(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    now = 1000.0
    monkeypatch.setattr(consoles.time, "monotonic", lambda: now)
    attempt = begin(tmp_path / "r", Console())
    for number in range(2 * int(PLAIN_EVERY)):
        now += 1.0
        step(attempt, number)
    attempt.emit("checkpoint.sealed", step=60, rows=60, folder="000000000000060")
    attempt.emit("upload.done", folder="prepared/x/rows/00000", bytes=1, seconds=1.0)
    attempt.emit("upload.done", folder="runs/r/checkpoints/000000000000060", bytes=1, seconds=1.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "pretrain: step 1/12,000, 1 h 40 min left, loss 2.500, 1.05 M tok/s, $0.00"
    said = [re.search(r"step (\d+)/.*?( \([a-z ]+\))?$", line) for line in lines]
    assert [match and match.groups() for match in said] == [
        *(("1", None), ("31", None), ("60", " (checkpoint sealed)"), ("60", " (checkpoint uploaded)"))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("columns", WIDTHS)
def test_a_whole_run_in_a_terminal(speedrun: Speedrun, tmp_path: Path, columns: int) -> None:
    words = speedrun.tiny("run", tmp_path / "out", "--price", "2.5")
    code, screen = in_terminal(words, columns, speedrun.environment(), ROOT)
    rows = [row.rstrip() for row in screen.rows]
    page = next(row for row in rows if row.startswith("  page"))
    assert code == 0 and set(screen.wrapped) <= {page[:columns]}, "\n".join(rows)  # a path is not cut in two
    assert TINY[4] == "train.steps=12"
    done = next(at for at, row in enumerate(rows) if row.startswith("pretrain: done"))
    assert re.search(
        r"step 12/12 +loss \d\.\d+  bpb \d\.\d+  [\d.]+( k)? tok/s  \$\S+ of \$\S+$", " ".join(rows[done - 2 : done])
    )
    assert any(re.match(r"pretrain [━╸╺]+ step \d+/12, |  loss \d", frame) for frame in screen.frames)
    ends = [row for row in rows if "━" in row]
    assert all(re.match(r"[a-z]+ [━╸╺]+ ", row) for row in ends), "something is glued to a bar"
    verdict = next(at for at, row in enumerate(rows) if row.startswith(("The model", "Not yet")))
    assert rows[verdict - 1].startswith("report: done in")
