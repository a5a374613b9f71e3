"""Which attempts make a row of deaths: the rule as a table, as properties, and in real runs whose ranks die at every
start."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.console import Console
from job.errors import ExitCode, InterruptedRun
from job.reporter import Reporter
from job.run.fruitless import GOES_ON, LIMIT, Death, RankDied, deaths_in_a_row, judged, ordinal
from job.run.processes import LocalRank
from job.run.supervise import Interrupts, supervise
from job.store.attempt import Attempt, read_events

SEALED: dict[str, dict[str, Any]] = {
    "step 8": {"kind": "checkpoint.sealed", "rows": 64},
    "step 16": {"kind": "checkpoint.sealed", "rows": 128},
    "task": {"kind": "eval.task", "task": "copa"},
    "known task": {"kind": "eval.task", "task": "copa", "found": True},
    "lesser task": {"kind": "eval.task", "task": "copa", "lesser": "core-20"},
    "rows": {"kind": "prepare.rows", "shard": "a"},
    "more rows": {"kind": "prepare.rows", "shard": "b"},
    "pulled rows": {"kind": "prepare.rows", "shard": "c", "pulled": True},
    "tokenizer": {"kind": "prepare.tokenizer"},
    "val": {"kind": "prepare.rows", "shard": "held out"},
}
ENDS: dict[str, list[dict[str, Any]]] = {
    f"{stage} died": [
        {"kind": "attempt.ended", "exit_code": 75, "died": {"stage": stage, "rank": "rank 0", "signal": "SIGSEGV"}}
    ]
    for stage in ("prepare", "pretrain", "evaluate")
} | {
    "signal": [{"kind": "attempt.ended", "exit_code": 75, "reason": "SIGTERM"}],
    "no space": [{"kind": "attempt.ended", "exit_code": 12, "reason": "the disk is full"}],
    "done": [{"kind": "attempt.ended", "exit_code": 0, "reason": "done"}],
    "vanished": [],
}


def story(*attempts: str) -> list[dict[str, Any]]:
    """Events of attempts, each as "what it sealed, how it ended"."""
    events = []
    for number, attempt in enumerate(attempts, 1):
        *sealed, end = attempt.split(", ")
        told = [{"kind": "attempt.started"}, *(SEALED[name] for name in sealed), *ENDS[end]]
        events += [event | {"attempt": number} for event in told]
    return events


@pytest.mark.parametrize(
    ("attempts", "deaths"),
    [
        ([], 0),
        (["pretrain died"], 1),
        (["pretrain died"] * 3, 3),
        (["pretrain died"] * 4, 4),
        # signals, vanished machines, other errors neither count nor reset
        (["pretrain died", "signal", "pretrain died", "vanished", "no space", "pretrain died"], 3),
        (["signal"] * 5 + ["vanished"] * 5 + ["no space"] * 5, 0),
        # something new in the stage that died
        (["pretrain died", "pretrain died", "step 8, pretrain died"], 0),
        (["pretrain died", "pretrain died", "step 8, pretrain died", "pretrain died", "pretrain died"], 2),
        (["step 8, pretrain died", "step 16, pretrain died", "pretrain died"], 1),
        (["pretrain died", "pretrain died", "step 8, vanished", "pretrain died"], 1),
        (["pretrain died", "step 8, signal", "pretrain died", "pretrain died"], 2),
        (["evaluate died", "task, evaluate died", "evaluate died"], 1),
        (["evaluate died", "lesser task, evaluate died", "evaluate died"], 1),
        (["prepare died", "tokenizer, prepare died", "prepare died"], 1),
        (["prepare died", "val, prepare died", "prepare died"], 1),
        # something, but nothing new, or in another stage
        (["step 16, pretrain died", "step 8, pretrain died", "step 16, pretrain died", "pretrain died"], 3),
        (["known task, evaluate died"] * 3, 3),
        (["pulled rows, prepare died"] * 3, 3),
        (["rows, prepare died", "rows, prepare died", "rows, prepare died", "rows, prepare died"], 3),
        (["rows, pretrain died", "more rows, pretrain died", "val, pretrain died"], 3),
        (["step 8, evaluate died", "evaluate died", "evaluate died"], 3),
        # deaths in several stages are one row
        (["pretrain died", "prepare died", "pretrain died"], 3),
        (["prepare died", "rows, pretrain died", "pretrain died"], 2),
    ],
)
def test_the_row(attempts: list[str], deaths: int) -> None:
    assert len(deaths_in_a_row(story(*attempts))) == deaths


quiet = st.sampled_from(["signal", "vanished", "no space", "done"])
ending = st.sampled_from([*ENDS])
sealing = st.lists(st.sampled_from([*SEALED]), max_size=3)
attempt = st.builds(lambda sealed, end: ", ".join([*sealed, end]), sealing, ending)


@given(st.lists(attempt, max_size=12), st.data())
def test_attempts_that_did_not_die_and_sealed_nothing_change_nothing(attempts: list[str], data: st.DataObject) -> None:
    more = list(attempts)
    more.insert(data.draw(st.integers(0, len(attempts))), data.draw(quiet))
    assert deaths_in_a_row(story(*more)) == deaths_in_a_row(story(*attempts))


@given(st.lists(attempt, max_size=12), st.sampled_from(["prepare", "pretrain", "evaluate"]))
def test_whatever_was_before_endless_deaths_in_one_stage_are_ended(attempts: list[str], stage: str) -> None:
    assert len(deaths_in_a_row(story(*attempts, *[f"{stage} died"] * LIMIT))) >= LIMIT


@given(st.lists(attempt, max_size=12))
def test_a_row_is_no_longer_than_the_deaths_and_grows_by_one_at_most(attempts: list[str]) -> None:
    rows = [len(deaths_in_a_row(story(*attempts[:n]))) for n in range(len(attempts) + 1)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(rows))
    assert rows[-1] <= sum("died" in attempt for attempt in attempts)


def test_the_verdict_names_rank_signal_and_remedy(tmp_path: Path) -> None:
    died = RankDied("rank 0 was killed", Death("pretrain", "rank 3 on node 1", "SIGABRT"), "logs/3.log")
    for signal in ("SIGSEGV", "SIGABRT"):
        before = Attempt.claim(tmp_path)
        assert judged(tmp_path, before.number, died) is died
        before.emit(
            "attempt.ended", exit_code=75, died={"stage": "pretrain", "rank": "rank 3 on node 1", "signal": signal}
        )
    third = Attempt.claim(tmp_path)
    error = judged(tmp_path, third.number, died)
    assert error.exit_code == ExitCode.SILENT_RANK and error.noted == died.noted
    assert str(error).startswith(
        "rank 3 on node 1 of pretrain was killed by SIGABRT, in the third attempt in a row that ended so and that"
        " sealed nothing new (before it: rank 3 on node 1 of pretrain was killed by SIGSEGV): starting again as it is"
        " will not help; see logs/3.log, then"
    )
    third.emit("checkpoint.sealed", rows=8)
    assert judged(tmp_path, third.number, died) is died and isinstance(died, InterruptedRun)


@pytest.mark.parametrize("signalled", [False, True])
def test_a_death_counts_unless_the_supervisor_was_signalled(tmp_path: Path, signalled: bool) -> None:
    dies = ["-n", "1", "-r", "1", "import os; os.kill(os.getpid(), 9)"]
    rank = LocalRank("rank 0", dies, os.environ, tmp_path / "log", program=("-m", "timeit"))
    rank.process.wait(60)
    interrupts = Interrupts()
    if signalled:
        interrupts.count, interrupts.name = 1, "SIGTERM"
    with pytest.raises(
        InterruptedRun, match=r"rank 0 of pretrain was killed by SIGKILL \(the system may be short of memory\); "
    ) as died:
        supervise("pretrain", [rank], reporter=Reporter(), console=Console(-1), interrupts=interrupts)
    assert isinstance(died.value, RankDied) is not signalled
    assert dict(died.value.noted) == (
        {} if signalled else {"died": {"stage": "pretrain", "rank": "rank 0", "signal": "SIGKILL", "device": False}}
    )


def test_a_broken_device_ends_with_10(tmp_path: Path) -> None:
    death = Death("pretrain", "rank 5", "CUDA error: uncorrectable ECC error encountered", device=True)
    died = RankDied(f"{death}; {GOES_ON}", death, "5.log")
    for _ in range(2):
        attempt = Attempt.claim(tmp_path)
        assert judged(tmp_path, attempt.number, died) is died
        attempt.emit("attempt.ended", exit_code=75, **died.noted)
    error = judged(tmp_path, Attempt.claim(tmp_path).number, died)
    assert error.exit_code == ExitCode.PREFLIGHT
    assert str(error).startswith(
        "the device of rank 5 failed in pretrain (CUDA error: uncorrectable ECC error encountered), in the third"
    )


def test_ordinals() -> None:
    assert [ordinal(n) for n in (3, 4, 11, 12, 21, 22, 23)] == [
        "third",
        "fourth",
        "11th",
        "12th",
        "21st",
        "22nd",
        "23rd",
    ]


# --- real runs

DIES = """
import os
if "%s" in open("/proc/self/cmdline").read() and os.environ.get("RANK") == "%d":
    os.kill(os.getpid(), 11)
"""


@pytest.fixture
def dying(speedrun, tmp_path: Path):
    """The command line with ranks that die of SIGSEGV as soon as they start in a stage."""

    def make(stage: str, rank: int = 0) -> Any:
        site = tmp_path / f"dies-in-{stage}"
        site.mkdir()
        (site / "sitecustomize.py").write_text(DIES % (stage, rank))
        return dataclasses.replace(speedrun, variables={"PYTHONPATH": f"{Path(__file__).parents[3]}:{site}"})

    return make


def ends(run: Path) -> list[tuple[int, str | None]]:
    """Exit code and the stage that died, of every attempt."""
    return [(e["exit_code"], e.get("died", {}).get("stage")) for e in read_events(run) if e["kind"] == "attempt.ended"]


@pytest.mark.parametrize("stage", ["prepare", "evaluate_hf"])
def test_where_no_attempts_are_kept_the_first_death_ends_with_15(dying, tmp_path: Path, stage: str) -> None:
    broken, model = dying(stage), tmp_path / "model"
    (tmp_path / f"dies-in-{stage}" / "transformers.py").touch()
    model.mkdir()
    (model / "config.json").touch()
    command = broken.command("evaluate", "--hf", str(model), "--out", str(tmp_path))
    if stage == "prepare":
        command = broken.command("prepare", "--data", str(broken.data), "--out", str(tmp_path))
    said = broken(command, code=15).stderr
    assert (
        "was killed by SIGSEGV; what is sealed is kept, and the same command, typed again, goes on"
        in said.splitlines()[-1]
    )


@pytest.mark.slow
def test_attempts_on_other_machines_count_through_the_bucket(dying, speedrun, tmp_path: Path) -> None:
    broken = dying("pretrain")
    bucket = ["--bucket", str(tmp_path / "bucket")]
    for number, code in enumerate((75, 75, 15, 15)):
        said = broken(broken.tiny("run", tmp_path / f"machine-{number}", *bucket), code=code).stderr
    assert "rank 0 of pretrain was killed by SIGSEGV, in the fourth attempt in a row" in said.splitlines()[-1]
    assert ends(tmp_path / "machine-3/runs/t") == ends(tmp_path / "bucket/runs/t")
    assert ends(tmp_path / "bucket/runs/t") == [(75, "pretrain")] * 2 + [(15, "pretrain")] * 2
    speedrun(speedrun.tiny("pretrain", tmp_path / "machine-4", *bucket))  # a machine that is well makes it


@pytest.mark.slow
def test_in_evaluation_a_scored_task_begins_a_new_row(dying, finished, speedrun, tmp_path: Path) -> None:
    shutil.copytree(finished.out, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs" / "t" / "eval")
    broken, run = dying("evaluate", rank=1), tmp_path / "runs" / "t"
    command = broken.command("evaluate", "--run-id", "t", "--out", str(tmp_path), "--ranks", "2")
    for code in (75, 75):
        broken(command, code=code)
    file = run / "events" / "3.jsonl"
    file.write_text(json.dumps({"t": 0.0, "attempt": 3, "seq": 0, "kind": "eval.task", "task": "x"}) + "\n")
    for code in (75, 75, 15):
        said = broken(command, code=code).stderr
    assert "speedrun: rank 1 of evaluate was killed by SIGSEGV, in the third attempt in a row" in said
    assert "Traceback" not in said.splitlines()[-1]
