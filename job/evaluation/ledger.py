"""The ledger: every answer kept, and what follows from the answers.

    eval/<id>/<label>/answers.csv    sealed; one line per item: line, gold, chosen, right, margin
    eval/<id>/ledger/ledger.json     sealed; the metric, its error, one entry per task, and what it was made from

The id is a hash of what an evaluation is made from (weights, tokenizer, bundle, cap, precision, scorer), so that
evaluations stand side by side and none overwrites another. Earlier versions had one in eval/ itself and lesser ones in
eval/lesser/<name>/; these are read.

`line` is the item's line in the task's file. `margin` is in nats and positive exactly when the answer is right (0 on
a tie): for multiple_choice and schema the lowest mean token loss among the wrong options minus that of the right one;
for language_modeling the smallest lead, over the continuation's tokens, of the right token's logit over the best
other. It is empty where an option without a scored token decided. `chosen` and `gold` are empty for
language_modeling.

The mathematics (DCLM, arXiv:2406.11794): centred accuracy = (accuracy - baseline) / (1 - baseline); the metric is the
plain mean of the tasks' centred accuracies. Its error is that of item sampling alone: binomial, tasks taken as
independent, so

    se(accuracy) = sqrt(a (1 - a) / n)
    se(centred)  = se(accuracy) / (1 - baseline)
    se(metric)   = sqrt(sum se(centred)^2) / tasks

and a task's `error_share` is its part of that sum. Training noise (about 0.006 from run to run, published) comes on
top. This module needs no torch: reports read ledgers.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from job.errors import DataError
from job.evaluation.bundle import Task
from job.reporter import Reporter
from job.store.damaged import usable
from job.store.sealed import MANIFEST, Sealed, content_id, is_sealed, open_sealed, sealing

ANSWERS = "eval_answers"
LEDGER = "eval_ledger"
COLUMNS = ("line", "gold", "chosen", "right", "margin")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model answered to one item; fields as in the module's docstring."""

    line: int
    gold: int | None
    chosen: int | None
    right: bool
    margin: float | None


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One task's row. `se` and `error_share` as in the module's docstring; `seconds` of scoring, by the wall clock."""

    label: str
    kind: str
    n: int
    shots: int
    accuracy: float
    baseline: float
    centered: float
    se: float
    error_share: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The score of one model on one bundle.

    `name` is "core" or "smoke_score"; `made_from` has weights, bundle, cap, dtype and backend.
    """

    name: str
    metric: float
    se: float
    tasks: tuple[TaskResult, ...]
    made_from: dict[str, Any]

    @property
    def cap(self) -> int | None:
        """Items per task at most; None = all."""
        return self.made_from.get("cap")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def open(cls, out: Path) -> Ledger:
        """The ledger sealed in the folder of an evaluation; DataError when it is not there or damaged."""
        folder = open_sealed(out / "ledger", kind=LEDGER)
        document = json.loads((folder.path / "ledger.json").read_text(encoding="utf-8"))
        return cls(**{**document, "tasks": tuple(TaskResult(**task) for task in document["tasks"])})


def centered_accuracy(accuracy: float, baseline: float) -> float:
    """1 for all right, 0 for a guesser at the baseline; both arguments between 0 and 1."""
    return (accuracy - baseline) / (1 - baseline)


def metric_of(centered: Iterable[float]) -> float:
    """The plain mean."""
    values = list(centered)
    return math.fsum(values) / len(values)


def make_ledger(name: str, tasks: Sequence[tuple[Task, Sequence[Answer], float]], made_from: dict[str, Any]) -> Ledger:
    """The ledger of (task, its answers, seconds) in the bundle's order."""
    results = []
    for task, answers, seconds in tasks:
        accuracy = _accuracy(answers)
        variance = accuracy * (1 - accuracy) / len(answers) / (1 - task.baseline) ** 2
        result = TaskResult(
            label=task.label,
            kind=task.kind,
            n=len(answers),
            shots=task.shots,
            accuracy=accuracy,
            baseline=task.baseline,
            centered=centered_accuracy(accuracy, task.baseline),
            se=math.sqrt(variance),
            error_share=0.0,
            seconds=seconds,
        )
        results.append((result, variance))
    total = math.fsum(variance for _, variance in results)
    shared = tuple(dataclasses.replace(r, error_share=variance / total if total else 0.0) for r, variance in results)
    metric = metric_of(result.centered for result in shared)
    return Ledger(name, metric, math.sqrt(total) / len(shared), shared, made_from)


def _accuracy(answers: Sequence[Answer]) -> float:
    return sum(answer.right for answer in answers) / len(answers)


def table_lines(ledger: Ledger) -> list[str]:
    """The ledger as a table for a terminal: a line per task, then the metric."""
    heads = ("n", 6), ("shots", 5), ("accuracy", 8), ("baseline", 8), ("centred", 7), ("se", 6), ("of error", 8)
    lines = [f"{'task':<32} {' '.join(f'{head:>{width}}' for head, width in (*heads, ('seconds', 8)))}"]
    for task in ledger.tasks:
        accuracy = f"{task.accuracy:>8.4f} {task.baseline:>8.3f} {task.centered:>7.4f} {task.se:>6.4f}"
        lines.append(
            f"{task.label:<32} {task.n:>6,} {task.shots:>5} {accuracy} {task.error_share:>8.1%} {task.seconds:>8.1f}"
        )
    name = "CORE" if ledger.name == "core" else "smoke score"
    items = f"at most {ledger.cap:,} items a task" if ledger.cap else "all items"
    how = ", ".join(str(ledger.made_from[key]) for key in ("dtype", "backend") if key in ledger.made_from)
    error = "the error is that of item sampling alone"
    return [*lines, f"{name} {ledger.metric:.4f} ± {ledger.se:.4f} ({items}; {how}); {error}"]


# ---- on disk


def folder_of(evaluations: Path, made_from: Mapping[str, Any]) -> Path:
    """Where the evaluation made from this stands, or will, below a run's eval/."""
    return evaluations / content_id(LEDGER, made_from)


def sealed_ledgers(evaluations: Path) -> dict[Path, Sealed]:
    """The sealed ledgers below a run's eval/, by the folder of their evaluation."""
    folders = [evaluations, *sorted(evaluations.glob("*")), *sorted(evaluations.glob("lesser/*"))]
    return {folder: open_sealed(folder / "ledger", kind=LEDGER) for folder in folders if is_sealed(folder / "ledger")}


def newest(evaluations: Path) -> Path:
    """The folder of the evaluation that ended last on this machine."""
    return max(sealed_ledgers(evaluations), key=lambda folder: (folder / "ledger" / MANIFEST).stat().st_mtime_ns)


def fullness(name: str, cap: int | None) -> tuple[bool, float]:
    """An order of evaluations: CORE says more than the smoke score, then more items a task (None or 0: all) say
    more."""
    return name == "core", cap or math.inf


def sealed_answers(
    out: Path, label: str, made_from: dict[str, Any], reporter: Reporter
) -> tuple[list[Answer], float] | None:
    """The answers of a task and their seconds, if they are sealed and were made from exactly this; None otherwise."""
    folder = out / label
    sealed = usable(folder, kind=ANSWERS, reporter=reporter)
    if not sealed or sealed.id != content_id(ANSWERS, made_from):
        return None
    return read_answers(folder / "answers.csv"), float(sealed.facts["seconds"])


def seal_answers(out: Path, label: str, made_from: dict[str, Any], answers: Sequence[Answer], seconds: float) -> None:
    with sealing(out / label, kind=ANSWERS, made_from=made_from) as folder:
        folder.facts |= {"n": len(answers), "accuracy": _accuracy(answers), "seconds": seconds}
        with open(folder.path / "answers.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for a in answers:  # the writer leaves None empty
                margin = None if a.margin is None else f"{a.margin:.6g}"
                writer.writerow([a.line, a.gold, a.chosen, int(a.right), margin])


def seal_ledger(out: Path, ledger: Ledger) -> None:
    with sealing(out / "ledger", kind=LEDGER, made_from=ledger.made_from) as folder:
        folder.facts |= {"name": ledger.name, "metric": ledger.metric}
        (folder.path / "ledger.json").write_text(json.dumps(ledger.as_dict(), indent=1), encoding="utf-8")


def read_answers(file: Path) -> list[Answer]:
    """The answers of an answers.csv, in scoring order; DataError naming the line that is not one."""
    answers = []
    with open(file, encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            try:
                line, gold, chosen, right, margin = (row[column] for column in COLUMNS)
                answers.append(
                    Answer(
                        line=int(line),
                        gold=int(gold) if gold else None,
                        chosen=int(chosen) if chosen else None,
                        right=right == "1",
                        margin=float(margin) if margin else None,
                    )
                )
            except (KeyError, ValueError):
                number = len(answers) + 1
                remedy = f"delete {file.parent} and evaluate again"
                raise DataError(f"{file}, answer {number} cannot be read; {remedy}") from None
    return answers
