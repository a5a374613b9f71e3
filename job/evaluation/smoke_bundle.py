"""A bundle in CORE's format, made from held-out text: what a model that has trained for a minute can be asked.

CORE asks for knowledge that no minute of training gives; a model of that age scores what a guesser scores, and a
broken evaluator would look just the same. These 22 tasks ask for what it has seen instead: how text goes on. All are
made from passages, places in a document with words before and words after, joined by a single space there:

- multiple_choice: which of several continuations is the true one? The wrong ones come from another document, or are
  the true one with its words in another order, or with the letters of its words in another order;
- schema: which of two contexts does the continuation belong to? The wrong one is changed in the same three ways;
- language_modeling: the next words, where the passage runs into one of the text's most frequent phrases, or repeats
  itself.

The score over them is the smoke score: a sign of life and of progress on one text, comparable only between models on
the same bundle. It is never CORE. Equal documents and seed give equal bytes.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from job.errors import DataError
from job.evaluation.bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, SCHEMA

ITEMS = 28
LEAST_CONTEXT = 4
LONGEST_WORD = 40
MAX_CHARACTERS = 1_000_000
TRIES = 40 * ITEMS
META_COLUMNS = ("Eval Task", "Task Category", "Task Type", "#shots", "#datapoints", "Random baseline", "Description")

OTHER, ORDER, LETTERS = "other document", "word order", "letters"
PHRASE, REPEAT = "frequent phrase", "repeat"


@dataclasses.dataclass(frozen=True)
class SmokeTask:
    """One task: lengths in words, and the `source` of the wrong options (for language_modeling, of the passages)."""

    label: str
    kind: str
    source: str
    context: int
    continuation: int
    options: int = 2
    shots: int = 0


SMOKE_TASKS = (
    SmokeTask("continue_2", MULTIPLE_CHOICE, OTHER, context=24, continuation=8),
    SmokeTask("continue_4", MULTIPLE_CHOICE, OTHER, context=24, continuation=8, options=4),
    SmokeTask("continue_long_context", MULTIPLE_CHOICE, OTHER, context=80, continuation=8, options=4),
    SmokeTask("continue_long", MULTIPLE_CHOICE, OTHER, context=24, continuation=24),
    SmokeTask("continue_shots", MULTIPLE_CHOICE, OTHER, context=12, continuation=6, shots=2),
    SmokeTask("word_order_2", MULTIPLE_CHOICE, ORDER, context=16, continuation=8),
    SmokeTask("word_order_4", MULTIPLE_CHOICE, ORDER, context=16, continuation=8, options=4),
    SmokeTask("word_order_shots", MULTIPLE_CHOICE, ORDER, context=12, continuation=6, shots=2),
    SmokeTask("letters_2", MULTIPLE_CHOICE, LETTERS, context=16, continuation=4),
    SmokeTask("letters_4", MULTIPLE_CHOICE, LETTERS, context=16, continuation=4, options=4),
    SmokeTask("letters_shots", MULTIPLE_CHOICE, LETTERS, context=8, continuation=4, shots=3),
    SmokeTask("context_short", SCHEMA, OTHER, context=6, continuation=8),
    SmokeTask("context_long", SCHEMA, OTHER, context=40, continuation=12),
    SmokeTask("context_shots", SCHEMA, OTHER, context=8, continuation=8, shots=2),
    SmokeTask("context_order", SCHEMA, ORDER, context=8, continuation=8),
    SmokeTask("context_letters", SCHEMA, LETTERS, context=6, continuation=8),
    SmokeTask("phrase_short_context", LANGUAGE_MODELING, PHRASE, context=6, continuation=1),
    SmokeTask("phrase", LANGUAGE_MODELING, PHRASE, context=20, continuation=1),
    SmokeTask("phrase_long_context", LANGUAGE_MODELING, PHRASE, context=60, continuation=1),
    SmokeTask("phrase_shots", LANGUAGE_MODELING, PHRASE, context=8, continuation=1, shots=2),
    SmokeTask("phrase_two_words", LANGUAGE_MODELING, PHRASE, context=20, continuation=2),
    SmokeTask("repeat", LANGUAGE_MODELING, REPEAT, context=10, continuation=1),
)


def write_smoke_bundle(documents: Sequence[str], folder: Path, seed: int) -> None:
    """Write core.yaml, eval_meta_data.csv and eval_data/*.jsonl into `folder`, which exists and is empty.

    Of `documents` the first million characters are used. Raises DataError when they are too few for 22 tasks of 28
    items.
    """
    text = Text(documents)
    (folder / "eval_data").mkdir()
    for task in SMOKE_TASKS:
        examples = make_examples(task, text, random.Random(f"{seed} {task.label}"))
        lines = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        (folder / "eval_data" / f"{task.label}.jsonl").write_text(lines, encoding="utf-8", newline="")
    tasks = [
        {
            "label": task.label,
            "dataset_uri": f"{task.label}.jsonl",
            "num_fewshot": [task.shots],
            "icl_task_type": task.kind,
        }
        for task in SMOKE_TASKS
    ]
    core = yaml.safe_dump({"icl_tasks": tasks}, sort_keys=False)
    (folder / "core.yaml").write_text(core, encoding="utf-8", newline="")
    with open(folder / "eval_meta_data.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(META_COLUMNS)
        for task in SMOKE_TASKS:
            baseline = 0 if task.kind == LANGUAGE_MODELING else 100 / task.options
            kind, source = task.kind.replace("_", " "), f"held-out text: {task.source}"
            writer.writerow([task.label, "smoke", kind, task.shots, ITEMS, baseline, source])


# ---- passages


class Text:
    """Documents as words; a place (document, i) is a word that one single space divides from the word before it."""

    def __init__(self, documents: Sequence[str]) -> None:
        self.documents: list[str] = []
        self.words: list[list[tuple[int, int]]] = []
        self.places: list[tuple[int, int]] = []
        self._frequent: dict[int, list[tuple[int, int]]] = {}
        left = MAX_CHARACTERS
        for document in documents:
            if left <= 0:
                break
            document, left = document[:left], left - len(document)
            words = [match.span() for match in re.finditer(r"\S+", document)]
            for i in range(LEAST_CONTEXT, len(words)):
                if document[words[i - 1][1] : words[i][0]] == " ":
                    self.places.append((len(self.documents), i))
            self.documents.append(document)
            self.words.append(words)
        self.is_one_document = len({document for document, _ in self.places}) == 1

    def before(self, place: tuple[int, int], count: int) -> str:
        """The text of at most `count` words before the place."""
        document, i = place
        words = self.words[document]
        return self.documents[document][words[max(i - count, 0)][0] : words[i - 1][1]]

    def after(self, place: tuple[int, int], count: int) -> str | None:
        """The text of `count` words from the place on; None where the document ends before or a word is too long."""
        document, i = place
        words = self.words[document][i : i + count]
        if len(words) < count or any(end - start > LONGEST_WORD for start, end in words):
            return None
        return self.documents[document][words[0][0] : words[-1][1]]

    def frequent_places(self, count: int) -> list[tuple[int, int]]:
        """One place for each phrase (two words before it and `count` from it on), the most frequent phrases first."""
        if count not in self._frequent:
            phrases: dict[tuple[str, str | None], list[tuple[int, int]]] = collections.defaultdict(list)
            for place in self.places:
                phrases[(self.before(place, 2), self.after(place, count))].append(place)
            ranked = sorted(phrases.values(), key=lambda places: (-len(places), places[0]))
            self._frequent[count] = [places[len(places) // 2] for places in ranked]
        return self._frequent[count]


def make_examples(task: SmokeTask, text: Text, rng: random.Random) -> list[dict[str, object]]:
    """ITEMS examples of the task, no two of one place."""
    if task.source == PHRASE:
        places = text.frequent_places(task.continuation)
    else:
        places = rng.sample(text.places, min(len(text.places), TRIES))
    examples = []
    for place in places:
        example = _example(task, text, place, rng)
        if example is not None:
            examples.append(example)
        if len(examples) == ITEMS:
            rng.shuffle(examples)
            return examples
    raise DataError(
        f"the held-out text gives {len(examples)} of the {ITEMS} items of the smoke task {task.label};"
        " give more text or hold more of it out (data.val_fraction)"
    )


def _example(task: SmokeTask, text: Text, place: tuple[int, int], rng: random.Random) -> dict[str, object] | None:
    """The example at `place`, None where the passage gives none; the options of schema are contexts."""
    context, continuation = text.before(place, task.context), text.after(place, task.continuation)
    if continuation is None:
        return None
    if task.kind == LANGUAGE_MODELING:
        if task.source == REPEAT:
            context = f"{context} {continuation} {context}"
        return {"context": context, "continuation": continuation}
    if task.kind == SCHEMA:
        options = _wrong(task, context, place, text, rng, lambda other: text.before(other, task.context))
    else:
        options = _wrong(task, continuation, place, text, rng, lambda other: text.after(other, task.continuation))
    if options is None:
        return None
    gold = rng.randrange(len(options) + 1)
    options.insert(gold, context if task.kind == SCHEMA else continuation)
    if task.kind == SCHEMA:
        return {"context_options": options, "continuation": continuation, "gold": gold}
    return {"query": context, "choices": options, "gold": gold}


def _wrong(
    task: SmokeTask,
    right: str,
    place: tuple[int, int],
    text: Text,
    rng: random.Random,
    at: Callable[[tuple[int, int]], str | None],
) -> list[str] | None:
    """`options - 1` different wrong options for `right`, or None when this passage does not give so many."""
    wrong: list[str] = []
    for _ in range(20 * task.options):
        if task.source == OTHER:
            other = rng.choice(text.places)
            option = at(other) if other[0] != place[0] or text.is_one_document else None
        else:
            option = _disordered(right, rng, words=task.source == ORDER)
        if option is not None and option != right and option not in wrong:
            wrong.append(option)
        if len(wrong) == task.options - 1:
            return wrong
    return None


def _disordered(text: str, rng: random.Random, words: bool) -> str:
    """`text` with its words, or the letters of each word, in another order; its white space stays."""
    parts = re.findall(r"\S+", text)
    shuffled = rng.sample(parts, len(parts)) if words else ["".join(rng.sample(part, len(part))) for part in parts]
    remaining = iter(shuffled)
    return re.sub(r"\S+", lambda _: next(remaining), text)
