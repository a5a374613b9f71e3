"""Pretraining: the loop, and nothing that hides it.

    rows --(Rows: order(epoch, i))--> batches --> loss --> gradients --> optimizer --> checkpoint

Row i of a run is the same row whatever the number of ranks: step s takes rows [s*R, (s+1)*R) with R = B/T rows per
step, split into micro-steps of `device_batch_size` rows per rank. The position is therefore one integer, the rows
consumed.

On a GPU a step is queued and not waited for: rows go there from pinned memory, nothing inside a step reads a number
back, and what the step measured is looked at some steps later (`job/train/step_metrics.py`), always before a
checkpoint. There the blocks, the loss and the update are compiled, which a warm-up on made-up rows gets over with. A
CPU runs the same code as it stands: smoke must need no compiler.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import gc
import os

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from job.data.prepare import Prepared
from job.data.rows import Rows
from job.errors import DivergedError, InterruptedRun, UsageError
from job.machine import host
from job.recipe.config import Recipe
from job.recipe.derive import Derived
from job.reporter import LONG
from job.store import checkpoint_folder
from job.train import checkpoint, compile_cache
from job.train.context import RankContext
from job.train.kernels import choose_kernels, machine_of
from job.train.replicas import check_replicas
from job.train.step_metrics import Reading, SlowRanks, StepMetrics
from job.train.validation import validate
from model import fp8
from model.gpt import GPT
from model.kernels import Fp8Error
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

    def __post_init__(self) -> None:
        belongs_to = checkpoint_folder.identity(self.recipe, self.prepared.id)
        keep = self.recipe.train.keep_optimizer
        keeps = keep == "yes" or (keep == "auto" and self.batches.device.type == "cpu")
        self.writer = checkpoint.Writer(
            self.optimizer,
            self.context,
            belongs_to,
            self.batches.rows_per_step,
            weights_only_at=None if keeps else self.derived.steps,
        )
        self.slow_ranks = SlowRanks()
        self.metrics = StepMetrics(self.batches.device, self.optimizer.flagged, functools.partial(record_step, self))


def train(run: Run) -> None:
    """Steps `run.step` ... N-1, checkpoints on the way and one at the end; InterruptedRun after a stop."""
    recipe, steps = run.recipe.train, run.derived.steps
    while run.step < steps:
        run.writer.check()
        signal = run.context.stop_signal.due(run.step)
        if signal != "go on":
            save(run)
        if signal == "stop":
            run.writer.finish()
            raise InterruptedRun(
                f"stopped before step {run.step} of {steps} with a checkpoint; the same command goes on"
            )
        take_step(run)
        if run.step < steps and due(run.step, recipe.val_every):
            record_validation(run)  # before the checkpoint, after which a run goes on with the next step
        if due(run.step, recipe.checkpoint_every):
            save(run)
    save(run)
    run.context.reporter.beat("writing the last checkpoint", long=True)
    run.writer.finish()


def take_step(run: Run) -> None:
    """One optimizer step. Nothing in it waits for a GPU."""
    run.metrics.begin_step()
    loss = accumulate_gradients(run)
    run.metrics.end_backward()
    hyper = run.derived.schedule.at(run.step)
    run.context.reporter.beat(f"the exchange of step {run.step}", waits=True)
    run.optimizer.step(hyper)
    signal = run.context.stop_signal.take()
    optimizer = run.optimizer
    run.metrics.end_step(run.step, loss, optimizer.nonfinite, optimizer.gradient_square, hyper.lr_mult, signal)
    run.step += 1


def save(run: Run) -> None:
    """Begin a checkpoint of steps that are all known to be sound, and the same on all ranks."""
    run.metrics.flush()
    if not run.writer.has(run.step):
        check_replicas(run.model, run.step, transport_dtype(run.recipe))
        run.writer.save(run.step)


def accumulate_gradients(run: Run) -> torch.Tensor:
    """This rank's mean loss of step `run.step` (0-d, nats per token); gradients are left in the parameters."""
    total = torch.zeros((), device=run.batches.device)
    micro_steps = run.batches.micro_steps
    for micro, (inputs, targets) in enumerate(run.batches.of_step(run.step)):
        run.context.reporter.beat(f"step {run.step}, micro-step {micro}")
        if micro == micro_steps - 1 and run.recipe.comm.overlap:
            run.optimizer.begin_overlap()
        loss = run.model.loss(inputs, targets) / micro_steps
        loss.backward()
        total += loss.detach()
    return total


def record_step(run: Run, reading: Reading) -> None:
    """Report a step; DivergedError when its loss or a gradient is not a number."""
    run.context.stop_signal.agreed(reading.signal, before=reading.step + run.metrics.lag + 1)
    if reading.diverged:
        where = f", not finite is the gradient of {reading.broken[0]}" if reading.broken else ""
        where += f" (and of {len(reading.broken) - 1} others)" if len(reading.broken) > 1 else ""
        raise DivergedError(
            f"training diverged at step {reading.step}: the loss is {reading.loss}{where}; {after_divergence(run)}"
        )
    if run.context.rank == 0:
        done, tokens = reading.step + 1, run.batches.rows_per_step * run.recipe.model.seq_len
        numbers = {"loss": reading.loss, "lr_mult": reading.lr_mult, "grad_norm": reading.gradient_norm}
        numbers |= {"ms": reading.seconds * 1000, "tokens": tokens}
        run.context.reporter.emit("train.step", step=reading.step, rows=done * run.batches.rows_per_step, **numbers)
        for kind, fields in run.slow_ranks.take(reading).items():
            run.context.reporter.emit(kind, step=reading.step, rows=done * run.batches.rows_per_step, **fields)
    elif run.context.local_rank == 0:  # of another node: its supervisor too must know how long a stop takes
        run.context.reporter.send({"step_seconds": reading.seconds})


def after_divergence(run: Run) -> str:
    """What to do: a fault of the machine passes, a learning rate that is too high stays."""
    anew = "lower train.lr_scale and start with --fresh"
    assert run.context.run
    if sealed := checkpoint_folder.folders(run.context.run):
        kept = f"from the checkpoint before step {int(sealed[0].name) // run.batches.rows_per_step}"
    elif run.context.local_world_size < run.context.world_size:  # several nodes seal in the bucket, which no rank asks
        kept = "from the last sealed checkpoint, if there is one"
    else:
        return anew
    enough = "which is enough after a fault of the machine"
    return f"the same command goes on {kept}, {enough}; where it diverges again, {anew}"


def record_validation(run: Run) -> None:
    measured = validate(run.model, run.prepared, run.recipe, run.context.reporter)
    if run.context.rank == 0:
        rows = run.step * run.batches.rows_per_step
        run.context.reporter.emit("train.val", step=run.step, rows=rows, **measured)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Batches:
    """The rows of each step as this rank's micro-batches of (inputs, targets), int64 (B, T), on the way to `device`."""

    def __init__(
        self, rows: Rows, *, rows_per_step: int, device_rows: int, rank: int, world_size: int, device: torch.device
    ) -> None:
        self._rows, self._rank, self._world_size = rows, rank, world_size
        self.device_rows, self.device = device_rows, device
        self.rows_per_step = rows_per_step
        self.micro_steps = rows_per_step // (device_rows * world_size)

    def of_step(self, step: int):
        for micro in range(self.micro_steps):
            start = step * self.rows_per_step + (micro * self._world_size + self._rank) * self.device_rows
            block = torch.from_numpy(self._rows.take(start, self.device_rows).astype(np.int64))
            if self.device.type == "cuda":  # of whatever index; from pinned memory a copy does not wait for the queue
                block = block.pin_memory()
            block = block.to(self.device, non_blocking=True)
            yield block[:, :-1], block[:, 1:]


def warm_up(run: Run) -> None:
    """Two steps on made-up rows, and a validation batch if training validates: compiles, and settles the launch order.

    Leaves no trace.
    """
    rows = torch.zeros(run.batches.device_rows, run.recipe.model.seq_len, dtype=torch.int64, device=run.batches.device)
    with run.optimizer.preserve_state():
        for _ in range(2):
            if run.recipe.comm.overlap:
                run.optimizer.begin_overlap()
            run.context.reporter.beat("compiling the forward and backward pass", long=True)
            run.model.loss(rows, rows).backward()
            run.context.reporter.beat("compiling the optimizer's step", long=True, waits=True)
            run.optimizer.step(run.derived.schedule.at(run.step))
    if 0 < run.recipe.train.val_every < run.derived.steps:
        run.context.reporter.beat("compiling the validation", long=True)
        run.model.token_losses(rows, rows)


def device_of(context: RankContext) -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", context.local_rank)
    torch.cuda.set_device(device)
    return device


def build(
    context: RankContext, recipe: Recipe, derived: Derived, prepared: Prepared, rows: Rows, device: torch.device
) -> Run:
    """The run at its first step, or at the newest checkpoint's."""
    train_config, on_gpu = recipe.train, device.type == "cuda"
    dtype = host.compute_dtype(train_config.dtype, gpu=on_gpu)
    batches = Batches(
        rows,
        rows_per_step=derived.rows_per_step,
        device_rows=train_config.device_batch_size,
        rank=context.rank,
        world_size=context.world_size,
        device=device,
    )
    with device:
        model = GPT(derived.config, compute_dtype=dtype)
    model.init_weights(train_config.seed)
    if train_config.fp8:
        use_fp8(model, recipe)
    if on_gpu:
        model.compile_blocks()
    group = dist.group.WORLD if context.world_size > 1 else None
    optimizer = Optimizer(
        model.groups(), derived.specs, group, polar_dtype=dtype, transport_dtype=transport_dtype(recipe), compile=on_gpu
    )
    step = checkpoint.resume(context.resume, model, optimizer) if context.resume else 0
    return Run(context, recipe, derived, prepared, model, optimizer, batches, step)


def transport_dtype(recipe: Recipe) -> torch.dtype | None:
    """What wider gradients and weights are sent as; None: as they are."""
    return torch.bfloat16 if recipe.comm.bf16 else None


def use_fp8(model: GPT, recipe: Recipe) -> None:
    """fp8 in the large layers; UsageError where the recipe's sizes do not allow it."""
    tokens = recipe.train.device_batch_size * recipe.model.seq_len
    try:
        fp8.apply(model, tokens, recipe.model.generation, recipe.train.levers)
    except Fp8Error as error:
        raise UsageError(str(error)) from None


def join_ranks(context: RankContext, recipe: Recipe, device: torch.device) -> None:
    """Form the group of ranks: over gloo on CPUs, over NCCL on GPUs, there as the recipe's `comm` says.

    NCCL's communicators are made here (`device_id`) and not in the first collective: what they lack shows at once. A
    collective's timeout lies above the supervisor's limit of silence (job/run/silence.py), which knows the rank that
    did not arrive, where NCCL would end one that waited for it.

    While a reduce-scatter runs beside the backward pass, each of NCCL's blocks holds a multiprocessor, and a matrix
    product of one block a multiprocessor (persistent, as cuBLAS's for Hopper are) needs a second wave for those that
    found none. The carve-out has cuBLASLt, which computes every fp8 product, plan for so many fewer: a hint to its
    heuristics and no partition, experimental in torch. (Products in bf16 follow it only where torch gives them to
    cuBLASLt as well, and FlashAttention 3 leaves as many free; other attention and compiled kernels do not.) The same
    number is the most blocks that NCCL may use. What either is worth has not been measured.
    """
    options, comm = None, recipe.comm
    if device.type == "cuda" and (comm.high_priority or comm.sm_carveout):
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=comm.high_priority)
        if comm.sm_carveout:
            options.config.max_ctas = comm.sm_carveout
            torch._C._set_sm_carveout_experimental(comm.sm_carveout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        rank=context.rank,
        world_size=context.world_size,
        pg_options=options,
        timeout=datetime.timedelta(seconds=2 * LONG * recipe.train.silence_seconds),
        device_id=device if device.type == "cuda" else None,
    )


def main(context: RankContext) -> None:
    """The pretrain stage of one rank."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    recipe, derived, prepared = context.load()
    device = device_of(context)
    if context.world_size > 1:
        join_ranks(context, recipe, device)
    kernels = choose_kernels(recipe, machine_of(device), context.world_size, prove_on=device)
    rows = Rows(prepared, recipe.data.seed, context.reporter if context.local_rank == 0 else None)
    run = build(context, recipe, derived, prepared, rows, device)
    if device.type == "cuda":
        with compile_cache.warming(context):
            warm_up(run)
    if dist.is_initialized():  # nothing is compiled any more
        _set_pg_timeout(datetime.timedelta(seconds=LONG * recipe.train.silence_seconds))
    gc.collect()
    gc.freeze()  # what is alive now stays: no later collection looks at it
    if context.rank == 0:
        announce(run, kernels)
    if context.local_rank == 0:
        context.reporter.send({"training": run.step, "steps_to_stop": 2 * run.metrics.lag + 2})
    train(run)
    if dist.is_initialized():  # not after a failure: with a collective in flight it would wait for ranks that are gone
        dist.destroy_process_group()


def announce(run: Run, kernels: dict[str, str]) -> None:
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
        device=str(run.batches.device),
        dtype=str(run.model.wte.weight.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        comm=dataclasses.asdict(run.recipe.comm),
        **kernels,
    )
