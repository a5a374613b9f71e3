"""The result and the page of a model that no run of ours made (`speedrun evaluate --hf`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from job.machine import host
from job.report import page, words
from job.report.render import provenance_rows, score_rows
from job.report.result import described, evaluations, fullest_scores
from job.store.sealed import sealing


def write_foreign_report(evaluated: Path, model: str) -> dict[str, Any]:
    """Seal `evaluated`/report/ (result.json, report.html) from the evaluations there, and return the result."""
    ledgers = evaluations(evaluated)
    core, smoke = fullest_scores(ledgers)
    result = {
        "schema": 1,
        "model": model,
        "core": core,
        "smoke_score": smoke,
        "evaluations": [described(name, ledger) for name, ledger in reversed(ledgers.items())],
        "provenance": host.provenance(),
    }
    with sealing(evaluated / "report", kind="report", made_from={"evaluations": sorted(ledgers)}) as folder:
        (folder.path / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (folder.path / "report.html").write_text(page.foreign_html(context(result)), encoding="utf-8")
    return result


def context(result: dict[str, Any]) -> dict[str, Any]:
    """The variables of the template, ready to print."""
    newest = result["evaluations"][0]
    known = {"weights": newest["weights"], "bundle": newest["bundle"]}
    return {
        "result": result,
        "verdict": words.score_sentence(result),
        "tasks": score_rows(result),
        "evaluations": words.evaluation_rows(result),
        "facts": [*known.items(), *provenance_rows(result["provenance"])],
    }
