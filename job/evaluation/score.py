"""Scoring a bundle: batches of token rows through a model, answers sealed task by task.

The reference (`tests/job/evaluation/reference.py`) scores one example at a time and computes the logits of every
position. The same numbers cost far less here:

- the prefix that an item's options share goes through the model once (`batches.py`);
- rows are sorted by length and cut into batches by a token budget, so that little is padded and a GPU is full;
- the head, and the last block after its attention, are applied only to the positions that are scored;
- results stay on the device until a task is done: one transfer, no waiting between batches.

Memory: a forward pass sees at most max(token_budget, one item's padded rows) tokens, and the logits of `HEAD_ROWS`
positions at once.

An answer is decided by which of two means is lower, and their last bits depend on the shape of the batch. Where the two
lie within `TIE` nats the item is scored again alone, in plain rows as the reference has them: so answers depend neither
on the budget nor on the number of ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from job.errors import DataError
from job.evaluation.batches import Batch, plain_shape, plan_batches, share, tensors_of
from job.evaluation.bundle import LANGUAGE_MODELING, Bundle, Task
from job.evaluation.items import seal_items
from job.evaluation.ledger import Answer, Ledger, folder_of, make_ledger, seal_answers, seal_ledger, sealed_answers
from job.evaluation.prompts import Encoder, Item
from job.reporter import Reporter
from job.train.ranks import Ranks
from model.shared_prefix import SharedPrefix

CPU_TOKEN_BUDGET = 2_048  # as fast as larger batches there, and they pad less
GPU_TOKEN_BUDGET = 32_768
HEAD_ROWS = 512
TIE = 1e-4
VERSION = 1


class Model(Protocol):
    """The part of a model in use: hidden states at N positions, (B, T) -> (N, D), and fp32 logits, (N, D) -> (N, V)."""

    def hidden(self, idx: Tensor, shared: SharedPrefix | None = None, positions: Tensor | None = None) -> Tensor: ...

    def lm_head(self, hidden: Tensor) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Forward:
    """A model as the scorer sees it; `share_prefix` says whether its `hidden` takes a `SharedPrefix`."""

    model: Model
    share_prefix: bool = True
    reporter: Reporter = dataclasses.field(default_factory=Reporter)

    @torch.no_grad()
    def __call__(
        self, ids: Tensor, positions: Tensor, targets: Tensor, shared: SharedPrefix | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ids (B, T), positions and targets (N,), as of `tensors_of` -> nll, greedy, lead, each (N,).

        nll in nats, fp32; greedy True where the target is the token of highest logit; lead its logit minus the best
        other.
        """
        self.reporter.beat(f"a batch of {ids.shape[0]} rows of {ids.shape[1]} tokens", long=ids.device.type == "cpu")
        hidden = self.model.hidden(ids, shared, positions)
        chunks = zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
        nll, greedy, lead = zip(*(compare(self.model.lm_head(states), right) for states, right in chunks), strict=True)
        return torch.cat(nll), torch.cat(greedy), torch.cat(lead)


def compare(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits (N, V), targets (N,) -> nll, greedy, lead as in Forward. Overwrites the targets' logits."""
    column = targets.unsqueeze(1)
    own = logits.gather(1, column).squeeze(1)
    nll = logits.logsumexp(dim=1) - own
    greedy = logits.argmax(dim=1) == targets
    rival = logits.scatter_(1, column, -torch.inf).amax(dim=1)
    return nll, greedy, own - rival


# ---- answers


def score_items(
    forward: Forward,
    kind: str,
    items: Sequence[Item],
    batches: Sequence[Batch],
    device: torch.device | str = "cpu",
    label: str = "",
) -> dict[int, Answer]:
    """The answers of the items in `batches`, by index into `items`; near ties are scored again, alone.

    Raises DataError naming the task (`label`) and the item's line where a loss is NaN or infinite.
    """
    decided = _score_batches(forward, kind, items, batches, device, label)
    ties = [i for i, (_, gap) in decided.items() if gap < TIE]
    alone = [Batch((i,), *plain_shape(items[i])) for i in ties]
    decided |= _score_batches(forward, kind, items, alone, device, label)
    return {i: answer for i, (answer, _) in decided.items()}


def _score_batches(
    forward: Forward, kind: str, items: Sequence[Item], batches: Sequence[Batch], device: torch.device | str, label: str
) -> dict[int, tuple[Answer, float]]:
    results = [forward(*tensors_of([items[i] for i in batch.items], batch, device)) for batch in batches]
    decided: dict[int, tuple[Answer, float]] = {}
    for batch, result in zip(batches, results, strict=True):
        nll, greedy, lead = (tensor.cpu().numpy() for tensor in result)
        at = 0
        for i in batch.items:
            counts = items[i].scored
            span = slice(at, at + sum(counts))
            at = span.stop
            if not np.isfinite(nll[span]).all():
                raise DataError(
                    f"{label or kind}, item of line {items[i].line}: the model's loss is NaN or infinite, so nothing"
                    " can be scored; its weights are damaged, or too large for the precision they are kept in"
                )
            if kind == LANGUAGE_MODELING:
                decided[i] = decide_by_greedy(items[i], greedy[span], lead[span])
            else:
                decided[i] = decide_by_loss(items[i], np.split(nll[span], np.cumsum(counts)[:-1]))
    return decided


def decide_by_greedy(item: Item, greedy: np.ndarray, lead: np.ndarray) -> tuple[Answer, float]:
    """language_modeling: right when each token of the continuation is likeliest; and the nats to a tie."""
    margin = float(lead.min())
    return Answer(item.line, None, None, bool(greedy.all()), margin), abs(margin)


def decide_by_loss(item: Item, losses: Sequence[np.ndarray]) -> tuple[Answer, float]:
    """multiple_choice, schema: the option of lowest mean token loss, the first on a tie; and the nats to a tie.

    The reference takes the mean of no losses to be NaN, and then Python's min: an option without scored tokens is
    chosen when it comes first and never otherwise. Such an answer has no margin.
    """
    means = [float(loss.mean(dtype=np.float64)) if loss.size else math.inf for loss in losses]
    if math.isinf(means[0]):
        return Answer(item.line, item.gold, 0, item.gold == 0, None), math.inf
    chosen = means.index(min(means))
    gap = min(means[:chosen] + means[chosen + 1 :]) - means[chosen]
    margin = min(means[: item.gold] + means[item.gold + 1 :]) - means[item.gold]
    return Answer(item.line, item.gold, chosen, chosen == item.gold, margin if math.isfinite(margin) else None), gap


# ---- a bundle


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Keep torch's SDPA away from cuDNN, which makes a plan for each new shape (0.44 s by a report on torch 2.11).

    The tasks' batches have more than a hundred shapes on each rank, most of them a few times.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@without_cudnn_attention()
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
    token_budget: int | None = None,
    workers: int = 1,
    ranks: Ranks | None = None,
) -> Ledger:
    """Score every task of `bundle` that is not sealed below `out`/<id> yet; seal and return the ledger.

    made_from: the model, {"weights", "tokenizer", "dtype", "backend"}; with bundle, cap (items per task) and max_tokens
    (the model's context) it decides whether sealed answers are this model's. items: the folder of `seal_items`, whose
    errors it raises. token_budget: of a forward pass. Every rank calls this; the first one writes.
    """
    ranks = ranks or Ranks()
    token_budget = token_budget or (CPU_TOKEN_BUDGET if torch.device(device).type == "cpu" else GPU_TOKEN_BUDGET)
    seal = functools.partial(
        seal_items,
        bundle,
        tokenizer,
        items or out / "items",
        tokenizer_id=made_from["tokenizer"],
        cap=cap,
        max_tokens=max_tokens,
        workers=workers,
        reporter=reporter,
    )
    first = seal() if ranks.rank == 0 else None
    ranks.all_gather(None)  # the other ranks wait while the first one makes what is missing
    tokens = first or seal()
    made_from = made_from | {"bundle": bundle.id, "cap": cap, "max_tokens": max_tokens, "scorer": VERSION}
    out, total, done, results = folder_of(out, made_from), sum(map(len, tokens.values())), 0, []
    for task in bundle.tasks:
        task_from = {**made_from, "task": task.label}
        known = ranks.all_gather(sealed_answers(out, task.label, task_from, reporter) if ranks.rank == 0 else None)[0]
        found = known is not None
        if not found:
            known = _score_task(forward, task, tokens[task.label], token_budget, device, ranks)
            if ranks.rank == 0:
                seal_answers(out, task.label, task_from, *known)
        results.append((task, *known))
        done += len(tokens[task.label])
        if ranks.rank == 0:
            _report_task(reporter, results[-1], found)
            reporter.progress("evaluate", done, total, "items")
    ledger = make_ledger(bundle.metric_name, results, made_from)
    if ranks.rank == 0:
        seal_ledger(out, ledger)
        reporter.emit("eval.done", metric=ledger.metric, name=ledger.name, cap=cap, bundle_id=bundle.id, se=ledger.se)
    ranks.all_gather(None)  # no rank returns before the ledger is sealed
    return ledger


def _score_task(
    forward: Forward, task: Task, items: Sequence[Item], token_budget: int, device: torch.device | str, ranks: Ranks
) -> tuple[list[Answer], float]:
    """All answers in scoring order, and the seconds of the slowest rank."""
    began = time.perf_counter()
    fine = torch.device(device).type == "cpu"
    mine = share(plan_batches(items, token_budget, forward.share_prefix, fine), ranks.size)[ranks.rank]
    parts = ranks.all_gather(
        (score_items(forward, task.kind, items, mine, device, task.label), time.perf_counter() - began)
    )
    answers = {i: answer for part, _ in parts for i, answer in part.items()}
    return [answers[i] for i in range(len(items))], max(seconds for _, seconds in parts)


def _report_task(reporter: Reporter, result: tuple[Task, Sequence[Answer], float], found: bool) -> None:
    """Emit a task's row; `found`: its answers were sealed already."""
    row = make_ledger("", [result], {}).tasks[0]
    numbers = {key: getattr(row, key) for key in ("n", "shots", "accuracy", "baseline", "centered", "seconds")}
    reporter.emit("eval.task", task=row.label, type=row.kind, **numbers, **({"found": True} if found else {}))
