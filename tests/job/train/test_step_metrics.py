"""What a step measured is read later, in order, and all of it before a checkpoint; a broken number names step and
parameter."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from job.errors import DivergedError, OutOfMemoryError
from job.recipe.config import resolve
from job.recipe.derive import derive
from job.reporter import Reporter
from job.train import checkpoint, loop
from job.train.context import StopSignal
from job.train.loop import Batches, Run, save, take_step, train, warm_up
from job.train.step_metrics import Reading, StepMetrics
from model.gpt import GPT
from model.optimizer import Optimizer

CPU = torch.device("cpu")
TINY = ["model.depth=2", "model.seq_len=32", "data.vocab_size=512", "train.steps=6", "train.total_batch_size=128"]
RECIPE = resolve(
    "smoke",
    overrides=[*TINY, "train.device_batch_size=2", "train.dtype=fp32", "train.checkpoint_every=0", "train.val_every=0"],
)


class Rows:
    """Row i is 33 words drawn with seed i."""

    def take(self, start: int, count: int) -> np.ndarray:
        return np.stack(
            [np.random.default_rng(row).integers(0, 512, 33).astype(np.uint16) for row in range(start, start + count)]
        )


class Recorder(Reporter):
    def __init__(self) -> None:
        self.steps: list[dict] = []
        self.messages: list[dict] = []

    def emit(self, kind: str, **fields: object) -> None:
        assert kind == "train.step"
        self.steps.append(fields)

    def send(self, message: dict) -> None:
        self.messages.append(message)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    context = SimpleNamespace(
        rank=0, world_size=1, local_world_size=1, run=tmp_path, attempt=1, reporter=Recorder(), stop_signal=StopSignal()
    )
    derived = derive(RECIPE)
    model = GPT(derived.config)
    model.init_weights(0)
    batches = Batches(Rows(), rows_per_step=4, device_rows=2, rank=0, world_size=1, device=CPU)
    optimizer = Optimizer(model.groups(), derived.specs, polar_dtype=torch.float32)
    return Run(context, RECIPE, derived, SimpleNamespace(id="0" * 16), model, optimizer, batches)


def a_writer(run: Run) -> checkpoint.Writer:
    return checkpoint.Writer(run.optimizer, run.context, {}, run.batches.rows_per_step)


def lag_by(run: Run, lag: int) -> None:
    run.metrics = StepMetrics(CPU, run.optimizer.flagged, lambda reading: loop.record_step(run, reading), lag=lag)


def everything(run: Run) -> dict[str, Tensor]:
    slices = [*run.optimizer.weight_slices(), *run.optimizer.state_slices()]
    return {s.name: s.tensor.clone() for s in slices}


# ---- later, in order, all of it


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_readings_come_in_order_and_as_late_as_said(lag: int) -> None:
    seen: list[Reading] = []
    metrics = StepMetrics(CPU, ["a", "b"], seen.append, lag=lag)
    for step in range(5):
        metrics.begin_step()
        metrics.end_step(
            step, torch.tensor(float(step)), torch.tensor([False, step == 4]), torch.tensor(9.0), lr_mult=0.5
        )
        assert [r.step for r in seen] == list(range(step + 1 - lag))
    metrics.flush()
    assert [(r.step, r.loss, r.broken, r.diverged) for r in seen] == [
        *((step, float(step), (), False) for step in range(4)),
        (4, 4.0, ("b",), True),
    ]
    assert all(r.seconds >= 0 and r.lr_mult == 0.5 and r.gradient_norm == 3 for r in seen)


def test_a_loss_that_is_no_number_needs_no_gradient_to_be_a_divergence() -> None:
    assert Reading(0, math.nan, (), 1.0, 0.1).diverged and not Reading(0, 1.0, (), 1.0, 0.1).diverged


def test_the_lag_changes_nothing_but_when_steps_are_reported(run: Run) -> None:
    train(run)
    at_once = [{k: v for k, v in fields.items() if k != "ms"} for fields in run.context.reporter.steps]
    assert [fields["step"] for fields in at_once] == list(range(6)) and [fields["rows"] for fields in at_once][-1] == 24
    weights = everything(run)
    run.context.reporter.steps.clear()
    run.model.init_weights(0)
    run.optimizer = Optimizer(run.model.groups(), run.derived.specs, polar_dtype=torch.float32)
    run.step, run.writer = 0, a_writer(run)
    lag_by(run, 3)
    for step in range(6):
        take_step(run)
        assert len(run.context.reporter.steps) == max(0, step - 2)
    save(run)
    run.writer.finish()
    assert [{k: v for k, v in fields.items() if k != "ms"} for fields in run.context.reporter.steps] == at_once
    assert all(torch.equal(tensor, weights[name]) for name, tensor in everything(run).items())


# ---- broken numbers


def poison(run: Run, name: str, at: int) -> None:
    """One Inf in the gradient of a parameter at one step; the loss of that step is not touched."""
    run.model.get_parameter(name).register_hook(
        lambda grad: (
            torch.where(torch.arange(grad.numel()).view_as(grad) == 0, math.inf, grad) if run.step == at else grad
        )
    )


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("name", ["blocks.1.mlp.up.weight", "wte.weight", "resid_lambdas"])
def test_an_infinite_gradient_is_named_and_no_checkpoint_is_begun(run: Run, name: str, lag: int) -> None:
    lag_by(run, lag)
    poison(run, name, at=3)
    for _ in range(3):
        take_step(run)
    with pytest.raises(DivergedError) as diverged:
        take_step(run)
        save(run)
    assert f"training diverged at step 3: the loss is {run_loss(run)}, not finite is the gradient of {name}" in str(
        diverged.value
    )
    assert str(diverged.value).endswith("; lower train.lr_scale and start with --fresh")
    assert run.context.reporter.messages == [] and not (run.context.run / "checkpoints").exists()
    assert [fields["step"] for fields in run.context.reporter.steps] == [0, 1, 2]


def run_loss(run: Run) -> float:
    """The loss of step 3, computed again from the weights after step 2 by a fresh run."""
    again = dataclasses.replace(run, step=0)
    again.model = GPT(run.derived.config)
    again.model.init_weights(0)
    again.optimizer = Optimizer(again.model.groups(), run.derived.specs, polar_dtype=torch.float32)
    for step in range(3):
        again.step = step
        loop.accumulate_gradients(again)
        again.optimizer.step(run.derived.schedule.at(step))
    again.step = 3
    return loop.accumulate_gradients(again).item()


def test_weights_that_are_no_numbers_are_noticed_by_the_loss(run: Run) -> None:
    take_step(run)
    with torch.no_grad():
        run.model.blocks[0].attn.q.weight[0, 0] = math.nan
    with pytest.raises(
        DivergedError, match=r"at step 1: the loss is nan, not finite is the gradient of [\w.]+ \(and of \d+ others\)"
    ):
        take_step(run)


# ---- buffers of checkpoints that cannot be had


@pytest.mark.parametrize(
    ("error", "raised", "sentence"),
    [
        (
            RuntimeError("CUDA error: out of memory"),
            OutOfMemoryError,
            "this rank found no host memory for the copy of its 0.0 GB",
        ),
        (MemoryError(), OutOfMemoryError, "this rank found no host memory"),
        (RuntimeError("CUDA error: unspecified launch failure"), RuntimeError, "unspecified launch failure"),
    ],
)
def test_what_the_maker_of_buffers_fails_with_ends_training_before_the_next_step(
    run: Run, error: BaseException, raised: type, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "zeros", refuse)
        run.writer = a_writer(run)
        run.writer._thread.join()
    with pytest.raises(raised, match=sentence):
        train(run)
    assert run.step == 0 and run.context.reporter.steps == []
    with pytest.raises(raised, match=sentence):
        run.writer.save(run.step)


# ---- warm-up, and rows on their way


def test_warming_up_leaves_no_trace(run: Run) -> None:
    take_step(run)
    before, position = everything(run), run.step
    warm_up(run)
    after = everything(run)
    assert run.step == position and run.optimizer.steps == 1
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    take_step(run)
    assert [fields["step"] for fields in run.context.reporter.steps] == [0, 1]


@pytest.mark.parametrize(("val_every", "batches"), [(0, 0), (4, 1), (6, 0)])
def test_validation_is_warmed_up_only_where_training_validates(
    run: Run, val_every: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps: a validation after the sixth is the evaluation's."""
    run.recipe = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, val_every=val_every))
    calls, token_losses = [], run.model.token_losses
    monkeypatch.setattr(run.model, "token_losses", lambda *rows: calls.append(rows) or token_losses(*rows))
    warm_up(run)
    assert len(calls) == batches


def test_rows_go_to_a_gpu_of_any_index_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: the two calls that need one are written down instead."""
    calls: list[tuple] = []
    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append(("pinned",)) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: calls.append((*a, k)) or original(self, "cpu"))
    batches = Batches(Rows(), rows_per_step=4, device_rows=2, rank=1, world_size=2, device=torch.device("cuda", 3))
    ((inputs, targets),) = batches.of_step(1)
    assert calls == [("pinned",), (torch.device("cuda:3"), {"non_blocking": True})]
    assert torch.equal(torch.cat([inputs, targets[:, -1:]], 1), torch.from_numpy(Rows().take(6, 2).astype(np.int64)))
