"""Pretraining: the loop, and nothing that hides it.

    rows --(Rows: order(epoch, i))--> batches --> loss --> gradients --> optimizer --> checkpoint

Row i of a run is the same row whatever the number of ranks: step s takes rows [s*R, (s+1)*R) with R = B/T rows per step, split
into micro-steps of `device_batch_size` rows per rank. The position is therefore one integer, the rows consumed.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist

from job import checkpoint, machine
from job.config import Recipe
from job.data.prepare import Prepared
from job.data.rows import Rows
from job.derive import Derived
from job.errors import DivergedError, InterruptedRun
from job.worker import RankContext
from model.gpt import GPT
from model.optimizer import Optimizer


@dataclasses.dataclass
class Run:
    """Everything the loop works on."""

    context: RankContext
    recipe: Recipe
    derived: Derived
    prepared: Prepared
    model: GPT
    optimizer: Optimizer
    batches: Batches
    step: int = 0


def train(run: Run) -> None:
    """Steps `run.step` ... N-1. Seals checkpoints on the way and one at the end; InterruptedRun after a stop."""
    recipe, steps = run.recipe.train, run.derived.steps
    while run.step < steps:
        if run.context.borders.reached(run.step):
            checkpoint.save(run)
            raise InterruptedRun(f"stopped before step {run.step} of {steps} with a checkpoint; the same command goes on")
        started = time.perf_counter()
        loss = accumulate_gradients(run)
        hyper = run.derived.schedule.at(run.step)
        run.optimizer.step(hyper)
        run.step += 1
        record_step(run, loss, hyper.lr_mult, time.perf_counter() - started)
        if run.step == steps or due(run.step, recipe.checkpoint_every):
            checkpoint.save(run)
        if run.step < steps and due(run.step, recipe.val_every):
            record_validation(run)


def accumulate_gradients(run: Run) -> torch.Tensor:
    """Mean loss (0-d, nats per token) of step `run.step` over all ranks; gradients are left in the parameters."""
    total = torch.zeros(())
    micro_steps = run.batches.micro_steps
    for micro, (inputs, targets) in enumerate(run.batches.of_step(run.step)):
        if micro == micro_steps - 1:
            run.optimizer.arm()
        loss = run.model.loss(inputs, targets) / micro_steps
        loss.backward()
        total += loss.detach()
    if run.context.world_size > 1:
        dist.all_reduce(total)
        total /= run.context.world_size
    return total


def record_step(run: Run, loss: torch.Tensor, lr_mult: float, seconds: float) -> None:
    """Report the step that just ended; DivergedError when its loss is not a number."""
    step, nats = run.step - 1, loss.item()
    if not math.isfinite(nats):
        broken = [name for name, bad in zip(run.optimizer.flagged, run.optimizer.nonfinite.tolist(), strict=True) if bad]
        where = f", first in the gradient of {broken[0]}" if broken else ""
        raise DivergedError(
            f"training diverged at step {step}: the loss is {nats}{where}; lower train.lr_scale and start with --fresh"
        )
    if run.context.rank == 0:
        tokens = run.batches.rows_per_step * run.recipe.model.seq_len
        rows = run.step * run.batches.rows_per_step
        run.context.reporter.emit("train.step", step=step, rows=rows, loss=nats, lr_mult=lr_mult, ms=seconds * 1000, tokens=tokens)
        run.context.reporter.progress("pretrain", run.step * tokens, run.derived.steps * tokens, "tokens")


def record_validation(run: Run) -> None:
    measured = validate(run.model, run.prepared, run.recipe)
    if run.context.rank == 0:
        rows = run.step * run.batches.rows_per_step
        run.context.reporter.emit("train.val", step=run.step, rows=rows, **measured)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Batches:
    """The rows of each step as this rank's micro-batches of (inputs, targets), int64 (B, T)."""

    def __init__(self, rows: Rows, *, rows_per_step: int, device_rows: int, rank: int, world_size: int) -> None:
        self._rows, self._rank, self._world_size = rows, rank, world_size
        self._device_rows = device_rows
        self.rows_per_step = rows_per_step
        self.micro_steps = rows_per_step // (device_rows * world_size)

    def of_step(self, step: int):
        for micro in range(self.micro_steps):
            start = step * self.rows_per_step + (micro * self._world_size + self._rank) * self._device_rows
            block = torch.from_numpy(self._rows.take(start, self._device_rows).astype(np.int64))
            yield block[:, :-1], block[:, 1:]


def validation_rows(prepared: Prepared, recipe: Recipe) -> np.ndarray:
    """The first rows of the held-out set, `val_tokens` of them or all there are: (n, T+1) uint16."""
    return prepared.val[: max(1, recipe.train.val_tokens // recipe.model.seq_len)]


def validate(model: GPT, prepared: Prepared, recipe: Recipe) -> dict[str, float]:
    """Bits per byte of the held-out rows: sum of nats over (ln 2 x bytes), special tokens left out (leaderboard §8).

    Returns {"bpb", "nats", "bytes", "tokens"}; the same number on every rank.
    """
    rows = validation_rows(prepared, recipe)
    token_bytes = torch.from_numpy(prepared.tokenizer.token_bytes.astype(np.int64))
    nats, n_bytes, tokens = 0.0, 0, 0
    for start in range(0, len(rows), recipe.train.device_batch_size):
        block = torch.from_numpy(rows[start : start + recipe.train.device_batch_size].astype(np.int64))
        nll, _ = model.token_losses(block[:, :-1], block[:, 1:])
        counted = token_bytes[block[:, 1:]]
        nats += (nll.double() * (counted > 0)).sum().item()
        n_bytes += counted.sum().item()
        tokens += block[:, 1:].numel()
    return {"bpb": nats / (np.log(2) * n_bytes), "nats": nats, "bytes": n_bytes, "tokens": tokens}


def build(context: RankContext, recipe: Recipe, derived: Derived, prepared: Prepared) -> Run:
    """The run at its first step, or at the newest checkpoint's."""
    train_config = recipe.train
    dtype = machine.compute_dtype(train_config.dtype)
    batches = Batches(
        Rows(prepared, seed=recipe.data.seed),
        rows_per_step=derived.rows_per_step,
        device_rows=train_config.device_batch_size,
        rank=context.rank,
        world_size=context.world_size,
    )
    model = GPT(derived.config, compute_dtype=dtype)
    model.init_weights(train_config.seed)
    group = dist.group.WORLD if context.world_size > 1 else None
    optimizer = Optimizer(model.groups(), derived.specs, group, polar_dtype=dtype)
    run = Run(context, recipe, derived, prepared, model, optimizer, batches)
    checkpoint.resume(run)
    return run


def main(context: RankContext) -> None:
    """The pretrain stage of one rank."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    recipe, derived, prepared = context.load()
    if context.world_size > 1:
        dist.init_process_group("gloo", rank=context.rank, world_size=context.world_size)
    try:
        run = build(context, recipe, derived, prepared)
        context.borders.start_from(run.step)
        if context.rank == 0:
            announce(run)
        train(run)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def announce(run: Run) -> None:
    derived = run.derived
    run.context.reporter.emit(
        "train.start",
        step=run.step,
        rows=run.step * run.batches.rows_per_step,
        steps=derived.steps,
        batch_rows=run.batches.rows_per_step,
        params=derived.scaling.total_parameters.value,
        flops_per_token=derived.scaling.flops_per_token.value,
        world_size=run.context.world_size,
        device="cpu",
        dtype=str(run.model.wte.weight.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )
