"""From an example to token rows: few-shot draws, prompts, and the span of each row that is scored.

The published scores hang on these details, so they are those of the reference scorer (nanochat; facts beside each
function):

- a task's examples are shuffled by Random(1337), then cut to `cap`; the cut list is also the pool of the few-shot
  draws;
- the shots of example i (counted in that list) are drawn by Random(1234 + i) from all the others, anew for every
  example;
- a shot is query + delimiter + gold, shots and item are joined by blank lines, and BOS comes first;
- multiple_choice scores each row after the tokens that all choices have in common, schema scores the tokens at the
  end that all contexts have in common, language_modeling scores what the continuation adds to the prompt without it;
- contexts of language_modeling are stripped, and so is its prompt without the continuation: a trailing space would
  merge with the continuation's first token.

An option may have no scored token: two of piqa's choices are equal but for a longer ending. Its mean loss is then the
mean of nothing; `score.py` says what the reference makes of that. Only an example none of whose options has a scored
token is an error.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from job.errors import DataError, UsageError
from job.evaluation.bundle import LANGUAGE_MODELING, SCHEMA, Bundle, Task

SHUFFLE_SEED = 1337
SHOTS_SEED = 1234
ENCODE_CHUNK = 512


class Encoder(Protocol):
    """The part of a tokenizer that is used; `bos_id` is None when it has no beginning-of-sequence token."""

    @property
    def bos_id(self) -> int | None: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


@dataclasses.dataclass(frozen=True)
class Item:
    """One example as token rows, one per option (language_modeling: one row).

    Row r is `prefix` followed by `suffixes[r]`, and its tokens from `starts[r]` on are scored, each predicted from what
    stands before it. The prefix is what all rows share, short of the last token before the first scored one: what a
    model computes for the prefix serves all rows, and every prediction that is scored is made from a suffix. `line` is
    the example's line in the task's file, counted from 1; `gold` the right option (language_modeling: 0).
    """

    line: int
    gold: int
    prefix: np.ndarray
    suffixes: tuple[np.ndarray, ...]
    starts: tuple[int, ...]

    @classmethod
    def of_rows(cls, line: int, gold: int, rows: Sequence[np.ndarray], starts: Sequence[int]) -> Item:
        """The item of whole rows; 1 <= starts[r] <= len(rows[r])."""
        shared = max(min(common_prefix(rows), *starts) - 1, 0)
        return cls(line, gold, rows[0][:shared], tuple(row[shared:] for row in rows), tuple(starts))

    @property
    def rows(self) -> list[np.ndarray]:
        return [np.concatenate([self.prefix, suffix]) for suffix in self.suffixes]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return len(self.prefix) + max(len(suffix) for suffix in self.suffixes)

    @property
    def scored(self) -> list[int]:
        """How many tokens of each row are scored; 0 is possible."""
        return [
            len(self.prefix) + len(suffix) - start for suffix, start in zip(self.suffixes, self.starts, strict=True)
        ]


def check_cap(bundle: Bundle, cap: int | None) -> None:
    """UsageError unless every task has more examples under the cap than shots."""
    worst = max(bundle.tasks, key=lambda task: task.shots)
    if cap is not None and cap <= worst.shots:
        few = f"a cap of {cap} examples per task leaves too few for the {worst.shots} shots of {worst.label}"
        raise UsageError(f"{few}; use more than {worst.shots}")


def order(count: int, cap: int | None) -> list[int]:
    """The examples to score, by index into the file, in the order that the few-shot seeds count."""
    indices = list(range(count))
    random.Random(SHUFFLE_SEED).shuffle(indices)
    return indices[:cap]


def draw_shots(i: int, count: int, shots: int) -> list[int]:
    """The few-shot examples for example `i` of `count`, all counted in scoring order.

    The others are sampled by number: Random.sample depends on the population's length alone.
    """
    drawn = random.Random(SHOTS_SEED + i).sample(range(count - 1), shots) if shots else []
    return [other + (other >= i) for other in drawn]


def render(task: Task, example: dict[str, Any], shots: Sequence[dict[str, Any]]) -> list[str]:
    """The prompts of one example: one per option; for language_modeling without and with the continuation."""
    if task.kind == LANGUAGE_MODELING:
        *asked, (context, continuation) = [(e["context"].strip(), e["continuation"]) for e in (*shots, example)]
    else:
        asked = [task.options(shot)[shot["gold"]] for shot in shots]
    opening = "".join(task.delimiter.join(shot) + "\n\n" for shot in asked)
    if task.kind == LANGUAGE_MODELING:
        without = opening + context + task.delimiter
        return [without.strip(), without + continuation]
    return [opening + task.delimiter.join(option) for option in task.options(example)]


def common_prefix(rows: Sequence[np.ndarray]) -> int:
    """The number of tokens at the beginning that all rows share."""
    shortest = min(len(row) for row in rows)
    same = np.ones(shortest, dtype=bool)
    for row in rows[1:]:
        same &= np.equal(rows[0][:shortest], row[:shortest])
    return int(same.argmin()) if not same.all() else shortest


def scored_spans(task: Task, index: int, rows: Sequence[np.ndarray]) -> tuple[Sequence[np.ndarray], list[int]]:
    """The rows to run and where in each the scoring starts; `rows` are the encoded prompts of `render`, BOS included.

    Raises DataError naming the line of example `index` when nothing is left to score.
    """
    if task.kind == LANGUAGE_MODELING:
        without, whole = rows
        start = len(without)
        if start >= len(whole):
            remedy = "leave the example out or use another tokenizer"
            raise DataError(f"{task.where(index)}: the continuation tokenises to nothing; {remedy}")
        if not np.array_equal(whole[:start], without):
            raise DataError(
                f"{task.where(index)}: with its continuation the prompt tokenises to other tokens than without;"
                " this tokenizer merges across the delimiter and cannot score the task"
            )
        return [whole], [start]
    if task.kind == SCHEMA:
        suffix = common_prefix([row[::-1] for row in rows])
        starts = [len(row) - suffix for row in rows]
    else:
        starts = [common_prefix(rows)] * len(rows)
    if min(starts) == 0 or all(start == len(row) for row, start in zip(rows, starts, strict=True)):
        same = "the options cannot be told apart; they tokenise to the same or to nothing"
        raise DataError(f"{task.where(index)}: {same}")
    return rows, starts


def crop(
    task: Task, index: int, rows: Sequence[np.ndarray], starts: Sequence[int], max_tokens: int | None
) -> tuple[Sequence[np.ndarray], Sequence[int]]:
    """The last `max_tokens` of each row, for models of fixed positions; DataError when scored tokens would be lost."""
    if max_tokens is None:
        return rows, starts
    cuts = [max(len(row) - max_tokens, 0) for row in rows]
    for row, start, cut in zip(rows, starts, cuts, strict=True):
        if start - cut < 1:
            tokens = f"{len(row) - start} scored tokens, a context of {max_tokens}"
            remedy = "use a model with a longer context"
            raise DataError(f"{task.where(index)} is longer than the model can score: {tokens}; {remedy}")
    cut_rows = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
    return cut_rows, [start - cut for start, cut in zip(starts, cuts, strict=True)]


def items_of(task: Task, tokenizer: Encoder, cap: int | None, max_tokens: int | None = None) -> Iterator[Item]:
    """The task's items in scoring order, tokenised in chunks.

    Raises DataError naming the line for an example that cannot be scored, or when the tokenizer has no BOS.
    """
    if tokenizer.bos_id is None:
        needed = "the tokenizer has no BOS token, and every CORE prompt begins with one"
        raise DataError(f"{needed}; use the tokenizer the model was trained with")
    indices = order(len(task.examples), cap)
    count = len(indices)
    if count <= task.shots:
        few = f"{count} lines, too few for the {task.shots} shots of {task.label}"
        raise DataError(f"{task.origin}: {task.file} has {few}")
    for begin in range(0, count, ENCODE_CHUNK):
        chunk = range(begin, min(begin + ENCODE_CHUNK, count))
        prompts = []
        for i in chunk:
            shots = [task.examples[indices[j]] for j in draw_shots(i, count, task.shots)]
            prompts.append(render(task, task.examples[indices[i]], shots))
        encoded = iter(tokenizer.encode_batch([text for texts in prompts for text in texts]))
        for i, texts in zip(chunk, prompts, strict=True):
            index = indices[i]
            whole = [np.array([tokenizer.bos_id, *next(encoded)], dtype=np.int32) for _ in texts]
            rows, starts = crop(task, index, *scored_spans(task, index, whole), max_tokens)
            yield Item.of_rows(index + 1, task.examples[index].get("gold", 0), rows, starts)
