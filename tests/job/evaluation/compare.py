"""A small model trained for a moment, and the production path beside the plain reference, item by item."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow.parquet
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import load
from job.data.tokenizer import Tokenizer, train_tokenizer
from job.evaluation.batches import plan_batches
from job.evaluation.bundle import Task
from job.evaluation.ledger import Answer, centered_accuracy, metric_of
from job.evaluation.prompts import items_of
from job.evaluation.score import CPU_TOKEN_BUDGET, Forward, score_items
from job.machine import host
from job.recipe.config import resolve
from job.recipe.derive import derive
from model.gpt import GPT
from model.optimizer import Optimizer

T = 256
CORPUS = Path(__file__).parents[4] / "shared" / "data" / "corpus"


reference = load(Path(__file__).with_name("reference.py"), "core_reference")


@dataclasses.dataclass
class TaskComparison:
    """One task's answers by the production path, the reference's by item (right, chosen, margin), CPU seconds."""

    label: str
    baseline: float
    answers: list[Answer]
    expected: dict[int, tuple[bool, int | None, float]]
    seconds: float
    reference_seconds: float

    @property
    def differing(self) -> list[float]:
        """The reference's distance from a tie, in nats, of each item that is answered otherwise."""
        asked = ((self.answers[i], *answer) for i, answer in self.expected.items())
        return [margin for answer, right, chosen, margin in asked if (answer.right, answer.chosen) != (right, chosen)]

    @property
    def speedup(self) -> float:
        """Items a second, over the reference's."""
        return self.reference_seconds / len(self.expected) / (self.seconds / len(self.answers))


def corpus_tokenizer(vocab_size: int, shards: int) -> tuple[Tokenizer, np.ndarray]:
    """A tokenizer of the corpus's first `shards`, and rows (n, T+1) of text to train on."""
    files = sorted(CORPUS.glob("shard_*.parquet"))[:shards]
    texts = [text for file in files for text in pyarrow.parquet.read_table(file, columns=["text"])["text"].to_pylist()]
    tokenizer, _ = train_tokenizer(texts, vocab_size=vocab_size, max_chars=20_000_000, document_chars=10_000)
    ids = [token for text in texts[:1000] for token in (tokenizer.bos_id, *tokenizer.encode(text))]
    return tokenizer, np.array(ids[: len(ids) // (T + 1) * (T + 1)]).reshape(-1, T + 1)


def trained_gpt(depth: int, vocab_size: int, rows: np.ndarray, steps: int) -> GPT:
    """A GPT of this depth after `steps` of 8 rows each, trained as the smoke preset trains."""
    shape = [f"model.depth={depth}", f"model.seq_len={T}", f"data.vocab_size={vocab_size}"]
    recipe = resolve(
        "smoke", {}, [*shape, f"train.steps={steps}", f"train.total_batch_size={8 * T}", "train.device_batch_size=8"]
    )
    derived = derive(recipe)
    model = GPT(derived.config)
    model.init_weights(1)
    optimizer = Optimizer(model.groups(), derived.specs, polar_dtype=torch.float32)
    for step in range(steps):
        block = torch.from_numpy(rows[np.arange(8 * step, 8 * step + 8) % len(rows)])
        optimizer.begin_overlap()
        model.loss(block[:, :-1], block[:, 1:]).backward()
        optimizer.step(derived.schedule.at(step))
    return model


def in_bf16(model: GPT) -> GPT:
    """The same weights, computing in bf16."""
    other = GPT(model.config, compute_dtype=torch.bfloat16)
    other.load_state_dict(model.state_dict())
    other.freeze()
    return other


@contextlib.contextmanager
def bf16_products() -> Iterator[None]:
    """bf16 products at fp32's speed where the CPU has no bf16 instructions, and torch's own take seven times as long.

    What such instructions do: operands are bf16 numbers, products and sums are fp32, the result is rounded to bf16.
    """
    if host.has_fast_bf16():
        yield
        return

    def widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Tensor, **options: object) -> Tensor:
            return function(*(x.float() for x in args), **options).to(args[0].dtype)

        return call

    products = ("linear", "scaled_dot_product_attention")
    with contextlib.ExitStack() as stack:
        for name in products:
            stack.enter_context(patch.object(F, name, widened(getattr(F, name))))
        yield


def compare_task(
    task: Task, tokenizer: Tokenizer, model: GPT, cap: int, every: int = 1, whole: bool = True
) -> TaskComparison:
    """Both ways through the task's items under `cap`, the reference through each `every`-th; tokenising is not timed.

    whole: the reference makes the logits of every position; otherwise from the first scored one on, which is cheaper
    where only its answers are wanted.
    """
    pool = reference.pool_of(list(task.examples), cap)
    encode, bos = tokenizer.encode, tokenizer.bos_id
    rows = {
        i: reference.rows_of(task.kind, pool, i, task.shots, task.delimiter, encode, bos)
        for i in range(0, len(pool), every)
    }
    answers, seconds = _answers(model, task, tokenizer, cap)

    def logits_from(first: int) -> Callable[[Tensor], Tensor]:
        return model.logits if whole else lambda ids: model.lm_head(model.hidden(ids)[:, first:])

    began = time.process_time()
    expected = {
        i: reference.answer(logits_from(min(starts) - 1), task.kind, texts, starts, pool[i].get("gold"))
        for i, (texts, starts) in rows.items()
    }
    return TaskComparison(task.label, task.baseline, answers, expected, seconds, time.process_time() - began)


def again(model: GPT, task: Task, tokenizer: Tokenizer, cap: int, known: TaskComparison) -> TaskComparison:
    """`known` with the production path's answers of another model."""
    with bf16_products():
        answers, seconds = _answers(model, task, tokenizer, cap)
    return dataclasses.replace(known, answers=answers, seconds=seconds)


def _answers(model: GPT, task: Task, tokenizer: Tokenizer, cap: int) -> tuple[list[Answer], float]:
    items = list(items_of(task, tokenizer, cap))
    began = time.process_time()
    answers = score_items(
        Forward(model), task.kind, items, plan_batches(items, CPU_TOKEN_BUDGET, share_prefix=True, fine=True)
    )
    return [answers[i] for i in range(len(items))], time.process_time() - began


def scores(compared: list[TaskComparison]) -> tuple[float, float]:
    """CORE by the production path and by the reference, each over the items it was asked."""

    def metric(right: list[list[bool]]) -> float:
        accuracies = (sum(task) / len(task) for task in right)
        return metric_of(
            centered_accuracy(accuracy, c.baseline) for accuracy, c in zip(accuracies, compared, strict=True)
        )

    return metric([[a.right for a in c.answers] for c in compared]), metric(
        [[e[0] for e in c.expected.values()] for c in compared]
    )
