"""The report's sentences: numbers as people write them, the verdict, the last lines on the terminal.

A smoke score is never called CORE, and one run is never said to beat anything.
"""

from __future__ import annotations

import collections
import datetime
from pathlib import Path
from typing import Any

from job.plan.published_runs import CORE_SD, closest
from job.recipe.config import Recipe
from job.recipe.derive import derive
from job.recipe.leaderboard import GPT2_XL_CORE, UNTIMED_STEPS
from job.store.attempt import Record

KINDS = {"multiple_choice": "multiple choice", "schema": "schema", "language_modeling": "language modeling"}
NONE = "–"
SCALES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` decimals and a true minus sign."""
    return NONE if value is None else f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def count(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def short(value: float | None, unit: str = "") -> str:
    """Three significant digits, a prefix and the unit: 44453619302400, "FLOP" -> 44.5 TFLOP."""
    if value is None:
        return NONE
    scale, prefix = next(((s, p) for s, p in SCALES if value >= s * 0.9995), (1.0, ""))
    scaled = value / scale
    decimals = 0 if scaled >= 99.95 or scale == 1.0 else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{decimals}f} {prefix}{unit}".strip()


def duration(seconds: float | None) -> str:
    """0.42 s, 37 s, 3 min 05 s, 2 h 07 min."""
    if seconds is None:
        return NONE
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds else "0 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(share: float | None, digits: int = 1) -> str:
    return NONE if share is None else f"{100 * share:.{digits}f} %".replace("-", "\N{MINUS SIGN}")


def probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "less than 0.001"


def moment(t: float) -> str:
    """Unix seconds as a date and time of day in UTC."""
    return datetime.datetime.fromtimestamp(t, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def headline(result: dict[str, Any]) -> str:
    """The verdict in one short sentence."""
    if result["state"] == "diverged":
        return "Training diverged"
    if result["learned"] is not None:
        return "The model has learned" if result["learned"] else "Not yet better than a bigram model"
    if not result["steps"]:
        return "Not trained yet"
    if result["steps"] < result["planned_steps"]:
        newest = result.get("newest_attempt")
        ended = newest and newest["exit_code"] is not None
        return "Training has stopped before its end" if ended else "Training is under way"
    return "The model is trained" if result["val_bpb"] is not None else "Trained, but not evaluated yet"


def bpb_sentence(result: dict[str, Any]) -> str:
    bpb, packed, bigram = result["val_bpb"], result["packed_bpb"], result["bigram_bpb"]
    also = f" On the packer's first rows, where published runs validate, it is {number(packed)}." if packed else ""
    progress = f"{count(result['steps'])} of {count(result['planned_steps'])} steps are made"
    if bpb is None:
        diverged = result["state"] == "diverged"
        reason = "the loss was not a finite number" if diverged else "the model was not validated yet"
        return f"There is no validation bpb: {reason}; {progress}."
    if bigram is None and result["steps"] < result["planned_steps"]:
        later = "The bigram model to compare with is fitted in the evaluation."
        return f"Its validation bpb is {number(bpb)} so far; {progress}. {later}"
    if bigram is None:
        return f"Its validation bpb is {number(bpb)}; there is no bigram model to compare with.{also}"
    relation = f"{percent(1 - bpb / bigram, 0)} below" if bpb < bigram else "not below"
    return (
        f"Its validation bpb is {number(bpb)}, {relation} the {number(bigram)} of a bigram model "
        f"fitted to the very tokens that it was trained on.{also}"
    )


def score_sentence(result: dict[str, Any]) -> str:
    if core := result["core"]:
        return (
            f"CORE is {with_error(core, 4)} over {len(core['tasks'])} tasks ({_cap(core)}); "
            f"{GPT2_XL_CORE} is published for GPT-2 XL. The error is that of item sampling; "
            "from run to run CORE varies by another 0.005 (published), and this is one run."
        )
    if smoke := result["smoke_score"]:
        return (
            f"Its smoke score is {with_error(smoke, 3)} over {len(smoke['tasks'])} small tasks made from held-out text "
            f"({_cap(smoke)}); guessing scores 0, a perfect model 1. "
            "It is not CORE and compares only with other smoke scores."
        )
    return "It was not scored on tasks yet."


def origin_sentences(result: dict[str, Any]) -> list[str]:
    """What a run goes on from, if it does; clocks, dollars and curves are of its own steps."""
    if not (begun := result.get("from")):
        return []
    return [
        f"It goes on from step {count(begun['step'])} of run {begun['run']} (weights {begun['sha256'][:12]}): clocks,"
        " dollars and curves are of the steps since."
    ]


def published_sentence(recipe: Recipe) -> str:
    """Which published run this is, or the nearest one and where this one differs from it."""
    run, differences = closest(recipe, derive(recipe))
    name = f"{run.name} ({run.when})"
    if not differences:
        return f"It repeats {name}."
    return f"It repeats no published run; from the nearest, {name}, it differs in {'; '.join(differences)}."


def to_paste(result: dict[str, Any]) -> dict[str, str] | None:
    """A row for the leaderboard and a paragraph; None unless the run is whole, with a CORE of all items."""
    core, origin = result["core"], result["provenance"] or {}
    if result["state"] != "complete" or not core or core["cap"] or result.get("from"):
        return None
    clock, machine = result["clocks"], gpus_of(origin) or result["machine"]["cpu"] or "a machine unknown"
    commit = (origin.get("commit") or "")[:7]
    cells = ("", f"{clock['training_s'] / 3600:.2f}", f"{result['val_bpb']:.5f}", f"{core['metric']:.4f}")
    rule = "passes" if core["metric"] > GPT2_XL_CORE else "does not pass"
    paragraph = (
        f"{result['run_id']} (preset {result['preset']}, {short(result['parameters'])} parameters) was trained on"
        f" {short(result['tokens'])} tokens in {duration(clock['training_s'])} by the leaderboard's clock,"
        f" {duration(clock['node_s'])} on the node, on {machine}. It scores CORE {with_error(core, 4)} over"
        f" {len(core['tasks'])} tasks and all items (error of item sampling), and {number(result['val_bpb'], 5)}"
        f" validation bits per byte. {GPT2_XL_CORE} is published for GPT-2 XL: by the leaderboard's rule for one run it"
        f" {rule}. One run shows no recipe better: CORE varies from run to run (sd {CORE_SD}, published)."
    )
    return {"row": " | ".join(("", *cells, result["preset"], commit, "")).strip(), "paragraph": paragraph}


def gpus_of(provenance: dict[str, Any] | None) -> str:
    """8 x NVIDIA H100; empty where there is none, or nobody knows."""
    gpus = collections.Counter((provenance or {}).get("gpus", []))
    return ", ".join(f"{n} x {name}" for name, n in gpus.items())


def score_of(result: dict[str, Any]) -> dict[str, Any] | None:
    """The run's CORE or its smoke score; None before it was scored."""
    return result["core"] or result["smoke_score"]


def score_name(result: dict[str, Any]) -> str:
    return "CORE" if result["core"] else "smoke score" if result["smoke_score"] else "score"


def evaluation_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(which score, its value, of how many items and computed by what) of every evaluation, the fullest first."""
    names = {"core": "CORE", "smoke_score": "smoke score"}
    return [
        (
            names[e["name"]] + (" with a cap, which is not CORE itself" if e["name"] == "core" and e["cap"] else ""),
            with_error(e, 4),
            ", ".join([_cap(e), *filter(None, (e["dtype"], e["backend"]))]),
        )
        for e in result["evaluations"]
    ]


def with_error(score: dict[str, Any], digits: int) -> str:
    """The metric and its standard error by item sampling."""
    return f"{number(score['metric'], digits)} ± {number(score['se'], digits)}"


def _cap(score: dict[str, Any]) -> str:
    return f"at most {count(score['cap'])} items each" if score["cap"] else "all items"


def summary_lines(result: dict[str, Any], page: Path | str) -> list[str]:
    """The end of a run on the terminal, about eight lines; `page` is where report.html is."""
    score = score_of(result)
    bigram = f"   (bigram model of the same tokens: {number(result['bigram_bpb'])})" if result["bigram_bpb"] else ""
    points = f"{with_error(score, 4)}   ({len(score['tasks'])} tasks, {_cap(score)})" if score else NONE
    steps = f"in {count(result['steps'])} of {count(result['planned_steps'])} steps"
    stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in result["stages_s"].items() if seconds)
    rows = {
        "validation bpb": number(result["val_bpb"]) + bigram,
        score_name(result): points,
        "trained": f"{short(result['tokens'])} tokens {steps}, {short(result['flops'], 'FLOP')}",
        "time": duration(result["clocks"]["node_s"]),
        **({"of which": stages} if stages else {}),
        **({} if result["usd"] is None else {"cost": f"${result['usd']:.2f}   (boot and teardown included)"}),
        "page": str(page),
    }
    if lines := result["unusable_events"]:
        rows["warning"] = passed_over(lines)
    if (result["machine"]["device"] or "").startswith("cuda") and (timed := timed_steps(result)):
        milliseconds, speed = timed
        rate = f"{count(round(milliseconds))} ms, {count(round(speed))} tokens a second"
        rows["step"] = f"{rate} (measured, by the training clock)"
    width = max(map(len, rows))
    return [f"{headline(result)}.", "", *(f"  {name:<{width}}  {value}" for name, value in rows.items())]


def passed_over(lines: int) -> str:
    """Of lines of the event files that cannot be used."""
    if lines == 1:
        return "1 line of the event files was cut short or changed, and is passed over"
    return f"{count(lines)} lines of the event files were cut short or changed, and are passed over"


def timed_steps(result: dict[str, Any]) -> tuple[float, float] | None:
    """Milliseconds of a step and tokens a second by the leaderboard's clock; None before step UNTIMED_STEPS."""
    first = (result.get("from") or {"step": 0})["step"]
    seconds, timed = result["clocks"]["training_s"], result["steps"] - max(UNTIMED_STEPS, first)
    if timed <= 0 or not seconds:
        return None
    return 1000 * seconds / timed, result["tokens"] / result["steps"] * timed / seconds


def training_clock(result: dict[str, Any]) -> str:
    """The leaderboard's clock and the speed that it gives."""
    measured = timed_steps(result)
    if measured is None:
        return f"The training clock leaves out the first {UNTIMED_STEPS} steps; there are no others yet."
    seconds, speed = result["clocks"]["training_s"], measured[1]
    return (
        f"The training clock (step {UNTIMED_STEPS} to the last, counted from 0 and each once, without evaluation "
        f"and checkpoints) says {duration(seconds)}, which is {count(round(speed))} tokens a second."
    )


def slow_ranks(record: Record) -> list[str]:
    """A sentence for each rank slower than the median one, and the others' wait (job/train/step_metrics.py)."""
    windows = list(record.slow_ranks.values())
    if not windows:
        return []
    behind: dict[str, list[float]] = {}
    for event in windows:
        for rank, share in event["behind"].items():
            behind.setdefault(rank, []).append(share)
    said = []
    for rank, shares in sorted(behind.items(), key=lambda item: int(item[0])):
        times = f"in {len(shares)} comparison{'s' * (len(shares) > 1)} of about {windows[0]['steps']} steps"
        said.append(f"Rank {rank} was slower than the median rank {times}, by {percent(max(shares))} at most.")
    lost = sum(event["lost_ms"] * event["steps"] for event in windows)
    share = lost / sum(event["ms"] for event in record.steps.values())
    wait = f"The other ranks waited {duration(lost / 1000)} for the slowest: {percent(share)} of all steps' time."
    return [*said, wait]


def how_it_ended(exit_code: int | None) -> str:
    """The end of an attempt; one that said nothing was killed or is still alive."""
    return "no end seen" if exit_code is None else "done" if exit_code == 0 else f"exit {exit_code}"
