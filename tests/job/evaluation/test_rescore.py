"""`speedrun evaluate` on a run that has a score: a lesser one goes beside it, and the run's own command still works."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from job.errors import UsageError
from job.evaluation.core_v1 import PUBLISHED_URL
from job.evaluation.ledger import LEDGER, fullness, sealed_ledgers
from job.evaluation.ledger import folder_of as evaluation_folder
from job.evaluation.rescore import FROM_BUCKET, LESSER, asking, fullness_asked, fullness_of_score, recipe_for_evaluation
from job.recipe.config import EvalConfig, resolve
from job.recipe.derive import derive
from job.run.bucket import Bucket
from job.run.launch import is_done, recipe_document
from job.store.attempt import Record, fold_event
from job.store.checkpoint_folder import KIND, folder_of
from job.store.sealed import content_id, open_sealed, sealing
from job.store.stores import FolderStore

RECIPE = resolve("smoke", {}, ["train.steps=12"])


def asked(cap: int, bundle: str = "") -> EvalConfig:
    return dataclasses.replace(RECIPE.eval, cap=cap, core_bundle=bundle)


def test_core_says_more_than_the_smoke_score_and_more_items_say_more() -> None:
    order = [asked(12), asked(100), asked(0), asked(20, "core.zip"), asked(500, "core.zip"), asked(0, "core.zip")]
    assert sorted(reversed(order), key=fullness_asked) == order


@pytest.fixture
def scored(tmp_path: Path):
    """A finished run with a score of this name and cap."""

    def make(name: str, cap: int | None, weights: str | None = None) -> Path:
        made_from = {"run": "r"}
        with sealing(folder_of(tmp_path, derive(RECIPE).rows), kind=KIND, made_from=made_from):
            pass
        ledger = {"weights": weights or content_id(KIND, made_from), "cap": cap}
        with sealing(evaluation_folder(tmp_path / "eval", ledger) / "ledger", kind=LEDGER, made_from=ledger) as folder:
            folder.facts |= {"name": name}
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("name", "cap", "evaluation", "is_lesser"),
    [
        ("smoke_score", 12, asked(12), False),
        ("smoke_score", 12, asked(0), False),
        ("smoke_score", 12, asked(11), True),
        ("smoke_score", None, asked(12), True),
        ("smoke_score", None, asked(20, "core.zip"), False),
        ("core", 20, asked(0), True),
        ("core", None, asked(20, "core.zip"), True),
        ("core", None, asked(0, "core.zip"), False),
    ],
)
def test_which_evaluation_is_a_lesser_one(
    scored, name: str, cap: int | None, evaluation: EvalConfig, is_lesser: bool
) -> None:
    run, recipe = scored(name, cap), dataclasses.replace(RECIPE, eval=evaluation)
    with asking(run, recipe, recipe_document(recipe, "r")) as made:
        assert made.is_lesser is is_lesser
        document = json.loads(made.document.read_text())
        assert (document["asked"] == LESSER) is is_lesser
        assert document["recipe"]["eval"]["cap"] == evaluation.cap
    assert is_done("evaluate", run, recipe) == (is_lesser or fullness_asked(evaluation) == fullness(name, cap))


@pytest.mark.parametrize("earlier", ["eval", "eval/lesser/core-20"])
def test_evaluations_of_earlier_versions_are_read(scored, earlier: str) -> None:
    run = scored("smoke_score", 12)
    ledger = {"weights": content_id(KIND, {"run": "r"}), "cap": 20}
    with sealing(run / earlier / "ledger", kind=LEDGER, made_from=ledger) as folder:
        folder.facts |= {"name": "core"}
    assert len(sealed_ledgers(run / "eval")) == 2
    assert fullness_of_score(run, derive(RECIPE).rows) == fullness("core", 20)


def test_a_score_of_other_weights_is_none(scored, tmp_path: Path) -> None:
    run = scored("core", None, weights="others")
    with asking(run, RECIPE, recipe_document(RECIPE, "r")) as made:
        assert not made.is_lesser
    assert not is_done("evaluate", run, RECIPE)


def test_the_record_leaves_lesser_evaluations_out() -> None:
    record = Record()
    told = {"t": 1.0, "attempt": 1, "kind": "eval.done", "metric": 0.25, "name": "core"}
    fold_event(record, told)
    fold_event(record, told | {"t": 9.0, "metric": 0.5, "lesser": True})
    assert record.score["metric"] == 0.25 and record.attempts[0].end == 9.0


# --- in real runs


def contents(*places: Path) -> dict[str, str]:
    """SHA-256 by path of all files in folders, and of files."""
    files = [p for place in places for p in ([place] if place.is_file() else place.rglob("*")) if p.is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def caps(out: Path) -> tuple[Any, list[Any]]:
    """Of the report's score, and of all its evaluations."""
    result = json.loads((out / "runs" / "t" / "report" / "result.json").read_text())
    return result["smoke_score"]["cap"], [each["cap"] for each in result["evaluations"]]


@pytest.mark.slow
def test_a_lesser_evaluation_stands_beside_the_runs_own(finished, tmp_path: Path, speedrun) -> None:
    shutil.copytree(finished.out, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "runs" / "t"
    command = speedrun.command("evaluate", "--run-id", "t", "--out", str(tmp_path), "-o", "eval.cap=4")
    kept = [run / "recipe.json", *(p for p in (run / "eval").iterdir())]
    before = contents(*kept)
    said = speedrun(command).stdout
    assert "(at most 4 items a task; " in said
    assert "the run has a fuller score, which stays its own; this one goes beside it" in said
    assert caps(tmp_path) == (6, [6, 4]) and contents(*kept) == before
    assert json.loads(speedrun([*command, "--json", "-q"]).stdout)["smoke_score"]["cap"] == 6
    again = speedrun(speedrun.tiny("run", tmp_path)).stderr
    assert "evaluate: done already" in again and caps(tmp_path) == (6, [6, 4])
    speedrun(speedrun.command("report", "--run-id", "t", "--out", str(tmp_path)))
    assert caps(tmp_path) == (6, [6, 4])
    fuller = speedrun.command("evaluate", "--run-id", "t", "--out", str(tmp_path), "-o", "eval.cap=8")
    speedrun(fuller)
    assert caps(tmp_path) == (8, [8, 6, 4])
    speedrun(speedrun.tiny("run", tmp_path))
    assert caps(tmp_path) == (8, [8, 6, 4]) and contents(*kept) == before


@pytest.mark.slow
def test_a_run_that_was_scored_with_a_cap_first_is_still_scored_as_it_says(prepared: Path, speedrun) -> None:
    speedrun(speedrun.tiny("pretrain", prepared))
    speedrun(speedrun.command("evaluate", "--run-id", "t", "--out", str(prepared), "-o", "eval.cap=4"))
    assert caps(prepared) == (4, [4])
    speedrun(speedrun.tiny("run", prepared))
    assert caps(prepared) == (6, [6, 4])


@pytest.mark.slow
def test_on_another_machine_the_bucket_keeps_the_fuller_report(finished, tmp_path: Path, speedrun) -> None:
    """A folder is the bucket: it gets what the finished run left in its own."""
    bucket = tmp_path / "bucket"
    place = ["--bucket", str(bucket)]
    notes = shutil.ignore_patterns("*.verified-*", "*.lock")
    shutil.copytree(finished.out, bucket, ignore=notes)
    shutil.copytree(finished.out, tmp_path / "a")
    command = ["evaluate", "--run-id", "t", *place, "-o", "eval.cap=4", "--out"]
    for machine in ("a", "b"):
        said = speedrun(speedrun.command(*command, str(tmp_path / machine)))
        assert "(at most 4 items a task; " in said.stdout
        assert f"mirroring run t to the folder {bucket}\n" in said.stderr
        run = bucket / "runs" / "t"
        assert open_sealed(run / "report", kind="report") and caps(bucket) == (6, [6, 4])
    events = [json.loads(line) for line in (run / "events" / "3.jsonl").read_text().splitlines()]
    tasks = [event for event in events if event["kind"] == "eval.task"]
    assert len(tasks) == 22 and all(event["found"] for event in tasks), "machine b took the answers from the bucket"
    assert "pretrain: done already" in speedrun(speedrun.tiny("run", tmp_path / "c", *place)).stderr


def test_a_disk_with_a_lesser_score_has_the_fuller_one_of_the_bucket_beside_it(scored, tmp_path: Path) -> None:
    run = scored("smoke_score", 12)
    elsewhere = {"weights": content_id(KIND, {"run": "r"}), "cap": 20}
    stored = evaluation_folder(tmp_path / "bucket" / "runs" / run.name / "eval", elsewhere) / "ledger"
    with sealing(stored, kind=LEDGER, made_from=elsewhere) as folder:
        folder.facts |= {"name": "smoke_score"}
    Bucket(FolderStore(tmp_path / "bucket"), 1.0).pull_results(run)
    assert sorted(ledger.made_from["cap"] for ledger in sealed_ledgers(run / "eval").values()) == [12, 20]
    assert fullness_of_score(run, derive(RECIPE).rows) == fullness("smoke_score", 20)


def test_a_recipe_of_the_buckets_decides_no_path_and_no_address(tmp_path: Path) -> None:
    def bundle_of(run: Path, *words: str, named: str | None = None) -> str:
        return recipe_for_evaluation(run, named, words).eval.core_bundle

    for number, bundle in enumerate(("", PUBLISHED_URL, "/etc", "http://169.254.169.254/latest")):
        run = tmp_path / str(number)
        run.mkdir()
        document = recipe_document(resolve("smoke", {"eval.core_bundle": ("--core-bundle", bundle)}, []), run.name)
        (run / "recipe.json").write_text(json.dumps(document))
        assert bundle_of(run) == bundle
        (run / FROM_BUCKET).touch()
        assert bundle_of(run, named="mine") == bundle_of(run, "eval.core_bundle=mine") == "mine"
        if bundle in ("", PUBLISHED_URL):
            assert bundle_of(run, "eval.cap=3") == bundle
        else:
            with pytest.raises(UsageError, match=f"came from the bucket and names the CORE bundle {bundle}"):
                bundle_of(run, "eval.cap=3")
