"""`result.json`: a run's measurements in one strict document (`result.schema.json`).

Each number has one source: curves, clocks and counts come from the folded events, scores from the sealed ledger,
settings from `recipe.json`, hashes from the manifests of sealed folders. What is not there yet is null, so the document
can be asked for at any moment of a run; what is not finite is null too, for JSON has no NaN.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

from job.errors import ExitCode
from job.evaluation.ledger import Ledger, fullness, sealed_ledgers
from job.report.receipt import receipt
from job.store.attempt import Record, fold
from job.store.checkpoint_folder import files_hash, folders
from job.store.documents import HASH, canonical_json, recipe_of
from job.store.sealed import MANIFEST, is_sealed, open_sealed, read_manifest

SCHEMA = 1
TASK_KEYS = ("kind", "n", "shots", "accuracy", "centered", "se", "seconds")
LEAK_KEYS = ("bundle", "words", "documents", "shared", "by_task")


def build_result(run: Path) -> dict[str, Any]:
    """The result of the run in folder `run`, valid against `result.schema.json`.

    Raises UsageError when there is no run, DataError when its recipe or a sealed folder is damaged.
    """
    return result_of(run, recipe_of(run), present(fold(run)), receipt(run))


def result_of(run: Path, recipe: dict[str, Any], record: Record, bill: dict[str, Any] | None) -> dict[str, Any]:
    """`build_result` from parts that are already read: `recipe.json`'s document, the present record, the receipt."""
    derived = recipe["derived"]
    planned_steps = derived["steps"]["value"]
    rows = max((step["rows"] for step in record.steps.values()), default=0)
    tokens = rows * recipe["recipe"]["model"]["seq_len"]
    measured = packed_bpb = bigram_bpb = None
    if is_sealed(run / "eval" / "bpb"):
        final = open_sealed(run / "eval" / "bpb", kind="bpb").facts
        measured, bigram_bpb = final["bpb"], finite(final["bigram_bpb"])
        packed_bpb = finite(final.get("packed_bpb"))
    elif record.validations:
        measured = record.validations[max(record.validations)]["bpb"]
    val_bpb = finite(measured)
    ledgers = evaluations(run / "eval")
    scores = scores_of(ledgers)
    fullest = next(reversed(ledgers.values()), None)
    versions = record.machine.get("versions") or {}
    begun = recipe.get("from")
    steps = len(record.steps) + (begun["step"] if begun and record.train else 0)
    return {
        "schema": SCHEMA,
        "run_id": recipe["run_id"],
        "preset": recipe["preset"],
        "evidence": recipe["evidence"],
        "from": begun,
        "state": _state(record, steps >= planned_steps, measured, scores["core"] or scores["smoke_score"]),
        "learned": None if val_bpb is None or bigram_bpb is None else val_bpb < bigram_bpb,
        "val_bpb": val_bpb,
        "packed_bpb": packed_bpb,
        "bigram_bpb": bigram_bpb,
        **scores,
        "leaks": {key: record.leaks[key] for key in LEAK_KEYS} if record.leaks else None,
        "steps": steps,
        "planned_steps": planned_steps,
        "parameters": derived["total_parameters"]["value"],
        "tokens": tokens,
        "flops": tokens * derived["flops_per_token"]["value"],
        "clocks": {
            "training_s": round(record.training_seconds, 3),
            "node_s": round(record.node_seconds, 3),
            "billed_s": bill and bill["seconds"],
        },
        "stages_s": {stage: round(seconds, 3) for stage, seconds in record.stage_seconds().items()},
        "attempts": len(record.attempts),
        "newest_attempt": _newest(record),
        "unusable_events": len(record.unusable),
        "usd": bill and float(bill["usd"]),
        "machine": _machine(record),
        "versions": {name: str(version) for name, version in sorted(versions.items())},
        "provenance": provenance(record),
        "hashes": _hashes(run, recipe, record, fullest),
        "unhashed": _unhashed(run),
    }


def present(record: Record) -> Record:
    """`record` without the events that the newest start of training took back.

    Training starts again from a checkpoint: what an earlier attempt reported beyond it will be reported again.
    """
    if not record.train:
        return record
    start, since = record.train["rows"], _order(record.train)
    kept: dict[str, Any] = {
        name: {key: e for key, e in sorted(getattr(record, name).items()) if e["rows"] <= start or _order(e) > since}
        for name in ("steps", "validations", "slow_ranks", "rank_times", "checkpoints")
    }
    return dataclasses.replace(record, **kept)


def _order(event: dict[str, Any]) -> tuple[int, int]:
    return event["attempt"], event["seq"]


def finite(value: float | None) -> float | None:
    """`value`, or None where it is missing, NaN or infinite."""
    return value if value is not None and math.isfinite(value) else None


def _state(record: Record, trained: bool, bpb: float | None, score: dict[str, Any] | None) -> str:
    """ "complete" (trained to the planned step, validated and scored), "diverged" or "incomplete"."""
    measured = [*(event["loss"] for event in record.steps.values()), *([] if bpb is None else [bpb])]
    ended = record.attempts[-1].exit_code if record.attempts else None
    if ended == ExitCode.DIVERGED or not all(map(math.isfinite, measured)):
        return "diverged"
    return "complete" if trained and bpb is not None and score is not None else "incomplete"


def evaluations(folder: Path) -> dict[str, Ledger]:
    """The evaluations in `folder` by their ids (of earlier versions, names), the fullest last."""
    ledgers = {each.name: Ledger.open(each) for each in sealed_ledgers(folder)}
    return dict(sorted(ledgers.items(), key=lambda item: (fullness(item[1].name, item[1].cap), item[0])))


def scores_of(ledgers: dict[str, Ledger]) -> dict[str, Any]:
    """CORE and the smoke score, of the fullest evaluation that gave one each, and all evaluations, fullest first."""
    fullest = {ledger.name: ledger for ledger in ledgers.values()}
    every = [_evaluation(name, ledger) for name, ledger in reversed(ledgers.items())]
    scores = {name: _score(fullest.get(name)) for name in ("core", "smoke_score")}
    return scores | {"evaluations": every}


def _evaluation(name: str, ledger: Ledger) -> dict[str, Any]:
    made_from = {key: ledger.made_from.get(key) for key in ("bundle", "weights", "dtype", "backend")}
    return {"id": name, "name": ledger.name, "metric": ledger.metric, "se": ledger.se, "cap": ledger.cap, **made_from}


def _score(ledger: Ledger | None) -> dict[str, Any] | None:
    if ledger is None:
        return None
    tasks = [{"task": task.label} | {key: getattr(task, key) for key in TASK_KEYS} for task in ledger.tasks]
    baselines = {task.label: task.baseline for task in ledger.tasks}
    return {"metric": ledger.metric, "se": ledger.se, "cap": ledger.cap, "baselines": baselines, "tasks": tasks}


def _newest(record: Record) -> dict[str, Any] | None:
    """Where the run's newest attempt is: Unix seconds of its last event, and how it ended, null while it goes on."""
    if not record.attempts:
        return None
    life = record.attempts[-1]
    return {"number": life.number, "seen": round(life.end, 3), "exit_code": life.exit_code, "reason": life.reason}


def _machine(record: Record) -> dict[str, Any]:
    cpu = record.machine.get("cpu") or {}
    train = {key: record.train.get(key) for key in ("device", "world_size", "threads", "dtype")}
    return {"cpu": cpu.get("model"), "cores": cpu.get("cores"), "cpu_bf16": cpu.get("bf16")} | train


def provenance(record: Record) -> dict[str, Any] | None:
    """Of the newest attempt that trained, or of the newest; None for a run of an earlier version."""
    lives = {life.number: life.first for life in record.attempts}
    newest = record.train.get("attempt", max(lives, default=0))
    return lives.get(newest, {}).get("provenance")


def _hashes(run: Path, recipe: dict[str, Any], record: Record, ledger: Ledger | None) -> dict[str, str | None]:
    """Two runs with equal hashes had equal recipes, text, tokenizer, weights and questions."""
    prepared = record.prepared.get("id")
    tokenizer = checkpoint = None
    if prepared:
        tokenizer = _files_hash(run.parent.parent / "prepared" / prepared / "tokenizer", "tokenizer")
    if record.checkpoints:
        newest = record.checkpoints[max(record.checkpoints)]["folder"]
        checkpoint = _files_hash(run / "checkpoints" / Path(newest).name, "checkpoint")
    return {
        "recipe": hashlib.sha256(canonical_json(recipe["recipe"]).encode()).hexdigest(),
        "prepared": prepared,
        "tokenizer": tokenizer,
        "checkpoint": checkpoint,
        "bundle": ledger.made_from["bundle"] if ledger else None,
    }


def _unhashed(run: Path) -> list[str]:
    """Scores and checkpoints sealed by an earlier version, whose manifests carry no hash of themselves: a number that
    was changed there is not noticed."""
    rests_on = [run / "eval" / "bpb", *(folder / "ledger" for folder in sealed_ledgers(run / "eval")), *folders(run)]
    manifests = {folder: folder / MANIFEST for folder in rests_on if is_sealed(folder)}
    return [
        folder.relative_to(run).as_posix()
        for folder, file in manifests.items()
        if HASH not in read_manifest(file.read_bytes(), file, f"delete {folder} and run again")
    ]


def _files_hash(folder: Path, kind: str) -> str | None:
    """`files_hash` of a sealed folder; None where it is not there."""
    return files_hash(open_sealed(folder, kind=kind, verify=False).files) if is_sealed(folder) else None
