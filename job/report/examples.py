"""What each task of a score asks, and of its items one that was answered right and one that was not.

The items are read from the sealed folders of tokens that were scored, the answers from those of the evaluation. A
machine that has no such folders (a laptop, with the results alone) shows the questions only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from job.data.tokenizer import Tokenizer
from job.errors import DataError
from job.evaluation.bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, SCHEMA
from job.evaluation.items import KIND, TaskItems, items_folder
from job.evaluation.ledger import ANSWERS, Answer, read_answers, sealed_ledgers
from job.evaluation.prompts import Item
from job.evaluation.smoke_bundle import LETTERS, ORDER, OTHER, SMOKE_TASKS, SmokeTask
from job.report.words import score_of
from job.store.sealed import open_sealed

CORE_ASKS = {
    "hellaswag_zeroshot": "Which of four endings goes on with the description of an everyday activity?",
    "jeopardy": "The answer to a quiz clue, word for word.",
    "bigbench_qa_wikidata": "The end of a sentence that states a fact, word for word.",
    "arc_easy": "A science question of grade school, the easy part: which answer is right?",
    "arc_challenge": "A science question of grade school that simple methods get wrong: which answer is right?",
    "copa": "Which of two sentences is the cause, or the effect, of another?",
    "commonsense_qa": "A question of common sense: which answer is right?",
    "piqa": "Which of two ways reaches an everyday, physical goal?",
    "openbook_qa": "An elementary science question that takes a fact and common knowledge: which answer is right?",
    "lambada_openai": "The last word of a passage, which only the whole of it gives away.",
    "hellaswag": "Which of four endings goes on with the description of an everyday activity?",
    "winograd": "Which of two nouns does a pronoun mean? The sentence with it must end as it does.",
    "winogrande": "Which of two nouns fills a gap? The sentence with it must end as it does.",
    "bigbench_dyck_languages": "The brackets that close a row of open ones, in order.",
    "agi_eval_lsat_ar": "A logic game of the law school admission test: which answer is right?",
    "bigbench_cs_algorithms": "What a simple algorithm gives: are brackets balanced, how long is a common subsequence?",
    "bigbench_operators": "The value of an expression with operators that the question defines.",
    "bigbench_repeat_copy_logic": "Words repeated and copied as an instruction says.",
    "squad": "The answer to a question about a paragraph, copied from it.",
    "coqa": "The next answer in a conversation about a passage.",
    "boolq": "A question about a passage: yes or no?",
    "bigbench_language_identification": "Which language is a sentence in?",
}
WRONG = {
    OTHER: "from another document",
    ORDER: "the true one with its words in another order",
    LETTERS: "the true one with the letters of its words in another order",
}
"""what a wrong option of the smoke bundle's tasks is, by their source"""
SHOWN_TOKENS = 60
"""of a context the last, of an option the first"""


def asked(run: Path, result: dict[str, Any], prepared: str | None) -> list[dict[str, Any]]:
    """{"task", "asks", "shown"} of each task of the score: "shown" are two items at most, as `_shown` has them."""
    if not (score := score_of(result)):
        return []
    smoke = {task.label: _smoke_asks(task) for task in SMOKE_TASKS}
    asks = CORE_ASKS if result["core"] else smoke
    found = _Found(run, result, prepared)
    labels = [(task["task"], task["kind"]) for task in score["tasks"]]
    return [{"task": name, "asks": asks.get(name, ""), "shown": found.of_task(name, kind)} for name, kind in labels]


def _smoke_asks(task: SmokeTask) -> str:
    """In words what `task` is made of."""
    text, more = f"{task.context} words of a text", f"{task.continuation} words"
    if task.kind == MULTIPLE_CHOICE:
        choice = f"which of {task.options} continuations of {more} is the true one"
        return f"{text}: {choice}? A wrong one is {WRONG[task.source]}."
    if task.kind == SCHEMA:
        choice = f"which of two texts of {task.context} words is before them"
        return f"{more} of a text: {choice}? The wrong one is {WRONG[task.source]}."
    what = "the next word" if task.continuation == 1 else f"the next {more}"
    return f"{text}: {what}, in a {task.source}."


class _Found:
    """The sealed answers of the run's fullest evaluation and the sealed items that they answer."""

    def __init__(self, run: Path, result: dict[str, Any], prepared: str | None) -> None:
        fullest = result["evaluations"][0]
        self._answers = next(folder for folder in sealed_ledgers(run / "eval") if folder.name == fullest["id"])
        self._prepared = run.parent.parent / "prepared" / (prepared or "")
        self._items = items_folder(self._prepared, fullest["bundle"], fullest["cap"])
        self._tokenizer: Tokenizer | None = None

    def of_task(self, label: str, kind: str) -> list[dict[str, Any]]:
        """Of the first item that was right and the first that was not, as far as there are both, what was asked."""
        try:
            items = TaskItems(open_sealed(self._items / label, kind=KIND).path)
            answers = read_answers(open_sealed(self._answers / label, kind=ANSWERS).path / "answers.csv")
            self._tokenizer = self._tokenizer or Tokenizer.load(
                open_sealed(self._prepared / "tokenizer", kind="tokenizer").path
            )
        except DataError:  # not there, or damaged: the score rests on the ledger, not on these
            return []
        firsts = [
            next((at for at, answer in enumerate(answers) if answer.right is right), None) for right in (True, False)
        ]
        return [_shown(self._tokenizer, items[at], answers[at], kind) for at in firsts if at is not None]


def _shown(tokenizer: Tokenizer, item: Item, answer: Answer, kind: str) -> dict[str, Any]:
    """{"right", "context", "options": [(text, whether it is the true one, whether the model chose it)]}."""
    if kind == LANGUAGE_MODELING:
        (row,), (start,) = item.rows, item.starts
        return {
            "right": answer.right,
            "context": _end(tokenizer, row[:start]),
            "options": [(_beginning(tokenizer, row[start:]), True, answer.right)],
        }
    options = [
        (_beginning(tokenizer, suffix), number == item.gold, number == answer.chosen)
        for number, suffix in enumerate(item.suffixes)
    ]
    return {"right": answer.right, "context": _end(tokenizer, item.prefix), "options": options}


def _end(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    ids = tokens[tokens != tokenizer.bos_id].tolist()
    return "…" * (len(ids) > SHOWN_TOKENS) + tokenizer.decode(ids[-SHOWN_TOKENS:])


def _beginning(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    ids = tokens[tokens != tokenizer.bos_id].tolist()
    return tokenizer.decode(ids[:SHOWN_TOKENS]) + "…" * (len(ids) > SHOWN_TOKENS)
