"""`speedrun evaluate --hf DIR`: scoring another model with the evaluator of our own.

    out/hf/<name of DIR>/{<id>/{<task>/, ledger/}, report/, items/, logs/}

The supervisor's side; needs no torch. `job/evaluation/hf_stage.py` is what the ranks run.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from job.console import Console
from job.errors import DataError, UsageError
from job.evaluation.core_v1 import PUBLISHED_URL
from job.evaluation.ledger import Ledger, newest
from job.recipe.config import EvalConfig, resolve
from job.report.foreign import write_foreign_report
from job.reporter import Reporter
from job.run.fruitless import RankDied, without_attempts
from job.run.launch import check_writable
from job.run.processes import start_ranks
from job.run.supervise import Interrupts, supervise
from job.store.sealed import atomic_write, is_sealed

USED = ("eval.cap", "eval.core_bundle")


def options(core_bundle: str | None, overrides: Sequence[str]) -> EvalConfig:
    """The `eval` section, by default with the published bundle; UsageError for a key that is not in USED."""
    for override in overrides:
        if override.partition("=")[0].strip() not in USED:
            rule = f"only {' and '.join(USED)} can, e.g. -o eval.cap=1000"
            raise UsageError(f"-o {override} cannot be used with --hf: {rule}")
    flags = {"eval.core_bundle": ("--core-bundle", core_bundle or PUBLISHED_URL)}
    return resolve("smoke", flags, overrides).eval


def evaluate(out: Path, folder: Path, asked: EvalConfig, *, ranks: int, console: Console) -> Ledger:
    """Score the causal language model in `folder` on CORE, going on with the tasks that are sealed; its ledger, with
    result and page beside it."""
    check(folder)
    check_writable(out)
    results = folder_of(out, folder)
    with tempfile.TemporaryDirectory(prefix="speedrun-") as scratch, Interrupts() as interrupts:
        question = Path(scratch) / "question.json"
        document = {"model": str(folder.resolve()), "core_bundle": asked.core_bundle, "cap": asked.cap or None}
        atomic_write(question, json.dumps(document).encode())
        arguments = ["evaluate_hf", str(out), str(question), str(results)]
        started = start_ranks(arguments, world_size=ranks, threads=0, logs=results / "logs", label="evaluate")
        try:
            supervise("evaluate", started, reporter=Reporter(), console=console, interrupts=interrupts)
        except RankDied as died:
            raise without_attempts(died) from None
    ledger = Ledger.open(newest(results))
    write_foreign_report(results, folder.resolve().name, ledger.made_from["weights"])
    return ledger


def folder_of(out: Path, folder: Path) -> Path:
    """The folder of the answers of the model in `folder`."""
    return out / "hf" / folder.resolve().name


def check(folder: Path) -> None:
    """DataError without a model, UsageError without the package that reads it."""
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} holds no Hugging Face model (no config.json); give the folder of a local copy")
    if not is_sealed(folder) and importlib.util.find_spec("transformers") is None:
        raise UsageError(
            "--hf needs the package transformers; install it: make hf, or pip install 'transformers>=4.56'"
        )
