"""A dry run is the run up to its first effect: the same sentence, the same code, and nothing is left anywhere."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Speedrun
from helpers import unpacked_run
from job.errors import ExitCode
from job.recipe.config import resolve
from job.run.launch import open_run, recipe_document
from job.store.attempt import Attempt
from job.store.sealed import atomic_write


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A situation: what is there before (below a folder), the words that are typed, code and sentence."""

    words: tuple[str, ...]
    code: ExitCode
    says: str
    before: Callable[[Path], object] = lambda folder: None
    preset: str = "smoke"


def begin(folder: Path, *overrides: str) -> Path:
    return open_run(folder / "out", "t", resolve("smoke", overrides=overrides), fresh=False)


def finish(folder: Path) -> None:
    attempt = Attempt.claim(begin(folder))
    attempt.emit("attempt.started", argv=[])
    attempt.emit("attempt.ended", exit_code=0, reason="")


def store_another(folder: Path) -> None:
    document = recipe_document(resolve("smoke", overrides=["train.steps=7"]), "t")
    atomic_write(folder / "bucket" / "runs" / "t" / "recipe.json", json.dumps(document).encode())


USAGE, DATA, MACHINE = ExitCode.USAGE, ExitCode.DATA, ExitCode.PREFLIGHT
UNREACHABLE = ("--bucket", "/proc/nobody/writes/here")
WRONG = {
    "a bucket not in reach": Wrong(UNREACHABLE, USAGE, "cannot be used"),
    "another run in the bucket": Wrong(("--bucket", "{}/bucket"), USAGE, "train.steps: 7 -> 240", store_another),
    "another recipe here": Wrong(
        ("-o", "train.seed=2"),
        USAGE,
        "begun with another recipe (train.seed: 1 -> 2)",
        lambda f: begin(f, "train.seed=1"),
    ),
    "a finished run": Wrong(("--fresh",), USAGE, "--fresh would discard the finished run", finish, preset="cpu"),
    "no text": Wrong(("--data", "{}/nowhere"), DATA, "nowhere does not exist"),
    "an empty folder of text": Wrong(("--data", "{}"), DATA, "has no .parquet", lambda f: (f / "empty").mkdir()),
    "no price": Wrong(("--max-usd", "5"), USAGE, "--max-usd needs a price"),
    "a price of nothing": Wrong(("--price", "0"), USAGE, "--price"),
    "a cap below the quote": Wrong(("--max-usd", "0.01", "--price", "3"), USAGE, "does not pay for this run"),
    "no GPU": Wrong(("--strict",), MACHINE, "--strict is set and torch sees no GPU"),
    "ranks that do not share a batch": Wrong(("--ranks", "3"), USAGE, "3 ranks"),
    "a name that is no run id": Wrong(("--run-id", "../t"), USAGE, "--run-id '../t' cannot be used"),
    "an out that is a file": Wrong((), USAGE, "cannot be written (Not a directory)", lambda f: (f / "out").touch()),
}


def left_in(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_it_refuses_as_the_run_does(wrong: Wrong, speedrun: Speedrun, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong.before(tmp_path)
    given = [word.replace("{}", str(tmp_path)) for word in wrong.words]
    words = speedrun.command("run", "--preset", wrong.preset, "--out", str(tmp_path / "out"), "--run-id", "t", *given)
    before = left_in(tmp_path)
    dry = speedrun.here([*words, "--dry-run"], code=int(wrong.code))
    assert wrong.says in dry.stderr
    assert (dry.stdout == "") == (wrong.code != MACHINE), "what is meant for another machine can be looked at here"
    assert left_in(tmp_path) == before, "a dry run left something behind"
    real = speedrun.here(words, code=int(wrong.code))
    assert real.stderr.splitlines()[-1] == dry.stderr.splitlines()[-1]


def test_it_looks_at_the_bucket_and_speaks_json(speedrun: Speedrun, tmp_path: Path) -> None:
    bucket = tmp_path / "new" / "bucket"
    words = ["--preset", "smoke", "--out", str(tmp_path / "out"), "--price", "3", "--bucket", str(bucket), "--dry-run"]
    ended = speedrun.here(speedrun.command("run", *words, "--json"))
    plan = json.loads(ended.stdout)
    assert plan["stages"] == dict.fromkeys(("prepare", "pretrain", "evaluate", "report"), "to do")
    assert plan["recipe"]["train"]["steps"] == plan["derived"]["steps"]["value"] == 240
    assert plan["bucket"] == f"the folder {bucket}" and "quote: " in plan["notes"][-1]
    assert list(tmp_path.iterdir()) == [] and os.environ.get("SPEEDRUN_BUCKET") is None


def test_an_evaluation_speaks_json_too(speedrun: Speedrun, tmp_path: Path) -> None:
    unpacked_run("interrupted", tmp_path)
    place = ("--run-id", "interrupted", "--out", str(tmp_path / "out"))
    words = speedrun.command("evaluate", *place, "-o", "eval.cap=2", "--dry-run")
    plan = json.loads(speedrun.here([*words, "--json"]).stdout)
    assert plan["stages"] == {"evaluate": "to do", "report": "to do"} and plan["recipe"]["eval"]["cap"] == 2
    assert plan["notes"] == [] and speedrun.here(words).stdout.endswith("\n  evaluate: to do\n  report: to do\n")


def test_it_knows_what_the_bucket_has_of_a_run(finished, speedrun: Speedrun, tmp_path: Path) -> None:
    there = dataclasses.replace(speedrun, variables=finished.s3.variables())
    said = there.here(there.tiny("run", tmp_path / "out", "--bucket", finished.s3.url, "--dry-run")).stdout
    assert "pretrain: done already\n  evaluate: done already\n" in said and not (tmp_path / "out").exists()
