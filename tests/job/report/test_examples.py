"""What each task asks, and the items that stand for right and wrong answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from job.data.tokenizer import Tokenizer
from job.evaluation.items import KIND, items_folder, save_items
from job.evaluation.prompts import Item
from job.evaluation.smoke_bundle import SMOKE_TASKS
from job.report import gpt2
from job.report.examples import CORE_ASKS, SHOWN_TOKENS, asked
from job.report.render import write_report
from job.report.result import build_result
from job.store.attempt import fold
from job.store.sealed import sealing

BYTES = Tokenizer([bytes([value]) for value in range(256)], ["<|bos|>"], r"[\s\S]")


def row(text: str) -> np.ndarray:
    return np.array([BYTES.bos_id, *BYTES.encode(text)], dtype=np.int32)


def item(line: int, context: str, *options: str) -> Item:
    start = len(row(context))
    return Item.of_rows(line, 0, [row(context + option) for option in options], [start] * len(options))


@pytest.fixture
def scored(run):
    """A run whose items are there: of 20 of a task the first are right, and number 10 of word_choice is not."""
    attempt = run.start()
    run.prepare(attempt)
    run.pretrain(attempt)
    run.evaluate(attempt)
    prepared = run.out / "prepared" / "feedc0de"
    shutil.rmtree(prepared / "tokenizer")
    with sealing(prepared / "tokenizer", kind="tokenizer", made_from={"text": "y"}) as folder:
        BYTES.save(folder.path)
    items = {
        "word_choice": [item(n + 1, f"{'.' * 99}number {n}: <b>", "é", "</b>") for n in range(20)],
        "next_word": [item(n + 1, f"line {n} ends in", f" {n}") for n in range(20)],
    }
    for label, of_task in items.items():
        folder = items_folder(prepared, "b0b0b0b0b0b0b0b0", None) / label
        with sealing(folder, kind=KIND, made_from={"task": label}) as unsealed:
            save_items(of_task, unsealed.path)
    return run


def found(run) -> dict[str, list]:
    tasks = asked(run.path, build_result(run.path), fold(run.path).prepared["id"])
    return {task["task"]: task["shown"] for task in tasks}


def test_the_first_right_and_the_first_wrong_item_of_each_task_are_shown(scored) -> None:
    shown = found(scored)
    right, wrong = shown["word_choice"]
    assert (right["right"], wrong["right"]) == (True, False)
    assert right["context"].startswith("…...") and right["context"].endswith("number 0: <b")
    assert len(right["context"]) == SHOWN_TOKENS + 1
    assert right["options"] == [(">é", True, True), ("></b>", False, False)]
    assert wrong["context"].endswith("number 10: <b")
    assert [item["options"] for item in shown["next_word"]] == [[(" 0", True, True)], [(" 3", True, False)]]
    assert shown["next_word"][0]["context"] == "line 0 ends in"
    assert shown["which_subject"] == [], "its items are not there"


def test_what_a_damaged_folder_holds_is_not_shown(scored) -> None:
    folder = items_folder(scored.out / "prepared" / "feedc0de", "b0b0b0b0b0b0b0b0", None) / "word_choice"
    tokens = np.load(folder / "tokens.npy")
    tokens[5] += 1
    np.save(folder / "tokens.npy", tokens)
    assert found(scored)["word_choice"] == []


def test_the_page_escapes_items(scored) -> None:
    write_report(scored.path)
    text = Path(scored.path / "report" / "report.html").read_text()
    assert "number 0: &lt;b</p>" in text and "&gt;&lt;/b&gt;" in text and "number 0: <b" not in text
    assert ", with the first item that was right" in text


def test_every_task_of_core_and_of_the_smoke_bundle_has_a_question(make_run) -> None:
    assert CORE_ASKS.keys() == gpt2.ACCURACY.keys()
    smoke = tuple((task.label, task.kind, task.shots, 0.0, 1, 4) for task in SMOKE_TASKS)
    run = make_run(tasks=smoke).whole()
    asks = {task["task"]: task["asks"] for task in asked(run.path, build_result(run.path), None)}
    assert len(set(asks.values())) == len(SMOKE_TASKS)
    assert asks["word_order_4"] == (
        "16 words of a text: which of 4 continuations of 8 words is the true one? A wrong one is the true one with its"
        " words in another order."
    )
    assert asks["phrase_two_words"] == "20 words of a text: the next 2 words, in a frequent phrase."
