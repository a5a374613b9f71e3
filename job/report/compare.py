"""Two runs side by side: tasks paired by item, bits per byte with their noise, curves, recipes, clocks, and the one
sentence that may be concluded.

By task, of the items that one model has right and the other wrong: exact McNemar (binomial, two-sided). On the metric,
the plain mean of centred accuracies: its difference is a mean of per-item differences d in -1, 0, 1, so

    difference = mean over tasks of mean(d) / (1 - baseline)        se = sqrt(sum var(d) / n / (1 - baseline)^2) / tasks

with tasks taken as independent, and a two-sided p by the normal law; where no task's differences vary (se = 0, as with
one item a task), McNemar's over all items. Both compare two models; of their recipes one run each shows only what goes
beyond the published sd from run to run.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from job.errors import DataError
from job.evaluation.ledger import ANSWERS, Ledger, read_answers
from job.plan.published_runs import CORE_SD, SHOWN
from job.recipe.config import differing_keys
from job.report import words
from job.report.certify import MADE_OF, metric_name
from job.report.receipt import receipt
from job.report.result import evaluations, present, result_of
from job.report.words import probability
from job.store.attempt import Record, fold
from job.store.documents import recipe_of
from job.store.sealed import is_sealed, open_sealed

BPB_SD = 0.00023
"""of val_bpb from run to run (published: the 20 seeds of PR #807)"""
PUBLISHED_SIZE = 1_000_000_000
"""parameters from which the published sds are taken to hold; smaller models vary more"""
NOISE = math.sqrt(2) * BPB_SD
SHOWN_POINTS = 5
"""of the curves on a terminal"""


def compare(a: Path, b: Path) -> tuple[dict[str, Any], tuple[Record, Record]]:
    """The comparison as plain JSON values, and both records for its page.

    UsageError where there is no run, DataError where something sealed is damaged.
    """
    recipes, records = (recipe_of(a), recipe_of(b)), (present(fold(a)), present(fold(b)))
    results = [result_of(*parts) for parts in zip((a, b), recipes, records, map(receipt, (a, b)), strict=True)]
    settings = [recipe["recipe"] for recipe in recipes]
    document = {
        "schema": 1,
        "runs": [result["run_id"] for result in results],
        "sds_hold": all(result["parameters"] >= PUBLISHED_SIZE for result in results),
        "same": _sameness(a, b, results, records),
        "items": paired_items(a, b),
        "bpb": _bpb(results, settings),
        "curve": _curve(*records),
        "recipe": [key for free in (False, True) for key in differing_keys(*settings, free=free)],
        "clocks": [_clocks(result) for result in results],
    }
    return document | {"conclusion": conclusion(document)}, records


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p of so many items that only one of two models has right."""
    discordant = only_a + only_b
    return float(stats.binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0


def paired_items(a: Path, b: Path) -> dict[str, Any] | None:
    """The fullest evaluation that both have, item by item; None where they were never scored alike."""
    mine, its = evaluations(a / "eval"), evaluations(b / "eval")
    pairs = [
        (name, other)
        for name, ledger in reversed(mine.items())
        for other, beside in reversed(its.items())
        if ledger.name == beside.name and all(ledger.made_from.get(k) == beside.made_from.get(k) for k in MADE_OF)
    ]
    for name, other in pairs:
        ledgers, folders = (mine[name], its[other]), (a / "eval" / name, b / "eval" / other)
        labels = [task.label for task in ledgers[0].tasks]
        if all(is_sealed(folder / label) for folder in folders for label in labels):
            return _paired(ledgers, folders)
    return None


def _paired(ledgers: tuple[Ledger, Ledger], folders: tuple[Path, Path]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    centered, variances = [], []
    for task, beside in zip(*(ledger.tasks for ledger in ledgers), strict=True):
        right = [_right_by_line(folder / task.label) for folder in folders]
        if right[0].keys() != right[1].keys() or (task.label, task.baseline) != (beside.label, beside.baseline):
            raise DataError(f"the items of {task.label} are not the same in both runs: evaluate one of them again")
        each = np.array([int(right[0][line]) - int(right[1][line]) for line in right[0]])
        only = [int((each == sign).sum()) for sign in (1, -1)]
        centered.append(each.mean() / (1 - task.baseline))
        variances.append(each.var() / len(each) / (1 - task.baseline) ** 2)
        accuracies = [task.accuracy, beside.accuracy]
        rows.append({"task": task.label, "n": task.n, "accuracy": accuracies, "only": only, "p": mcnemar(*only)})
    difference, se = float(np.mean(centered)), math.sqrt(sum(variances)) / len(variances)
    in_all = (sum(row["only"][model] for row in rows) for model in (0, 1))
    p = float(2 * stats.norm.sf(abs(difference) / se)) if se else mcnemar(*in_all)
    return {
        "name": ledgers[0].name,
        "cap": ledgers[0].cap,
        "metric": [ledger.metric for ledger in ledgers],
        "difference": difference,
        "se": se,
        "p": p,
        "tasks": rows,
    }


def _right_by_line(folder: Path) -> dict[int, bool]:
    answers = read_answers(open_sealed(folder, kind=ANSWERS).path / "answers.csv")
    return {answer.line: answer.right for answer in answers}


def _sameness(a: Path, b: Path, results: list[dict[str, Any]], records: tuple[Record, Record]) -> str | None:
    """Why the two are one and the same; None where they are two."""
    if a.resolve() == b.resolve():
        return "it is compared with itself"
    checkpoints = {result["hashes"]["checkpoint"] for result in results}
    if len(checkpoints) == 1 and None not in checkpoints:
        return "both have the same weights, bit for bit"
    losses = [[(step, event["loss"]) for step, event in record.steps.items()] for record in records]
    return "both had the same loss at every step" if losses[0] and losses[0] == losses[1] else None


def _bpb(results: list[dict[str, Any]], settings: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Both val_bpb, and their difference where they are of the same held-out rows; None where one is missing."""
    values = [result["val_bpb"] for result in results]
    if None in values:
        return None
    rows = [(r["hashes"]["prepared"], s["train"].get("val_tokens")) for r, s in zip(results, settings, strict=True)]
    same_text = rows[0] == rows[1] and rows[0][0] is not None
    difference = values[0] - values[1] if same_text else None
    return {"values": values, "difference": difference}


def _curve(a: Record, b: Record) -> list[dict[str, Any]]:
    """val_bpb at the numbers of tokens at which both were validated."""
    curves = [{_tokens(record, e): e["bpb"] for e in record.validations.values()} for record in (a, b)]
    both = sorted(curves[0].keys() & curves[1].keys())
    return [{"tokens": tokens, "val_bpb": [curve[tokens] for curve in curves]} for tokens in both]


def _tokens(record: Record, event: dict[str, Any]) -> int:
    return event["rows"] * record.prepared.get("seq_len", 1)


def _clocks(result: dict[str, Any]) -> dict[str, Any]:
    timed = words.timed_steps(result) or (None, None)
    names = ("steps", "tokens", "flops", "attempts", "usd")
    return {name: result[name] for name in names} | result["clocks"] | {"step_ms": timed[0], "tokens_per_s": timed[1]}


def html(document: dict[str, Any], records: tuple[Record, Record]) -> str:
    """The page, with the curves of both records."""
    from job.report import figures, page  # Matplotlib and Jinja take a second to import

    more = {
        "drawings": figures.pair_figures(records, document["runs"]),
        "clocks": clock_rows(document),
        "score": score_title(document),
        "bpb": bpb_words(document),
    }
    return page.fill("compare.html.j2", document | more)


# ---- in words


def conclusion(document: dict[str, Any]) -> str:
    """The one sentence of what may be concluded."""
    if document["same"]:
        return f"These are one and the same run ({document['same']}): there is nothing to compare."
    items, (a, b) = document["items"], document["runs"]
    if items is None:
        return _without_items(document)
    name = score_title(document)
    better, worse = (a, b) if items["difference"] > 0 else (b, a)
    by = f"{words.number(abs(items['difference']), 4)} ± {words.number(items['se'], 4)} (p = {probability(items['p'])})"
    if items["p"] >= SHOWN:
        return f"Neither model is shown to be better: on the same items their {name} differs by {by}."
    model = f"On the same items the model of {better} has the higher {name}, by {by}"
    if name != "CORE" or not document["sds_hold"]:
        return f"{model}; of their recipes one run each says nothing, for how it varies from run to run is not known."
    chance = float(2 * stats.norm.sf(abs(items["difference"]) / (math.sqrt(2) * CORE_SD)))
    if chance >= SHOWN:
        return (
            f"{model}; that its recipe is better than that of {worse} is not shown, for two runs of one recipe differ"
            f" so much with p = {probability(chance)} (published sd {CORE_SD})."
        )
    return (
        f"{model}, and by more than two runs of one recipe would (p = {probability(chance)} by the published sd"
        f" {CORE_SD}), though one run each measures no sd of these two."
    )


def _without_items(document: dict[str, Any]) -> str:
    bpb, (a, b), unpaired = document["bpb"], document["runs"], "they were never scored on the same items alike"
    if bpb is None:
        return f"Nothing may be concluded: {unpaired}, and not both are finished, with bits per byte to compare."
    if bpb["difference"] is None:
        return f"Nothing may be concluded: {unpaired}, and their bits per byte are not of the same text."
    lower = a if bpb["difference"] < 0 else b
    said = f"The model of {lower} has fewer bits per byte on the same held-out text"
    if not document["sds_hold"]:
        return f"{said}, of which nobody knows how much they vary from run to run; of tasks nothing, for {unpaired}."
    times = abs(bpb["difference"]) / NOISE
    if times < stats.norm.isf(SHOWN / 2):
        return f"Neither model is shown to be better: their bits per byte differ within the noise, and {unpaired}."
    return f"{said}, by {words.number(times, 0)} times the published noise; of tasks nothing, for {unpaired}."


CLOCKS = (
    ("steps", "steps", words.count),
    ("tokens", "tokens", words.short),
    ("FLOP", "flops", words.short),
    ("training clock", "training_s", words.duration),
    ("time on the node", "node_s", words.duration),
    ("milliseconds a step", "step_ms", lambda value: words.number(value, 0)),
    ("tokens a second", "tokens_per_s", lambda value: words.number(value, 0)),
    ("attempts", "attempts", words.count),
    ("dollars", "usd", lambda value: words.number(value, 2)),
)


def clock_rows(document: dict[str, Any]) -> list[list[str]]:
    """[what, of the first run, of the second]."""
    return [[name, *(say(clocks[key]) for clocks in document["clocks"])] for name, key, say in CLOCKS]


def score_title(document: dict[str, Any]) -> str:
    items = document["items"] or {"name": "smoke_score"}
    return "smoke score" if items["name"] == "smoke_score" else metric_name(items["cap"])


def bpb_words(document: dict[str, Any]) -> str:
    """The difference in bits per byte beside its noise."""
    bpb = document["bpb"]
    if bpb is None:
        return "not measured in both"
    a, b = (words.number(value, 5) for value in bpb["values"])
    if bpb["difference"] is None:
        return f"{a} and {b}, of other held-out text: not comparable"
    noise = f"the noise is {words.number(NOISE, 5)} between two runs of one recipe (published)"
    unknown = "how much models of this size vary from run to run is not known"
    return f"{a} and {b}: {words.number(bpb['difference'], 5)}; {noise if document['sds_hold'] else unknown}"


def comparison_lines(document: dict[str, Any]) -> list[str]:
    """The comparison for a terminal."""
    a, b = document["runs"]
    lines = [document["conclusion"], "", f"bits per byte: {bpb_words(document)}"]
    for point in document["curve"][-SHOWN_POINTS:]:
        values = " ".join(f"{words.number(value, 4):>10}" for value in point["val_bpb"])
        lines.append(f"  {words.short(point['tokens']):>12} tokens {values}")
    if items := document["items"]:
        lines += ["", f"{'task':<34}{'items':>7}{'A':>9}{'B':>9}{'only A':>9}{'only B':>9}{'p':>17}"]
        for row in items["tasks"]:
            accuracies = "".join(f"{words.percent(accuracy):>9}" for accuracy in row["accuracy"])
            only = "".join(f"{number:>9,}" for number in row["only"])
            lines.append(f"{row['task']:<34}{row['n']:>7,}{accuracies}{only}{probability(row['p']):>17}")
        metrics = "".join(f"{words.number(metric, 4):>9}" for metric in items["metric"])
        difference = f"{words.number(items['difference'], 4)} ± {words.number(items['se'], 4)}"
        lines.append(f"{score_title(document):<41}{metrics}{difference:>18}{probability(items['p']):>17}")
        lines.append(f"(exact McNemar; of {len(items['tasks'])} tasks some fall below 0.05 by chance)")
    lines += ["", f"{'':<22}{'A':>12}{'B':>12}", *(f"{n:<22}{x:>12}{y:>12}" for n, x, y in clock_rows(document))]
    lines += ["", *(document["recipe"] or ["the recipes are equal"])]
    return [f"A  {a}", f"B  {b}", "", *lines]
