"""The documents for people: a summary, and a part for each step."""

from __future__ import annotations

from typing import Any

from job.machine.stack import lines


def summary(document: dict[str, Any]) -> str:
    """Card, stack, and one row a step, as Markdown."""
    steps = [[s["name"], s["title"], f"{s['seconds']} of {s['limit']}", s["outcome"]] for s in document["steps"]]
    seconds = sum(step["seconds"] for step in document["steps"])
    head = [*lines(document["stack"]), *(f"adapted: {sentence}" for sentence in document["adapted"])]
    if document["dry"]:
        head.insert(
            0, "DRY RUN: tiny sizes on a CPU, with a compiler that generates no code. No figure means anything."
        )
    rows = table(["step", "what", "seconds", "outcome"], steps)
    return "\n".join(
        ["# make gpu", "", *(f"- {line}" for line in head), "", *rows, "", f"{seconds:.0f} seconds in all.", ""]
    )


def page(document: dict[str, Any]) -> str:
    """The summary, then the facts and tables of every step."""
    parts = [summary(document)]
    for step in document["steps"]:
        parts.append(f"## {step['name']}: {step['title']}\n")
        if facts := step.get("facts"):
            parts.append("\n".join(table(["what", "found"], [[name, value] for name, value in facts.items()])) + "\n")
        for columns, rows in step.get("tables", []):
            parts.append("\n".join(table(columns, rows)) + "\n")
        if not step.get("facts") and not step.get("tables"):
            parts.append(f"{step['outcome']}\n")
    return "\n".join(parts)


def table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in (columns, *rows)]
    return [f"| {' | '.join(row)} |" for row in (cells[0], ["---"] * len(columns), *cells[1:])]
