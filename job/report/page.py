"""The templates, filled: `report.md.j2` and `report.html.j2`. What people and models wrote is escaped for either."""

from __future__ import annotations

import dataclasses
import re
import statistics
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from job.report import figures, render, words
from job.store.attempt import Record

FILTERS = {
    "number": words.number,
    "count": words.count,
    "short": words.short,
    "duration": words.duration,
    "percent": words.percent,
}


@dataclasses.dataclass(frozen=True)
class Tile:
    """A key figure at the top of the page."""

    name: str
    value: str
    more: str
    tone: str = ""


@dataclasses.dataclass(frozen=True)
class Group:
    """The tasks of one kind and the mean of their centered accuracies."""

    kind: str
    rows: list[render.TaskRow]

    @property
    def centered(self) -> float:
        return statistics.fmean(row.centered for row in self.rows)


def html(context: dict[str, Any], record: Record) -> str:
    """The self-contained page: no script, no request, light and dark."""
    result = context["result"]
    drawings = [
        figures.bpb_figure(record, result["val_bpb"], result["bigram_bpb"]),
        figures.loss_figure(record, record.prepared.get("vocab_size")),
    ]
    more = {
        "drawings": [drawing for drawing in drawings if drawing],
        "attempts": figures.attempts_figure(record),
        "samples": list(record.samples.items()),
        "tiles": tiles(result),
        "groups": groups(context["tasks"]),
        "known_stages": list(figures.STAGE_COLORS),
    }
    return _environment().get_template("report.html.j2").render(context | more)


def markdown(context: dict[str, Any]) -> str:
    return _environment().get_template("report.md.j2").render(context | {"kinds": render.KINDS})


def tiles(result: dict[str, Any]) -> list[Tile]:
    score, tone = result["core"] or result["smoke_score"], {True: "good", False: "bad", None: ""}[result["learned"]]
    bigram = (
        f"bigram model {words.number(result['bigram_bpb'])}"
        if result["bigram_bpb"]
        else "no bigram model to compare with yet"
    )
    name = words.score_name(result)
    more = f"± {words.number(score['se'])} by sampling of items" if score else "not scored yet"
    steps = f"{words.count(result['steps'])} of {words.count(result['planned_steps'])} steps"
    dtype = result["machine"]["dtype"]
    attempts = f"{result['attempts']} attempt{'s' if result['attempts'] != 1 else ''}"
    return [
        Tile("Validation bpb", words.number(result["val_bpb"]), bigram, tone),
        Tile(name[0].upper() + name[1:], words.number(score["metric"] if score else None), more),
        Tile("Parameters", words.short(result["parameters"]), f"{dtype} activations" if dtype else ""),
        Tile("Trained on", words.short(result["tokens"]), f"tokens, {steps}"),
        Tile("Compute", words.short(result["flops"], "FLOP"), "by the architecture's formula"),
        Tile("Time", words.duration(result["clocks"]["node_s"]), attempts),
    ]


def groups(rows: list[render.TaskRow]) -> list[Group]:
    """`rows` by kind, kinds and rows in their first order."""
    kinds = dict.fromkeys(row.kind for row in rows)
    return [Group(render.KINDS[kind], [row for row in rows if row.kind == kind]) for kind in kinds]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= FILTERS | {"code": code, "breakable": breakable, "css": lambda share: f"{100 * share:.2f}%"}
    return environment


def breakable(name: str) -> Markup:
    """`name`, escaped, with leave to break the line after an underscore or a dot."""
    return Markup(re.sub(r"([_.])", r"\1<wbr>", str(escape(name))))


def code(value: Any) -> str:
    """`value` as a Markdown code span that is safe in a table cell: one line, a fence longer than any run of backticks in it."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}" if text else ""
