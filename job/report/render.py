"""The report of a run, sealed: `result.json` for programs, `report.md` for terminals, `report.html` for people.

It may be asked for at any moment; what is not there yet is left out or said to be missing.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from job.evaluation.ledger import sealed_ledgers
from job.recipe.config import from_document
from job.report import progress, words
from job.report import result as results
from job.report.receipt import receipt
from job.store.attempt import Record, fold
from job.store.documents import canonical_json, recipe_of
from job.store.fence import run_key
from job.store.sealed import MANIFEST, sealing, sha256_file

TASK_KEYS = ("task", "kind", "n", "shots", "accuracy", "baseline", "centered")


def write_report(run: Path) -> dict[str, Any]:
    """Seal `run`/report/ (result.json, report.md, report.html; receipt.json where a price is known); the result.

    Raises UsageError when there is no run, DataError when its recipe or a sealed folder is damaged, StorageError when
    the disk refuses.
    """
    recipe_of(run)
    made_from = {"files": input_hashes(run)}
    result, files = report_files(run)
    with sealing(run / "report", kind="report", made_from=made_from) as folder:
        for name, text in files.items():
            (folder.path / name).write_text(text, encoding="utf-8")
    return result


def report_files(run: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The result of `run` so far, and the text of each file of its report; raises as `write_report` does."""
    from job.report import examples, page  # Matplotlib and Jinja take a second to import

    recipe = recipe_of(run)
    record = results.present(fold(run))
    bill = receipt(run)
    result = results.result_of(run, recipe, record, bill)
    context = describe(run, recipe, record, result, bill)
    context["asked"] = examples.asked(run, result, record.prepared.get("id"))
    return result, {
        **({"receipt.json": json.dumps(bill, indent=1) + "\n"} if bill else {}),
        "result.json": json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": page.markdown(context, record),
        "report.html": page.html(context, record),
    }


def input_hashes(run: Path) -> dict[str, str]:
    """SHA-256 of the files that a report is made from, by their path in the run's folder."""
    evaluations = [folder / "ledger" / MANIFEST for folder in sealed_ledgers(run / "eval")]
    sealed = [file for file in (run / "eval" / "bpb" / MANIFEST, *evaluations) if file.is_file()]
    files = [run / "recipe.json", *(run / "events").glob("*.jsonl"), *sealed]
    return {file.relative_to(run).as_posix(): sha256_file(file) for file in files}


def describe(
    run: Path, recipe: dict[str, Any], record: Record, result: dict[str, Any], bill: dict[str, Any] | None
) -> dict[str, Any]:
    """The variables of both templates, ready to print; `bill` is the receipt, where there is one."""
    asked = from_document(recipe)
    settings = {
        section: [(key, _plain(value), recipe["sources"][f"{section}.{key}"]) for key, value in entries.items()]
        for section, entries in recipe["recipe"].items()
    }
    return {
        "result": result,
        "headline": words.headline(result),
        "verdict": [words.bpb_sentence(result), words.score_sentence(result), *words.origin_sentences(result)],
        "published": words.published_sentence(asked),
        "progress": progress.progress_sentence(progress.figures(asked, record)),
        "warnings": progress.warnings(record),
        "to_paste": words.to_paste(result),
        "when": words.moment(record.attempts[0].start) if record.attempts else "",
        "score_name": words.score_name(result),
        "tasks": task_rows(record, result),
        "evaluations": words.evaluation_rows(result),
        "receipt": bill,
        "settings": settings,
        "derived": [(name, _plain(d["value"]), d["why"], d["source"]) for name, d in recipe["derived"].items()],
        "stages": stage_rows(result),
        "training_clock": words.training_clock(result),
        "slow_ranks": words.slow_ranks(record),
        "mfu_of_one": (progress.utilization(asked, record, 1.0) or (None, None))[1],
        "machine": machine_rows(result),
        "places": places(run, record, bill),
        "commands": commands(run, recipe, result),
    }


def task_rows(record: Record, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The tasks of the score; before it is there, those that events report so far."""
    if words.score_of(result):
        return score_rows(result)
    entries = [event | {"task": name, "kind": event["type"]} for name, event in record.tasks.items()]
    return [{key: entry[key] for key in TASK_KEYS} for entry in entries]


def score_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The tasks of the score."""
    score = words.score_of(result)
    assert score
    entries = [task | {"baseline": score["baselines"][task["task"]]} for task in score["tasks"]]
    return [{key: entry[key] for key in TASK_KEYS} for entry in entries]


def stage_rows(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(stage, seconds, share of the time on the node), and the time between and before the stages."""
    total = result["clocks"]["node_s"]
    rows = [(stage, seconds) for stage, seconds in result["stages_s"].items() if seconds]
    rest = total - sum(seconds for _, seconds in rows)
    if rows and rest >= 0.5:
        rows.append(("outside the stages", rest))
    return [(stage, seconds, seconds / total if total else 0.0) for stage, seconds in rows]


def machine_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    machine = result["machine"]
    cores = f", {machine['cores']} cores" if machine["cores"] else ""
    ranks = f"{machine['world_size']} x {machine['device']}, {machine['threads']} threads each, {machine['dtype']}"
    known = [("processor", machine["cpu"] and machine["cpu"] + cores), ("training ran on", machine["device"] and ranks)]
    known += [("sealed by an earlier version, without a hash of itself", ", ".join(result["unhashed"]))]
    rows = [*known, *provenance_rows(result["provenance"]), *result["versions"].items()]
    return [(name, value) for name, value in rows if value]


def provenance_rows(provenance: dict[str, Any] | None) -> list[tuple[str, str]]:
    """GPUs, driver, commit, image and lock, where they are known."""
    origin = provenance or {}
    rows = [
        ("GPUs", words.gpus_of(origin)),
        *((name, origin.get(name)) for name in ("driver", "commit", "image", "lock")),
    ]
    return [(name, value) for name, value in rows if value]


def places(run: Path, record: Record, bill: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """(what, its link from the page or nothing, where it is): the report's other files, the weights, the bucket."""
    rows = [("all figures, for programs", "result.json"), ("the same as text", "report.md")]
    rows += [("what was paid for what", "receipt.json")] if bill else []
    found = [(what, name, name) for what, name in rows]
    checkpoints = record.checkpoints.values()
    kept = [(f"weights, step {words.count(e['step'])}", f"checkpoints/{Path(e['folder']).name}") for e in checkpoints]
    for what, folder in [*kept[-1:], ("what transformers loads", "export")]:
        if (run / folder).is_dir():
            found.append((what, f"../{folder}/", folder))
    if bucket := record.machine.get("bucket"):
        found.append(("everything, in the bucket", "", f"{bucket}/{run_key(run.name)}"))
    return found


def commands(run: Path, recipe: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, str]]:
    """(purpose, command), the most useful first; a command gives each value that no default or preset gave with -o."""
    out = os.fspath(run.parent.parent)
    place = [] if out == "out" else ["--out", out]
    this = [*place, "--run-id", run.name]
    begun = result["from"]
    origin = ["--from", begun["run"], "--at", str(begun["step"])] if begun else []
    asked = {
        f"{section}.{key}": ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for section, entries in recipe["recipe"].items()
        for key, value in entries.items()
        if not recipe["sources"][f"{section}.{key}"].startswith(("default", "preset"))
    }

    def train(values: dict[str, str]) -> list[str]:
        overrides = [word for key, value in values.items() for word in ("-o", f"{key}={value}")]
        return ["run", "--preset", recipe["preset"], *overrides]

    rows = []
    if result["state"] != "complete":
        rows.append(("Go on after what is sealed", [*train(asked), *this]))
    else:
        if result["smoke_score"]:
            core = ["evaluate", *this, "--core-bundle", "PATH", "-o", "eval.cap=20"]
            rows.append(("Score this model on the real CORE tasks", core))
        longer = train(asked | {"train.steps": str(2 * result["steps"])})
        rows.append(("Repeat this run", [*train(asked), *origin, *place, "--run-id", f"{run.name}-again"]))
        again = [*longer, *origin, *place, "--run-id", f"{run.name}-longer"]
        rows.append(("Train twice as long on the same prepared data", again))
    rows.append(("Write this report anew", ["report", *this]))
    return [(purpose, shlex.join(["speedrun", *command])) for purpose, command in rows]


def _plain(value: Any) -> str:
    """A configuration value as it would be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or words.NONE
    return canonical_json(value) if isinstance(value, dict) else str(value) or words.NONE
