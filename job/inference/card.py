"""The model card: what the model is, how it did, what it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from job.inference.sources import Source
from job.report import words
from job.report.result import build_result
from job.store.documents import recipe_of


def write_card(folder: Path, source: Source, parameters: int, license: str, checked: Mapping[str, Any]) -> None:
    """README.md of an export. checked: tokens, logits (the largest difference) and greedy tokens of the comparison."""
    name, verdict, facts = source.where.name, [f"Read from {source.where.name}."], dict(source.made_from)
    if source.run is not None:
        name = source.run.name
        verdict, facts = _of_run(source.run)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    text = page.get_template("card.md.j2").render(
        name=name,
        license=license,
        depth=source.config.depth,
        width=source.config.width,
        context=f"{source.config.seq_len:,}",
        parameters=words.short(parameters),
        bos=source.tokenizer.specials[0],
        verdict=verdict,
        facts=facts.items(),
        checked=checked,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _of_run(run: Path) -> tuple[list[str], dict[str, Any]]:
    """What a run's report says: sentences, and rows of a table."""
    result, document = build_result(run), recipe_of(run)
    data, train = document["recipe"]["data"], document["recipe"]["train"]
    trained_on = data["source"] if data["source"] != "local" else "text of whoever trained it"
    facts = {
        "trained on": f"{trained_on}, {words.short(result['tokens'], 'tokens')}",
        "recipe": f"{document['preset']} ({document['evidence']})",
        "steps": f"{words.count(result['steps'])} of {words.count(result['planned_steps'])}",
        "precision": "fp8 products" if train["fp8"] else train["dtype"],
        "training": words.training_clock(result),
        "validation": f"{words.number(result['val_bpb'])} bits per byte",
        **{f"hash of {key}": value for key, value in result["hashes"].items() if isinstance(value, str)},
    }
    return [f"{words.headline(result)}.", words.bpb_sentence(result), words.score_sentence(result)], facts
