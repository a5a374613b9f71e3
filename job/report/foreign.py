"""The result and the page of a model that no run of ours made (`speedrun evaluate --hf`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from job.machine import host
from job.report import words
from job.report.render import provenance_rows, score_rows
from job.report.result import SCHEMA, evaluations, scores_of
from job.store.sealed import sealing


def write_foreign_report(evaluated: Path, model: str, weights: str) -> dict[str, Any]:
    """Seal `evaluated`/report/ (result.json, report.html) from the evaluations of these `weights` (their hash) there,
    where models of the same name have theirs too, and return the result."""
    from job.report import page  # Matplotlib and Jinja take a second to import

    ledgers = {name: each for name, each in evaluations(evaluated).items() if each.made_from.get("weights") == weights}
    result = {"schema": SCHEMA, "model": model, **scores_of(ledgers), "provenance": host.provenance()}
    with sealing(evaluated / "report", kind="report", made_from={"evaluations": sorted(ledgers)}) as folder:
        (folder.path / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (folder.path / "report.html").write_text(page.foreign_html(context(result)), encoding="utf-8")
    return result


def context(result: dict[str, Any]) -> dict[str, Any]:
    """The variables of the template, ready to print."""
    fullest = result["evaluations"][0]
    return {
        "result": result,
        "verdict": words.score_sentence(result),
        "tasks": score_rows(result),
        "evaluations": words.evaluation_rows(result),
        "facts": [*((name, fullest[name]) for name in ("weights", "bundle")), *provenance_rows(result["provenance"])],
    }
