"""Scoring a bundle: batches of token rows through a model, answers sealed task by task.

The reference scores one example at a time and makes the logits of every position. The same numbers cost far less:

- rows are sorted by length and cut into batches by a token budget, so that little is padded and a GPU is full. Padding stands on the
  right, where a causal model cannot see it, so it changes nothing;
- padded lengths come from a short grid (eight per octave), so that a compiler or an allocator meets few shapes;
- the head, the largest matrix product of a small model, is applied only to the positions that are scored;
- results stay on the device until a task is done: one transfer, no waiting between batches.

Memory: a forward pass sees at most max(token_budget, the largest single item's padded rows) tokens, and `HEAD_ELEMENTS` logits at once.

An answer is decided by which of two means is lower, and their last bits depend on the shape of the batch. Where the two lie within
`TIE` nats the item is scored again alone, in the shape in which the reference would score it: so answers depend neither on the
budget nor on how many ranks share the work. `tests/job/core_eval/reference.py` is that reference.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from job.core_eval.bundle import LANGUAGE_MODELING, Bundle, Task
from job.core_eval.items import TaskItems, seal_items
from job.core_eval.ledger import Answer, Ledger, make_ledger, seal_answers, seal_ledger, sealed_answers
from job.core_eval.prompts import Encoder, Item
from job.progress import Reporter

TOKEN_BUDGET = 16_384
HEAD_ELEMENTS = 1 << 25
SHORTEST = 16
TIE = 1e-4
VERSION = 1

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""forward(ids (B, T) int64, targets (B, T) int64) -> (nll, greedy, lead), each (N,): one entry per position whose target is not -1, row
by row. nll in nats, fp32; greedy True where the target is the token of highest logit; lead the target's logit minus the best other, fp32."""


class Readable(Protocol):
    """What `forward_of` asks of a model."""

    def hidden(self, idx: Tensor) -> Tensor: ...

    def readout(self, hidden: Tensor) -> Tensor: ...


class Ranks:
    """The processes that share the work. This one is alone; `ProcessRanks` are torch.distributed's."""

    rank = 0
    size = 1

    def all_gather(self, value: Any) -> list[Any]:
        """Everybody's value, in rank order."""
        return [value]


class ProcessRanks(Ranks):
    """The ranks of a torch.distributed process group (None: the default one)."""

    def __init__(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = torch.distributed.get_rank(group)
        self.size = torch.distributed.get_world_size(group)

    def all_gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some of a task's items, all their rows padded to `length`. `cost` is the tokens of the forward pass, padding included."""

    items: tuple[int, ...]
    rows: int
    length: int

    @property
    def cost(self) -> int:
        return self.rows * self.length


def forward_of(model: Readable) -> Forward:
    """A model with `hidden` (B, T) -> (B, T, D) and `readout` (N, D) -> (N, V) fp32 logits as a Forward: the head on scored positions only."""

    @torch.no_grad()
    def forward(ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scored = (targets >= 0).flatten().nonzero().squeeze(1)
        hidden = model.hidden(ids).flatten(0, 1)[scored]
        words = targets.flatten()[scored]
        step = max(1, HEAD_ELEMENTS // model.readout(hidden[:1]).size(-1))
        parts = [compare(model.readout(hidden[i : i + step]), words[i : i + step]) for i in range(0, len(words), step)]
        nll, greedy, lead = zip(*parts, strict=True)
        return torch.cat(nll), torch.cat(greedy), torch.cat(lead)

    return forward


def compare(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits (N, V), targets (N,) -> nll, greedy, lead as in Forward. Overwrites the targets' logits."""
    column = targets.unsqueeze(1)
    own = logits.gather(1, column).squeeze(1)
    nll = logits.logsumexp(dim=1) - own
    greedy = logits.argmax(dim=1) == targets
    rival = logits.scatter_(1, column, -torch.inf).amax(dim=1)
    return nll, greedy, own - rival


# ---- batches ------------------------------------------------------------------------------------------------------------------


def padded_length(tokens: int) -> int:
    """The next length of the grid: multiples of an eighth of the power of two below, at least SHORTEST."""
    if tokens <= SHORTEST:
        return SHORTEST
    step = max(1 << (tokens - 1).bit_length() - 4, 1)
    return -(-tokens // step) * step


def plan_batches(items: Sequence[Item], token_budget: int) -> list[Batch]:
    """Items sorted by their longest row, every item in exactly one batch.

    A batch ends where the next item would exceed the budget, or where it is so much shorter that padding it and those before it up
    to the batch's length would waste more than an eighth of the budget.
    """
    longest = [item.longest - 1 for item in items]
    batches: list[Batch] = []
    chosen: list[int] = []
    rows = length = waste = 0
    for i in sorted(range(len(items)), key=lambda i: (-longest[i], i)):
        own, more = padded_length(longest[i]), len(items[i].tails)
        waste += more * (length - own)
        if chosen and ((rows + more) * length > token_budget or waste > token_budget // 8):
            batches.append(Batch(tuple(chosen), rows, length))
            chosen, rows = [], 0
        if not chosen:
            length, waste = own, 0
        chosen.append(i)
        rows += more
    return [*batches, Batch(tuple(chosen), rows, length)] if chosen else batches


def share(batches: Sequence[Batch], size: int) -> list[list[Batch]]:
    """The batches of each of `size` ranks: the costliest first, each to the rank with the least work so far."""
    shares: list[list[Batch]] = [[] for _ in range(size)]
    load = [0] * size
    for batch in sorted(batches, key=lambda batch: (-batch.cost, batch.items)):
        rank = load.index(min(load))
        shares[rank].append(batch)
        load[rank] += batch.cost
    return shares


def tensors_of(items: Sequence[Item], length: int) -> tuple[Tensor, Tensor]:
    """ids and targets, each (B, length): a row's tokens but the last, and at the scored positions the token that follows, -1 elsewhere."""
    rows = [(row, start) for item in items for row, start in zip(item.rows, item.starts, strict=True)]
    ids = np.zeros((len(rows), length), dtype=np.int64)
    targets = np.full((len(rows), length), -1, dtype=np.int64)
    for b, (row, start) in enumerate(rows):
        ids[b, : len(row) - 1] = row[:-1]
        targets[b, start - 1 : len(row) - 1] = row[start:]
    return torch.from_numpy(ids), torch.from_numpy(targets)


# ---- answers ------------------------------------------------------------------------------------------------------------------


def score_items(
    forward: Forward, kind: str, items: Sequence[Item], batches: Sequence[Batch], device: torch.device | str = "cpu"
) -> dict[int, Answer]:
    """The answers of the items in `batches`, by index into `items`; near ties are scored again, alone."""
    decided = _score_batches(forward, kind, items, batches, device)
    ties = [i for i, (_, gap) in decided.items() if gap < TIE]
    alone = [Batch((i,), len(items[i].tails), items[i].longest) for i in ties]
    decided |= _score_batches(forward, kind, items, alone, device)
    return {i: answer for i, (answer, _) in decided.items()}


def _score_batches(
    forward: Forward, kind: str, items: Sequence[Item], batches: Sequence[Batch], device: torch.device | str
) -> dict[int, tuple[Answer, float]]:
    results = []
    for batch in batches:
        ids, targets = tensors_of([items[i] for i in batch.items], batch.length)
        results.append(forward(ids.to(device, non_blocking=True), targets.to(device, non_blocking=True)))
    decided: dict[int, tuple[Answer, float]] = {}
    for batch, result in zip(batches, results, strict=True):
        nll, greedy, lead = (tensor.cpu().numpy() for tensor in result)
        at = 0
        for i in batch.items:
            counts = items[i].scored
            span = slice(at, at + sum(counts))
            at = span.stop
            if kind == LANGUAGE_MODELING:
                decided[i] = decide_by_greedy(items[i], greedy[span], lead[span])
            else:
                decided[i] = decide_by_loss(items[i], np.split(nll[span], np.cumsum(counts)[:-1]))
    return decided


def decide_by_greedy(item: Item, greedy: np.ndarray, lead: np.ndarray) -> tuple[Answer, float]:
    """language_modeling: right when every token of the continuation is the most likely one. Also the distance from a tie, nats."""
    margin = float(lead.min())
    return Answer(item.line, None, None, bool(greedy.all()), margin), abs(margin)


def decide_by_loss(item: Item, losses: Sequence[np.ndarray]) -> tuple[Answer, float]:
    """multiple_choice, schema: the option of lowest mean token loss, the first one on a tie. Also the distance from a tie, nats.

    The reference takes the mean of no losses to be NaN, and then Python's min: an option without scored tokens is chosen when it
    comes first and never otherwise. Such an answer has no margin.
    """
    means = [float(loss.mean(dtype=np.float64)) if loss.size else math.inf for loss in losses]
    if math.isinf(means[0]):
        return Answer(item.line, item.gold, 0, item.gold == 0, None), math.inf
    chosen = means.index(min(means))
    gap = min(means[:chosen] + means[chosen + 1 :]) - means[chosen]
    margin = min(means[: item.gold] + means[item.gold + 1 :]) - means[item.gold]
    return Answer(item.line, item.gold, chosen, chosen == item.gold, margin if math.isfinite(margin) else None), gap


# ---- a bundle -----------------------------------------------------------------------------------------------------------------


def evaluate(
    forward: Forward,
    tokenizer: Encoder,
    bundle: Bundle,
    out: Path,
    *,
    cap: int | None,
    reporter: Reporter,
    made_from: dict[str, Any],
    items: Path | None = None,
    device: torch.device | str = "cpu",
    max_tokens: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    ranks: Ranks | None = None,
) -> Ledger:
    """Score every task of `bundle` that is not sealed below `out` yet; seal and return the ledger.

    `cap`: items per task, None for all. `made_from` says what answered: {"weights", "tokenizer", "dtype", "backend"}, JSON-able;
    with bundle, cap and max_tokens it decides whether sealed answers are this model's. `items`: where `seal_items` put the tokens or
    is to put them, `out/items` by default. `max_tokens`: the context of a model of fixed positions, None for one that takes any
    length. With `ranks`, every rank calls this and gets the same ledger; the first one writes. Raises what `seal_items` raises.
    """
    ranks = ranks or Ranks()
    tokens = _tokens(tokenizer, bundle, items or out / "items", cap, max_tokens, made_from["tokenizer"], reporter, ranks)
    made_from = {**made_from, "bundle": bundle.id, "cap": cap, "max_tokens": max_tokens, "scorer": VERSION}
    total = sum(len(task_items) for task_items in tokens.values())
    done = 0
    results = []
    for task in bundle.tasks:
        task_from = {**made_from, "task": task.label}
        known = ranks.all_gather(sealed_answers(out, task.label, task_from) if ranks.rank == 0 else None)[0]
        if known is None:
            known = _score_task(forward, task, tokens[task.label], token_budget, device, ranks)
            if ranks.rank == 0:
                seal_answers(out, task.label, task_from, *known)
        results.append((task, *known))
        done += len(tokens[task.label])
        if ranks.rank == 0:
            _report_task(reporter, results[-1])
            reporter.progress("evaluate", done, total, "items")
    ledger = make_ledger(bundle.metric_name, results, made_from)
    if ranks.rank == 0:
        seal_ledger(out, ledger)
        reporter.emit("eval.done", metric=ledger.metric, name=ledger.name, cap=cap, bundle_id=bundle.id, se=ledger.se)
    ranks.all_gather(None)  # no rank returns before the ledger is sealed
    return ledger


def _tokens(
    tokenizer: Encoder,
    bundle: Bundle,
    folder: Path,
    cap: int | None,
    max_tokens: int | None,
    tokenizer_id: str,
    reporter: Reporter,
    ranks: Ranks,
) -> dict[str, TaskItems]:
    """Every rank's view of the sealed items; the first rank makes what is missing while the others wait."""

    def sealed() -> dict[str, TaskItems]:
        return seal_items(bundle, tokenizer, folder, tokenizer_id=tokenizer_id, cap=cap, max_tokens=max_tokens, reporter=reporter)

    first = sealed() if ranks.rank == 0 else None
    ranks.all_gather(None)
    return first or sealed()


def _score_task(
    forward: Forward, task: Task, items: Sequence[Item], token_budget: int, device: torch.device | str, ranks: Ranks
) -> tuple[list[Answer], float]:
    """All answers in scoring order, and the seconds of the slowest rank."""
    began = time.perf_counter()
    mine = share(plan_batches(items, token_budget), ranks.size)[ranks.rank]
    parts = ranks.all_gather((score_items(forward, task.kind, items, mine, device), time.perf_counter() - began))
    answers = {i: answer for part, _ in parts for i, answer in part.items()}
    return [answers[i] for i in range(len(items))], max(seconds for _, seconds in parts)


def _report_task(reporter: Reporter, result: tuple[Task, Sequence[Answer], float]) -> None:
    row = make_ledger("", [result], {}).tasks[0]
    reporter.emit(
        "eval.task",
        task=row.label,
        type=row.kind,
        n=row.n,
        shots=row.shots,
        accuracy=row.accuracy,
        baseline=row.baseline,
        centered=row.centered,
        seconds=row.seconds,
    )
