"""What runs of one recipe show about GPT-2 XL's CORE: mean, interval, one-sided p, and what may be said.

Over several runs the error is measured from run to run (Student's t; with a known sd, the normal law). One run has only
the error of item sampling, which says nothing of another run: it can never show that a recipe beats anything.
The published score is taken as it stands, on the bundle's items; a capped CORE is of other items, and shows nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from job.errors import DataError, UsageError
from job.evaluation.ledger import Ledger
from job.plan.published_runs import CORE_SD, SHOWN, chance_of_passing, runs_needed
from job.plan.quote import Plan, make_plan
from job.recipe.config import differing_keys, from_document, resolve
from job.recipe.leaderboard import GPT2_XL_CORE
from job.report import words
from job.report.result import build_result, evaluations, finite
from job.report.words import probability
from job.store.documents import recipe_of

LEVEL = 0.95
"""of the interval"""
ITEM_SE = 0.0065
"""of CORE by item sampling over all items (computed from the published accuracies), for a figure without tasks"""
MOST_RUNS = 10_000
PRICED_AS = "run6"
"""the preset by which a figure without a run is priced"""
MADE_OF = ("bundle", "cap", "max_tokens", "scorer", "dtype", "backend")
"""of an evaluation: what must be equal where two scores are compared"""
SEEDS = ("train.seed", "data.seed")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's CORE, its error by item sampling, its val_bpb; a bare figure has no ledger and no recipe.json."""

    core: float
    se: float = ITEM_SE
    name: str | None = None
    bpb: float | None = None
    ledger: Ledger | None = None
    recipe: dict[str, Any] | None = None

    @property
    def cap(self) -> int | None:
        return self.ledger.cap if self.ledger else None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`sd` from run to run, published where nothing better is known; `p` one-sided; `needed` runs in all for SHOWN.

    `law`: "t", "normal" (a known sd) or "items". `shown`: "beats", "not shown" or "does not beat".
    """

    mean: float
    sd: float
    interval: tuple[float, float]
    p: float
    law: str
    shown: str
    needed: int | None


def judge(cores: Sequence[float], *, sd: float | None = None, se: float = ITEM_SE, cap: int | None = None) -> Verdict:
    """The verdict on `cores`, one a run; `sd` where it is known, `se` by item sampling of a single run.

    UsageError for figures that are no CORE, or that have no error.
    """
    if not cores or not all(math.isfinite(core) and -1 < core <= 1 for core in cores):
        raise UsageError("a CORE is a number between -1 and 1: give those that were measured")
    if sd is not None and not (math.isfinite(sd) and sd > 0):
        raise UsageError(f"--sd {sd:g} cannot be used: a standard deviation is above 0, e.g. {CORE_SD}")
    n, mean = len(cores), statistics.fmean(cores)
    if n > 1 and sd is None:
        law, name, spread = stats.t(n - 1), "t", statistics.stdev(cores)
        if not spread:
            raise UsageError("all figures are equal, which independent runs never are: give each run once")
    else:
        law, name, spread = stats.norm(), "items" if sd is None else "normal", sd or CORE_SD
    error = se if name == "items" else spread / math.sqrt(n)
    if not error:
        raise UsageError("the error by items is 0, as every task has all items right or all wrong: evaluate more items")
    distance = (mean - GPT2_XL_CORE) / error
    p, half = float(law.sf(distance)), float(law.ppf((1 + LEVEL) / 2)) * error
    if cap or SHOWN <= p <= 1 - SHOWN or (n == 1 and p < SHOWN):
        shown = "not shown"
    else:
        shown = "beats" if p < SHOWN else "does not beat"
    needed = runs_needed(mean, spread, known=sd is not None, most=MOST_RUNS)
    return Verdict(mean, spread, (mean - half, mean + half), p, name, shown, None if cap else needed)


def certificate(runs: Sequence[Run], sd: float | None = None) -> dict[str, Any]:
    """The verdict on `runs` as plain JSON values, with its sentences; UsageError where they are not one recipe's."""
    check_alike(runs)
    cap = runs[0].cap
    verdict = judge([run.core for run in runs], sd=sd, se=runs[0].se, cap=cap)
    passed = None if cap else sum(run.core > GPT2_XL_CORE for run in runs)
    plan = make_plan(from_document(runs[0].recipe) if runs[0].recipe else resolve(PRICED_AS))
    enough = verdict.shown == "beats"
    more = 0 if enough else None if verdict.needed is None else verdict.needed - len(runs)
    each = plan.on_node.dollars if plan.on_node else None
    document = {
        "schema": 1,
        "metric": "core",
        "cap": cap,
        "threshold": GPT2_XL_CORE,
        "runs": [{"run": run.name, "core": run.core, "se": run.se, "val_bpb": run.bpb} for run in runs],
        **dataclasses.asdict(verdict),
        "level": LEVEL,
        "passed": passed,
        "chance_of_passing": None if cap else chance_of_passing(verdict.mean, verdict.sd),
        "more_runs": more,
        "usd": None if more is None or each is None else [more * dollars for dollars in each],
        "usd_by": f"estimated by `speedrun plan --preset {plan.recipe.preset}`",
        "bpb": _bpb(runs, plan),
    }
    return document | {"sentences": [rule_sentence(document), shown_sentence(document)]}


def check_alike(runs: Sequence[Run]) -> None:
    """UsageError unless the runs can be taken as independent runs of one recipe, scored alike."""
    scored = [(run, run.ledger, run.recipe) for run in runs if run.ledger and run.recipe]
    for (a, mine, recipe), (b, its, other) in itertools.combinations(scored, 2):
        for key in MADE_OF:
            if mine.made_from.get(key) != its.made_from.get(key):
                values = f"{mine.made_from.get(key)} and {its.made_from.get(key)}"
                raise UsageError(
                    f"{a.name} and {b.name} were not scored alike ({key}: {values}): evaluate one of them as the other"
                )
        if [(task.label, task.baseline) for task in mine.tasks] != [(task.label, task.baseline) for task in its.tasks]:
            raise UsageError(f"{a.name} and {b.name} were scored with other tasks or baselines: evaluate them alike")
        if [task.accuracy for task in mine.tasks] == [task.accuracy for task in its.tasks]:
            raise UsageError(f"{a.name} and {b.name} gave the same answers: they are one run, which counts once")
        keys = differing_keys(recipe["recipe"], other["recipe"])
        if differing := [key for key in keys if not key.startswith((*SEEDS, "eval."))]:
            raise UsageError(
                f"{a.name} and {b.name} are runs of different recipes ({differing[0]}): certify each alone"
            )


def load(run: Path) -> Run:
    """The fullest CORE of a run; UsageError where it has none, DataError where it is no number."""
    result = build_result(run)
    if not result["core"]:
        has = "a smoke score, which is not CORE" if result["smoke_score"] else "no score yet"
        how = f"speedrun evaluate --run-id {run.name} --core-bundle PATH"
        raise UsageError(f"run {run.name} has {has}: score it with {how}")
    ledger = [each for each in evaluations(run / "eval").values() if each.name == "core"][-1]
    if finite(ledger.metric) is None or finite(ledger.se) is None:
        raise DataError(f"the CORE of {run.name} is not a number; delete {run / 'eval'} and evaluate again")
    return Run(ledger.metric, ledger.se, run.name, result["val_bpb"], ledger, recipe_of(run))


def _bpb(runs: Sequence[Run], plan: Plan) -> dict[str, Any] | None:
    """The mean val_bpb beside the published one, and in what the recipe differs from the one it was published for."""
    measured = [run.bpb for run in runs if run.bpb is not None]
    if not measured:
        return None
    same_text = plan.run.dataset == plan.recipe.data.source
    return {
        "mean": statistics.fmean(measured),
        "published": plan.run.bpb if same_text else None,
        "published_run": plan.run.name,
        "differences": plan.differences,
    }


# ---- in words


def metric_name(cap: int | None) -> str:
    return f"CORE capped at {cap:,} items a task" if cap else "CORE"


def rule_sentence(document: dict[str, Any]) -> str:
    n, rule = len(document["runs"]), f"By the leaderboard's rule for one run (CORE above {GPT2_XL_CORE}, all items)"
    if document["cap"]:
        return f"{rule} nothing is said: {metric_name(document['cap'])} is another metric."
    if n == 1:
        return f"{rule} this run {'passes' if document['passed'] else 'does not pass'}."
    return f"{rule} {document['passed']} of {n} runs pass."


def shown_sentence(document: dict[str, Any]) -> str:
    """What the figures show; its first words are the verdict."""
    n, p = len(document["runs"]), probability(document["p"])
    average = f"{n} runs average {words.number(document['mean'], 4)}"
    chance = f"a recipe no better would reach that with p = {p}"
    if document["shown"] == "beats":
        return f"This recipe beats GPT-2 XL's published CORE: {average}; {chance}."
    if document["shown"] == "does not beat":
        below = f"it lies below {GPT2_XL_CORE} with p = {probability(1 - document['p'])}"
        if n > 1:
            return f"This recipe does not beat GPT-2 XL's published CORE: {average}; {below}."
        return f"This model does not beat GPT-2 XL's published CORE: {below} by item sampling alone."
    if document["cap"]:
        return "Not shown: the published score is not of these items; evaluate without a cap."
    if n == 1:
        return (
            "Not shown: one run cannot show that its recipe beats GPT-2 XL, since CORE varies from run to run"
            f" (sd {words.number(document['sd'], 4)}{', published' if document['law'] == 'items' else ''})."
        )
    return f"Not shown whether this recipe beats GPT-2 XL: {average}; {chance}, and less than {SHOWN} is asked for."


LAWS = {
    "t": "Student's t over {n} runs, sd {sd} from run to run",
    "normal": "normal law over {n} run{s}, known sd {sd}",
    "items": "item sampling alone: of this model, not of its recipe",
}


def certificate_lines(document: dict[str, Any]) -> list[str]:
    """The certificate for a terminal."""
    n, (low, high) = len(document["runs"]), document["interval"]
    law = LAWS[document["law"]].format(n=n, s="s" * (n > 1), sd=words.number(document["sd"], 4))
    rows = {run["run"]: words.number(run["core"], 5) for run in document["runs"] if run["run"] and n > 1}
    rows |= {
        "mean" if n > 1 else metric_name(document["cap"]): words.number(document["mean"], 5),
        "95 % interval": f"{words.number(low, 4)} to {words.number(high, 4)}   ({law})",
        f"p against {GPT2_XL_CORE}": f"{probability(document['p'])}   (one-sided)",
    }
    if document["chance_of_passing"] is not None:
        chance = words.percent(document["chance_of_passing"], 0)
        rows["another run"] = f"passes the rule with {chance}, where mean and sd stay as they are"
    rows[f"for p < {SHOWN}"] = _more_runs(document)
    if document["bpb"]:
        rows["validation bpb"] = _bpb_words(document["bpb"])
    width = max(map(len, rows))
    return [*document["sentences"], "", *(f"  {name:<{width}}  {value}" for name, value in rows.items())]


def _more_runs(document: dict[str, Any]) -> str:
    more = document["more_runs"]
    if more == 0:
        return "no more runs"
    if more is None:
        return "no number of capped runs" if document["cap"] else "no number of runs like these"
    price = "no price known" if document["usd"] is None else "${:,.0f} to ${:,.0f}".format(*document["usd"])
    return f"{more:,} more run{'s' * (more > 1)} like {'these' if len(document['runs']) > 1 else 'this'}, {price}" + (
        f" ({document['usd_by']})" if document["usd"] else ""
    )


def _bpb_words(bpb: dict[str, Any]) -> str:
    mean, run = words.number(bpb["mean"], 5), bpb["published_run"]
    if bpb["published"] is None:
        return f"{mean}   (no figure is published for this text)"
    said = f"{mean}   ({words.number(bpb['published'], 5)} is published for {run}"
    return said + (f", which differs: {'; '.join(bpb['differences'])})" if bpb["differences"] else ")")
