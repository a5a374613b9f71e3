"""The templates, filled: `report.md.j2` and `report.html.j2`. What people and models wrote is escaped for either."""

from __future__ import annotations

import functools
import re
import statistics
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from job.report import figures, gpt2, words
from job.store.attempt import Record


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
        "step_figures": figures.step_figures(record, context["mfu_of_one"]),
        "samples": list(record.samples.items()),
        "tiles": tiles(result),
        "known_stages": list(figures.STAGE_COLORS),
    }
    return fill("report.html.j2", context | _of_tasks(context) | more)


def foreign_html(context: dict[str, Any]) -> str:
    """The page of a model that no run of ours made."""
    return fill("foreign.html.j2", context | _of_tasks(context) | {"asked": []})


def _of_tasks(context: dict[str, Any]) -> dict[str, Any]:
    """What tasks.html.j2 shows of a score."""
    core = context["result"]["core"]
    drawn = {"core_figure": figures.core_figure(core), "beside": gpt2_rows(core), "sizes": gpt2.SIZES}
    return drawn | {"groups": groups(context["tasks"])}


def markdown(context: dict[str, Any], record: Record) -> str:
    more = {"kinds": words.KINDS, "samples": list(record.samples.items())}
    return fill("report.md.j2", context | more)


def fill(template: str, context: dict[str, Any]) -> str:
    """A template of this folder, filled."""
    return _environment().get_template(template).render(context)


def tiles(result: dict[str, Any]) -> list[dict[str, str]]:
    """The key figures at the top of the page."""
    score, bigram, dtype = words.score_of(result), result["bigram_bpb"], result["machine"]["dtype"]
    name = words.score_name(result)
    attempts = f"{result['attempts']} attempt{'s' if result['attempts'] != 1 else ''}"
    steps = f"{words.count(result['steps'])} of {words.count(result['planned_steps'])} steps"
    against = f"bigram model {words.number(bigram)}" if bigram else "no bigram model to compare with yet"
    error = f"± {words.number(score['se'])} by sampling of items" if score else "not scored yet"
    rows = [
        ("Validation bpb", words.number(result["val_bpb"]), against),
        (name[0].upper() + name[1:], words.number(score["metric"] if score else None), error),
        ("Parameters", words.short(result["parameters"]), f"{dtype} activations" if dtype else ""),
        ("Trained on", words.short(result["tokens"]), f"tokens, {steps}"),
        ("Compute", words.short(result["flops"], "FLOP"), "by the architecture's formula"),
        ("Time", words.duration(result["clocks"]["node_s"]), attempts),
    ]
    filled = [{"name": name, "value": value, "more": more, "tone": ""} for name, value, more in rows]
    filled[0]["tone"] = {True: "good", False: "bad", None: ""}[result["learned"]]
    return filled


def gpt2_rows(core: dict[str, Any] | None) -> list[tuple[str, float, tuple[float, ...]]]:
    """(task, this model's centered accuracy, those of GPT-2's sizes), and last the COREs; empty for other tasks."""
    if core is None or (sizes := gpt2.centered(core["baselines"])) is None:
        return []
    own = {task["task"]: task["centered"] for task in core["tasks"]} | {"CORE": core["metric"]}
    return [(name, own[name], values) for name, values in sizes.items()]


def groups(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tasks by kind, in their first order, and the mean of each kind's centered accuracies."""
    found = []
    for kind in dict.fromkeys(task["kind"] for task in tasks):
        rows = [task for task in tasks if task["kind"] == kind]
        centered = statistics.fmean(row["centered"] for row in rows)
        found.append({"kind": words.KINDS[kind], "rows": rows, "centered": centered})
    return found


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (words.number, words.count, words.short, words.duration, words.percent, words.probability)
    environment.filters |= {f.__name__: f for f in (*filters, code, block, breakable)}
    environment.filters["css"] = lambda share: f"{100 * share:.2f}%"
    return environment


def breakable(name: str) -> Markup:
    """`name`, escaped, with leave to break the line after an underscore or a dot."""
    return Markup(re.sub(r"([_.])", r"\1<wbr>", str(escape(name))))


def code(value: Any) -> str:
    """`value` as a Markdown code span for a table cell: one line, a fence longer than any backticks in it."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    fence = _fence(text, 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}" if text else ""


def block(text: str) -> str:
    """`text` as a Markdown code block: with a fence longer than its backticks, and pictures of control characters."""
    shown = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)
    fence = _fence(shown, 3)
    return f"{fence}\n{shown}\n{fence}"


def _fence(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))
