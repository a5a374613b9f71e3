"""A leaderboard of the result.json files below a folder or a bucket, beside the published runs.

An entry is believed when it is a sealed report (its bytes are those that its manifest names), keeps the schema, its
CORE is the mean of its own tasks, and recipe and ledger beside it, where they are, agree. All else is left out, and why
is said.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema

from job.errors import DataError, UsageError
from job.evaluation.ledger import centered_accuracy, metric_of
from job.plan.published_runs import GPUS, RUNS
from job.recipe.leaderboard import GPT2_XL_CORE
from job.report import words
from job.store import open_store
from job.store.documents import canonical_json, read_document, read_recipe
from job.store.sealed import MANIFEST, read_manifest
from job.store.stores import FolderStore, Store

RESULT = "result.json"
SCHEMA = Path(__file__).with_name("result.schema.json")


def leaderboard(place: str) -> dict[str, Any]:
    """{"rows", "left_out"} as plain JSON values: first what passes, by training time; then the rest, by CORE.

    UsageError where there is no such place.
    """
    store, top = _opened(place)
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    rows, left_out = [_published(run) for run in RUNS], []
    answers: dict[tuple, str] = {}
    for key in sorted(key for key in store.list(top) if PurePosixPath(key).name == RESULT):
        try:
            result = _checked(store, key, validator)
            core = result["core"]
            same = tuple((task["task"], task["accuracy"]) for task in core["tasks"])
            if same in answers:
                raise DataError(f"has the same answers as {answers[same]}: one run counts once")
            answers[same] = key
            rows.append(_row(key, result))
        except (DataError, UsageError) as error:
            left_out.append({"file": key, "why": str(error)})
    rows.sort(key=lambda row: (not row["passes"], row["training_s"] or math.inf if row["passes"] else -row["core"]))
    return {"schema": 1, "threshold": GPT2_XL_CORE, "rows": rows, "left_out": left_out}


def _opened(place: str) -> tuple[Store, str]:
    """The store and the folder in it below which results are looked for."""
    if place.startswith("s3://"):
        return open_store(place), "runs"
    folder = Path(place).resolve()
    if not folder.is_dir() or not folder.name:
        raise UsageError(f"--table {place} is no folder: give one that holds runs, or s3://bucket/prefix")
    return FolderStore(folder.parent), folder.name


def _checked(store: Store, key: str, validator: jsonschema.Draft202012Validator) -> dict[str, Any]:
    """The result of `key`, every claim of it checked; DataError or UsageError in words that follow its name."""
    data, report = store.get(key) or b"", str(PurePosixPath(key).parent)
    manifest = store.get(f"{report}/{MANIFEST}")
    if manifest is None:
        raise DataError("is not sealed: the run goes on, or the file was copied without its manifest")
    sealed = read_manifest(manifest, "its manifest", "write the report again")["files"].get(RESULT, {})
    if sealed.get("sha256") != hashlib.sha256(data).hexdigest():
        raise DataError("is not the file that was sealed (SHA-256 differs)")
    try:
        result = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot be read ({error})") from None
    if wrong := next(validator.iter_errors(result), None):
        raise DataError(f"does not keep the schema ({wrong.json_path}: {wrong.message[:100]})")
    if begun := result.get("from"):
        raise UsageError(f"goes on from step {begun['step']:,} of run {begun['run']}: its clock is of the steps since")
    core = result["core"]
    if core is None:
        raise UsageError("has no CORE" + (", but a smoke score, which is not CORE" if result["smoke_score"] else ""))
    if core["cap"]:
        raise UsageError(f"has a CORE capped at {core['cap']:,} items a task, which is another metric")
    if unknown := {task["task"] for task in core["tasks"]} - core["baselines"].keys():
        raise DataError(f"has no baseline of its task {min(unknown)}")
    centered = [centered_accuracy(task["accuracy"], core["baselines"][task["task"]]) for task in core["tasks"]]
    if not math.isclose(metric_of(centered), core["metric"], abs_tol=1e-9):
        raise DataError("has a CORE that is not the mean of its own tasks")
    _check_beside(store, str(PurePosixPath(report).parent), result)
    return result


def _check_beside(store: Store, run: str, result: dict[str, Any]) -> None:
    """DataError where the run's recipe or ledger, if they are there, are others than the result says."""
    if recipe := store.get(f"{run}/recipe.json"):
        asked = canonical_json(read_recipe(recipe, "the recipe beside it")["recipe"])
        if hashlib.sha256(asked.encode()).hexdigest() != result["hashes"]["recipe"]:
            raise DataError("is not of the recipe beside it (its hash differs)")
    fullest = next((each for each in result["evaluations"] if each["name"] == "core"), None)
    if fullest is None:
        raise DataError("has a CORE that none of its evaluations gave")
    if data := store.get(f"{run}/eval/{fullest['id']}/ledger/ledger.json"):
        ledger = read_document(data, "the ledger beside it", "evaluate again", {"metric": float})
        if ledger["metric"] != result["core"]["metric"]:
            raise DataError("has another CORE than the ledger beside it")


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _row(key: str, result: dict[str, Any]) -> dict[str, Any]:
    return {
        "evidence": "measured",
        "run": result["run_id"],
        "of": f"preset {result['preset']}, in {PurePosixPath(key).parent.parent}",
        "core": result["core"]["metric"],
        "se": result["core"]["se"],
        "runs": 1,
        "passes": result["core"]["metric"] > GPT2_XL_CORE,
        "val_bpb": result["val_bpb"],
        "training_s": result["clocks"]["training_s"] or None,
        "machine": words.gpus_of(result["provenance"]) or result["machine"]["cpu"] or "",
        "file": key,
    }


def _published(run: Any) -> dict[str, Any]:
    return {
        "evidence": "published",
        "run": run.name,
        "of": run.when,
        "core": run.core,
        "se": None,
        "runs": run.core_runs,
        "passes": run.core > GPT2_XL_CORE,
        "val_bpb": run.bpb,
        "training_s": run.seconds,
        "machine": f"{GPUS} x H100",
        "file": None,
    }
