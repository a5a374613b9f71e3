"""The plots as inline SVG: drawn by Matplotlib, coloured by the page.

Matplotlib draws in placeholder colours, each of which becomes a CSS variable afterwards (`var(--accent)` ...), and its
fonts are removed, so a drawing follows the page's type and its light or dark colours. Metadata, namespaces and unused
ids are removed too; the other ids carry the figure's name, so that several figures can stand in one document. Equal
data give equal bytes: a fixed salt for ids, no date, no display.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from job.report import gpt2
from job.report.result import finite
from job.report.words import how_it_ended, number
from job.store.attempt import Record

INK, MUTED, RULE, ACCENT, REFERENCE = "#010101", "#020202", "#030303", "#040404", "#050505"
STAGE_COLORS = {"prepare": "#060606", "pretrain": "#070707", "evaluate": "#080808", "report": "#090909"}
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", ACCENT: "accent", REFERENCE: "reference"} | {
    color: f"stage-{stage}" for stage, color in STAGE_COLORS.items()
}

MOST_POINTS = 600
"""points of a drawn curve; a longer one is drawn as means of equal buckets"""

SMOOTH_FROM = 40
"""steps from which the loss gets a moving mean"""

SMOOTH_SHARE = 20
"""the moving mean reaches over one part in so many of the run to either side"""

SIZE = (5.0, 3.0)
"""inches; the page scales the drawing to its column"""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """An inline <svg> (its aria-label describes it), its heading, and how to read it."""

    svg: str
    heading: str
    caption: str


def bpb_figure(record: Record, bpb: float | None, bigram_bpb: float | None) -> Drawing | None:
    """Validation bits per byte over optimizer steps, and the bigram model as a line.

    `bpb` is the newest measurement, drawn at the last step unless training measured there. None without a finite point.
    """
    if not record.train:
        return None
    points = {_step(record, e): e["bpb"] for e in record.validations.values() if finite(e["bpb"]) is not None}
    if bpb is not None and record.steps:
        points.setdefault(max(_step(record, e) for e in record.steps.values()), bpb)
    if not points:
        return None
    figure, axes = _axes()
    steps, values = list(points), list(points.values())
    learned = bigram_bpb is not None and values[-1] < bigram_bpb
    axes.plot(steps, values, color=ACCENT, linewidth=2, marker="o", markersize=5, clip_on=False, zorder=3)
    _limits(axes, record, [*values, *([bigram_bpb] if bigram_bpb else [])])
    label = f"Validation bits per byte, {number(values[0])} at step {steps[0]:.0f}"
    label += f", {number(values[-1])} at step {steps[-1]:.0f}" if len(points) > 1 else ""
    caption = "Bits per byte of held-out text; lower is better."
    if bigram_bpb:
        axes.axhline(bigram_bpb, color=REFERENCE, linewidth=1.5, linestyle=(0, (5, 3)))
        _note(axes, 1.0, bigram_bpb, f"bigram model {number(bigram_bpb)}", REFERENCE, above=learned)
        label += f"; the bigram model is at {number(bigram_bpb)}"
        caption += " The dashed line is a bigram model fitted to the very tokens that the model was trained on."
    _note(axes, steps[-1], values[-1], number(values[-1]), ACCENT, above=not learned, data=True)
    return Drawing(_svg(figure, "bpb", label), "Validation bits per byte", caption)


def loss_figure(record: Record, vocab_size: int | None) -> Drawing | None:
    """Training loss of each step and its running mean; None without a finite loss."""
    points = {_step(record, e): e["loss"] for e in record.steps.values() if finite(e["loss"]) is not None}
    if not points:
        return None
    steps, losses = list(points), list(points.values())
    size = -(-len(losses) // MOST_POINTS)
    shown, drawn_steps = bucket_means(losses, size), bucket_means(steps, size)
    figure, axes = _axes()
    caption = "Nats per token on each step's own batch"
    if len(losses) >= SMOOTH_FROM:
        trend = bucket_means(moving_mean(losses, len(losses) // SMOOTH_SHARE), size)
        axes.plot(drawn_steps, shown, color=ACCENT, linewidth=1, alpha=0.4)
        axes.plot(drawn_steps, trend, color=ACCENT, linewidth=2)
        caption += f" (thin{f', means of {size} steps' if size > 1 else ''}; the thick line is their moving mean)."
    else:
        axes.plot(drawn_steps, shown, color=ACCENT, linewidth=2, marker="o", markersize=5, clip_on=False)
        caption += "."
    first, last = number(losses[0], 2), number(losses[-1], 2)
    label = f"Training loss in nats per token, {first} at first, {last} at step {steps[-1]:.0f}"
    if vocab_size:
        guessing = math.log(vocab_size)
        _limits(axes, record, [*shown, guessing])
        axes.axhline(guessing, color=MUTED, linewidth=1.2, linestyle=(0, (1, 2)))
        _note(axes, 1.0, guessing, f"guessing {number(guessing, 2)}", MUTED, above=max(shown) <= guessing * 1.02)
        caption += f" The dotted line is the loss of guessing among {vocab_size:,} tokens."
    else:
        _limits(axes, record, shown)
    return Drawing(_svg(figure, "loss", label), "Training loss", caption)


def step_figures(record: Record, mfu_of_one: float | None) -> list[Drawing]:
    """Learning rate, speed, gradients and the ranks' own times over the steps, as far as events have them.

    mfu_of_one: the share of the GPUs' peak that one token a second makes, where the peak is known.
    """
    speed = "Tokens a second" + (
        ", and on the right the share of the GPUs' bf16 peak (MFU), by the leaderboard's count" if mfu_of_one else ""
    )
    draw = functools.partial(_step_figure, record)
    drawings = [
        draw("rate", "Learning rate", "Every learning rate's factor: 1 at its height.", lambda e: e.get("lr_mult")),
        draw(
            "speed",
            "Speed",
            f"{speed}. A step that waited or compiled is a dip.",
            lambda e: 1000 * e["tokens"] / e["ms"] if e["ms"] else None,
            right=mfu_of_one,
        ),
        draw(
            "norm", "Gradient norm", "Of all gradients together, averaged over the ranks.", lambda e: e.get("grad_norm")
        ),
        _ranks_figure(record),
    ]
    return [drawing for drawing in drawings if drawing]


def _step_figure(
    record: Record,
    name: str,
    heading: str,
    caption: str,
    value: Callable[[dict[str, Any]], float | None],
    right: float | None = None,
) -> Drawing | None:
    """One number of each step as means of buckets; `right` times it, in per cent, is a second axis."""
    points = {_step(record, e): found for e in record.steps.values() if (found := finite(value(e))) is not None}
    if len(points) < 2:
        return None
    size = -(-len(points) // MOST_POINTS)
    steps, values = (bucket_means(list(numbers), size) for numbers in (points, points.values()))
    figure, axes = _axes()
    axes.plot(steps, values, color=ACCENT, linewidth=1.5)
    _limits(axes, record, [0.0, *values])
    axes.set_ylim(bottom=0)
    if max(values) >= 1000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if right:
        functions: Any = (lambda y: 100 * right * y, lambda y: y / right / 100)
        share = axes.secondary_yaxis("right", functions=functions)
        share.tick_params(colors=MUTED, length=0)
        share.spines["right"].set_visible(False)
        share.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    digits = 0 if max(values) >= 1000 else 3
    first, last = (f"{number(values[at], digits)} at step {steps[at]:,.0f}" for at in (0, -1))
    return Drawing(_svg(figure, name, f"{heading}: {first}, {last}"), heading, caption)


def _ranks_figure(record: Record) -> Drawing | None:
    """Each rank's own computing time of a step, the slowest rank's line in a colour of its own; None for one rank."""
    windows = [event for event in record.rank_times.values() if len(event["ms"]) > 1]
    world = len(windows[-1]["ms"]) if windows else 0
    windows = [event for event in windows if len(event["ms"]) == world]
    if not windows:
        return None
    steps = [_step(record, event) for event in windows]
    lines = list(zip(*(event["ms"] for event in windows), strict=True))
    slowest = max(range(world), key=lambda rank: sum(lines[rank]))
    size = -(-len(steps) // (MOST_POINTS // 4))
    figure, axes = _axes()
    for rank, line in enumerate(lines):
        color, width, above = (REFERENCE, 2.0, 3) if rank == slowest else (MUTED, 0.8, 2)
        style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(steps) < SMOOTH_FROM else {}
        style |= {"color": color, "linewidth": width, "zorder": above}
        axes.plot(bucket_means(steps, size), bucket_means(line, size), **style)
    _limits(axes, record, [ms for line in lines for ms in line])
    caption = f"Milliseconds that each of {world} ranks computed in a step, before it waits for the others; means of"
    caption += f" about {windows[-1]['steps']} steps. In colour: rank {slowest}, the slowest."
    label = f"Step time by rank: the slowest is rank {slowest} with {number(lines[slowest][-1], 1)} ms in the end"
    return Drawing(_svg(figure, "ranks", label), "Step time by rank", caption)


def pair_figures(records: tuple[Record, Record], names: Sequence[str]) -> list[Drawing]:
    """Validation bits per byte and training loss of two runs over the tokens that each had trained on."""
    drawings = []
    for key, heading, unit in (("validations", "Validation bits per byte", "bpb"), ("steps", "Training loss", "loss")):
        curves = []
        for record in records:
            width, events = record.prepared.get("seq_len", 1), getattr(record, key).values()
            curves.append([(e["rows"] * width / 1e6, e[unit]) for e in events if finite(e[unit]) is not None])
        if not all(curves):
            continue
        figure, axes = _axes()
        for curve, color, letter in zip(curves, (ACCENT, REFERENCE), "AB", strict=True):
            tokens, values = zip(*curve, strict=True)
            trend = moving_mean(values, len(values) // SMOOTH_SHARE) if unit == "loss" else values
            size = -(-len(trend) // MOST_POINTS)
            style = "-" if letter == "A" else (0, (4, 3))
            axes.plot(bucket_means(tokens, size), bucket_means(trend, size), color=color, linewidth=2, linestyle=style)
            at = len(trend) // (2 if letter == "A" else 4)
            _note(axes, tokens[at], trend[at], letter, color, above=letter == "A", data=True)
        axes.set_xlabel("million tokens", color=MUTED)
        label = f"{heading} of A, {names[0]}, and B, {names[1]} (dashed)"
        caption = "Bits per byte of held-out text" if unit == "bpb" else "Nats per token on each step's own batch"
        drawings.append(Drawing(_svg(figure, unit, label), heading, f"{caption}; B is dashed; lower is better."))
    return drawings


def core_figure(core: dict[str, Any] | None) -> Drawing | None:
    """Centred accuracy by task with its 95 % error by item sampling, beside GPT-2's sizes; None for other tasks."""
    if core is None or (rows := gpt2.centered(core["baselines"])) is None:
        return None
    bars = [(task["centered"], task["se"]) for task in core["tasks"]] + [(core["metric"], core["se"])]
    figure, axes = _axes(size=(SIZE[0], 0.8 + 0.24 * len(rows)))
    places = range(len(rows))
    *smaller, xl = zip(*rows.values(), strict=True)
    for mean in rows["CORE"]:
        axes.axvline(mean, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    for size, values in enumerate(smaller):
        axes.scatter(values, places, marker="|", color=MUTED, s=25 + 35 * size, zorder=2)
    axes.scatter(xl, places, marker="D", color=REFERENCE, s=26, zorder=2)
    centers, errors = zip(*bars, strict=True)
    reach = [1.96 * se for se in errors]
    axes.errorbar(centers, places, xerr=reach, fmt="o", color=ACCENT, markersize=5, zorder=3)
    axes.set_yticks(places, list(rows))
    axes.axhline(len(rows) - 1.5, color=RULE, linewidth=1)
    axes.invert_yaxis()
    axes.xaxis.grid(True, color=RULE, linewidth=0.8)
    axes.set_xlabel("centered accuracy", color=MUTED)
    caption = "Dots: this model, with the 95 % error of item sampling. As published for GPT-2: diamonds 1.6B (XL),"
    caption += " ticks 124M (shortest), 355M and 774M (longest); all but 124M of at most 1,000 items a task."
    caption += " Dotted lines: their four COREs, the smallest model's on the left."
    return Drawing(_svg(figure, "core", "CORE by task beside GPT-2's four sizes"), "Beside GPT-2", caption)


def attempts_figure(record: Record) -> Drawing | None:
    """Attempts on the time axis, a row each, coloured by stage; None for a single attempt."""
    if len(record.attempts) < 2:
        return None
    zero = record.attempts[0].start
    total = max(life.end for life in record.attempts) - zero
    units = (("hours", 3600.0), ("minutes", 60.0))
    unit, seconds = next(((u, s) for u, s in units if total >= 2 * s), ("seconds", 1.0))
    ends = {life.number: life.end for life in record.attempts}
    rows = {life.number: row for row, life in enumerate(record.attempts)}
    figure, axes = _axes(size=(SIZE[0], 0.75 + 0.32 * len(rows)))
    for life in record.attempts:
        start, end, row = (life.start - zero) / seconds, (life.end - zero) / seconds, rows[life.number]
        axes.barh(row, end - start, left=start, height=0.1, color=MUTED)
        note = how_it_ended(life.exit_code)
        axes.annotate(note, (end, row), (6, 0), textcoords="offset points", va="center", color=MUTED, fontsize=10)
    for span in record.stages:
        end = span.end if span.end is not None else ends[span.attempt]
        left, width = (span.start - zero) / seconds, (end - span.start) / seconds
        color = STAGE_COLORS.get(span.stage, MUTED)
        axes.barh(rows[span.attempt], width, left=left, height=0.55, color=color, zorder=3)
    axes.set_yticks(list(rows.values()), [f"attempt {name}" for name in rows])
    axes.set_xlim(0, total / seconds * 1.2 or 1)
    axes.invert_yaxis()
    axes.yaxis.grid(False)
    axes.xaxis.grid(True, color=RULE)
    axes.set_xlabel(f"{unit} since the first start", color=MUTED)
    label = "; ".join(f"attempt {life.number}: {how_it_ended(life.exit_code)}" for life in record.attempts)
    caption = "Each start of the run, coloured by stage."
    caption += " Work that was done again counts in the time, and once in the curves."
    return Drawing(_svg(figure, "attempts", label), "Attempts", caption)


def moving_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value, the `reach` before it (fewer at the start) and as many after it (fewer at the end)."""
    sums = [0.0, *itertools.accumulate(values)]
    spans = [(max(0, i - reach), min(len(values), i + min(reach, i) + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]


def bucket_means(values: Sequence[float], size: int) -> list[float]:
    """Means of `values` in buckets of `size`; the last bucket may be smaller."""
    return [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]


def _step(record: Record, event: dict) -> float:
    return event["rows"] / record.train["batch_rows"]


def _axes(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    with mpl.rc_context({"font.size": 11, "path.simplify": True}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel("optimizer steps", color=MUTED)
        axes.tick_params(colors=MUTED, length=0)
        axes.yaxis.grid(True, color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    return figure, axes


def _limits(axes: Axes, record: Record, values: Sequence[float]) -> None:
    """All planned steps on the x axis; y around `values` with a margin."""
    low, high = min(values), max(values)
    air = 0.13 * (high - low) or 0.1 * abs(high)
    axes.set_xlim(0, record.train["steps"])
    axes.set_ylim(low - air, high + air)


def _note(axes: Axes, x: float, y: float, text: str, color: str, *, above: bool, data: bool = False) -> None:
    """`text` at a point (`data`), or at the right end of a horizontal line (x in axes fractions)."""
    offset, align = (0, 6 if above else -6), "bottom" if above else "top"
    style: dict[str, Any] = {"ha": "right", "va": align, "color": color, "fontsize": 11}
    style["fontweight"] = "bold" if data else "normal"
    across = axes.transData if data else axes.get_yaxis_transform()
    axes.annotate(text, (x, y), offset, xycoords=across, textcoords="offset points", **style)


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an inline <svg> element without width and height: the page scales it."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=no_metadata)
    root = ET.fromstring(buffer.getvalue())
    _strip_namespaces(root)
    _strip_ids(root, name)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    text = ET.tostring(root, encoding="unicode")
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"font-family: [^;\"]*;? ?", "", text))
    return re.sub("|".join(VARIABLES), lambda match: f"var(--{VARIABLES[match[0]]})", text)


def _strip_namespaces(root: ET.Element) -> None:
    """Plain tag and attribute names (`href` for xlink's), without metadata and Matplotlib's document-wide style."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in ("metadata", "style")]:
            parent.remove(child)


def _strip_ids(root: ET.Element, name: str) -> None:
    """Keep the ids that something refers to, unique in the page by the figure's name."""
    text = ET.tostring(root, encoding="unicode")
    referenced = set(re.findall(r"(?:\"#|url\(#)([^\")]+)", text))
    for element in root.iter():
        own = element.attrib.pop("id", None)
        for key, value in element.attrib.items():
            element.set(key, re.sub(r"^#|(?<=url\()#", f"#{name}-", value) if key in ("href", "clip-path") else value)
        if own in referenced:
            element.set("id", f"{name}-{own}")
