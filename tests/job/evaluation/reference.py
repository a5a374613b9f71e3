"""The plain scorer: one example at a time, every option in full, the logits of every position, no batches, no tricks.

Written from the description of nanochat's evaluator alone and sharing no code with job/evaluation: the production path
must give the same answer for every item.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F

Encode = Callable[[str], list[int]]


def prompts_of(kind: str, example: dict, shots: list[dict], delimiter: str) -> list[str]:
    text = ""
    for shot in shots:
        if kind == "multiple_choice":
            text += f"{shot['query']}{delimiter}{shot['choices'][shot['gold']]}\n\n"
        elif kind == "schema":
            text += f"{shot['context_options'][shot['gold']]}{delimiter}{shot['continuation']}\n\n"
        else:
            text += f"{shot['context'].strip()}{delimiter}{shot['continuation']}\n\n"
    if kind == "multiple_choice":
        return [f"{text}{example['query']}{delimiter}{choice}" for choice in example["choices"]]
    if kind == "schema":
        return [f"{text}{context}{delimiter}{example['continuation']}" for context in example["context_options"]]
    text += f"{example['context'].strip()}{delimiter}"
    return [text.strip(), text + example["continuation"]]


def pool_of(examples: list[dict], cap: int | None) -> list[dict]:
    pool = list(examples)
    random.Random(1337).shuffle(pool)
    return pool[:cap] if cap else pool


def rows_of(
    kind: str, pool: list[dict], i: int, shots: int, delimiter: str, encode: Encode, bos: int
) -> tuple[list[list[int]], list[int]]:
    """Token rows and the first scored place of each."""
    others = [j for j in range(len(pool)) if j != i]
    drawn = [pool[j] for j in random.Random(1234 + i).sample(others, shots)] if shots else []
    rows = [[bos, *encode(text)] for text in prompts_of(kind, pool[i], drawn, delimiter)]
    if kind == "language_modeling":
        without, whole = rows
        assert whole[: len(without)] == without and len(without) < len(whole)
        return [whole], [len(without)]
    same = 0
    step = 1 if kind == "multiple_choice" else -1
    while same < min(map(len, rows)) and len({row[same if step == 1 else -1 - same] for row in rows}) == 1:
        same += 1
    return rows, [same if step == 1 else len(row) - same for row in rows]


@torch.no_grad()
def answer(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    kind: str,
    rows: list[list[int]],
    starts: list[int],
    gold: int | None,
) -> tuple[bool, int | None, float]:
    """Right or wrong, the option chosen, and the nats to a tie (NaN where an empty option decided).

    `logits_of` gives the logits of all columns, (B, T, V), or of the last ones only, from the first that is scored on.
    """
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), rows[0][0])
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row)
    logits = logits_of(ids)
    skipped = width - logits.size(1)
    if kind == "language_modeling":
        scored = logits[0, starts[0] - 1 - skipped : -1]
        right = ids[0, starts[0] :]
        top = scored.topk(2, dim=-1).values
        return bool((scored.argmax(-1) == right).all()), None, float((top[:, 0] - top[:, 1]).min())
    targets = ids.roll(-1, 1)[:, skipped:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    spans = ((start - 1 - skipped, len(row) - 1 - skipped) for row, start in zip(rows, starts, strict=True))
    means = [losses[b, start:stop].mean().item() for b, (start, stop) in enumerate(spans)]
    chosen = means.index(min(means))
    two = sorted(means)
    return chosen == gold, chosen, two[1] - two[0]
