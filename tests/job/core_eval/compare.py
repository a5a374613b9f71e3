"""A small model trained for a moment, and the production path beside the plain reference, item by item."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch

from job.core_eval.batches import plan_batches
from job.core_eval.bundle import Task
from job.core_eval.ledger import Answer, centered_accuracy, metric_of
from job.core_eval.prompts import items_of
from job.core_eval.score import CPU_TOKEN_BUDGET, Forward, score_items
from job.data.tokenizer import Tokenizer, train_tokenizer
from model.gpt import GPT, GPTConfig

T = 256
CORPUS = Path(__file__).parents[4] / "shared" / "data" / "corpus"


def _reference():
    spec = importlib.util.spec_from_file_location("core_reference", Path(__file__).parent / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _reference()


@dataclasses.dataclass
class TaskComparison:
    """One task's answers by the production path, those of the reference by item (right, chosen, margin), and the CPU seconds of each."""

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
    """A GPT of this depth after `steps` of AdamW on 8 rows each: enough to tell words from noise."""
    model = GPT(GPTConfig.for_depth(depth, vocab_size, T))
    model.init_weights(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        block = torch.from_numpy(rows[np.arange(8 * step, 8 * step + 8) % len(rows)])
        model.loss(block[:, :-1], block[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def in_bf16(model: GPT) -> GPT:
    """The same weights, computing in bf16."""
    other = GPT(model.config, compute_dtype=torch.bfloat16)
    other.load_state_dict(model.state_dict())
    return other


def compare_task(task: Task, tokenizer: Tokenizer, model: GPT, cap: int, every: int = 1) -> TaskComparison:
    """Both ways through the task's items under `cap`, the reference through each `every`-th. Tokenising is in neither clock."""
    pool = reference.pool_of(list(task.examples), cap)
    encode, bos = tokenizer.encode, tokenizer.bos_id
    rows = {i: reference.rows_of(task.kind, pool, i, task.shots, task.delimiter, encode, bos) for i in range(0, len(pool), every)}
    answers, seconds = _answers(model, task, tokenizer, cap)
    began = time.process_time()
    expected = {i: reference.answer(model.logits, task.kind, *row, pool[i].get("gold")) for i, row in rows.items()}
    return TaskComparison(task.label, task.baseline, answers, expected, seconds, time.process_time() - began)


def again(model: GPT, task: Task, tokenizer: Tokenizer, cap: int, known: TaskComparison) -> TaskComparison:
    """`known` with the production path's answers of another model."""
    answers, seconds = _answers(model, task, tokenizer, cap)
    return dataclasses.replace(known, answers=answers, seconds=seconds)


def _answers(model: GPT, task: Task, tokenizer: Tokenizer, cap: int) -> tuple[list[Answer], float]:
    items = list(items_of(task, tokenizer, cap))
    began = time.process_time()
    answers = score_items(Forward(model), task.kind, items, plan_batches(items, CPU_TOKEN_BUDGET, forks=True))
    return [answers[i] for i in range(len(items))], time.process_time() - began


def scores(compared: list[TaskComparison]) -> tuple[float, float]:
    """CORE by the production path and by the reference, each over the items it was asked."""

    def metric(right: list[list[bool]]) -> float:
        accuracies = (sum(task) / len(task) for task in right)
        return metric_of(centered_accuracy(accuracy, c.baseline) for accuracy, c in zip(accuracies, compared, strict=True))

    return metric([[a.right for a in c.answers] for c in compared]), metric([[e[0] for e in c.expected.values()] for c in compared])
