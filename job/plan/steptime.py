"""How long an optimizer step takes, from the published runs: two fitted numbers, the rest from shapes and data sheets.

    step = tokens/GPU x (F / E  +  P x 2 d L / bandwidth)  +  moved / bus  +  polar / (0.6 x bf16 peak)

F is the leaderboard's FLOPs per token. E is what the matrix units reach, in F's own units. The second term is
everything that is bound by memory: norms, rotary, quantising, residuals; 2 d bytes is one pass over a token's bf16
residual stream, and P is how many passes a layer costs, forward and backward. The last two terms are the optimizer,
which no published run overlaps with the backward pass: a reduce-scatter and an all-gather of all weights, and Muon's
orthogonalisation on the rank that owns most matrices. They are not fitted; for a d26 they give 35.7 ms, and the
difference of two published runs says 35.4 ms.

E and P are fitted to the fp8 runs (least squares of relative errors) each time: the data are eight lines. The error
that counts is that of a run which was left out of the fit; `Fit.errors` has it for each. Other GPUs: E goes with their
bf16 peak, P's term with their memory bandwidth, the bus with NVLink's. bf16 instead of fp8: the step without the
optimizer takes 740/630 times as long, as published for a d26. The device batch is not in it: 32 instead of 16 rows
brought about 1 % where it was tried.

Levers (`train.levers`) scale P by the bytes of a micro-step's blocks that they leave out, counted by lowering a d24 for
an H100 (LEFT_OUT_GB): an estimate on top of the fit, since no lever was timed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection

import numpy as np

from job.machine.gpus import GPU, GPUS
from job.plan.memory import BF16, FP32, muon_stacks, shards
from job.plan.published_runs import GPUS as RANKS
from job.plan.published_runs import RUNS, Run
from model.config import GPTConfig
from model.kernels import BF16_TIME
from model.scaling import flops_per_token

POLAR_ITERATIONS = 5
POLAR_EFFICIENCY = 0.6
"""of the bf16 peak, assumed"""
BLOCK_GB = 366.0
"""what the blocks of a d24 move in a micro-step of 16 x 2048 tokens in fp8, 10^9 bytes without levers: counted"""
LEFT_OUT_GB = {
    "shared_input": 15.8,
    "kept_weights": 7.8,
    "norm_output": 4.8,
    "kept_columns": 0.0,
    "joint_qkv": 10.5,
    "relu_root": 9.7,
    "wide_gradients": 2.7,
    "bounded_scales": 32.4,
}
"""of these, by each lever on top of those before it, weights copied once in four micro-steps: counted (`python
tests/model/hopper_levers.py`)"""
REFERENCE = GPUS["h100"]
"""what the published runs ran on"""
BEYOND = 0.15
"""relative error assumed where the fit is carried to another GPU, or to a depth outside the published ones"""


@dataclasses.dataclass(frozen=True)
class Fit:
    """The two numbers, and the relative error of each run's step when it was left out of the fit."""

    flops: float
    """E, FLOP/s of one H100 in fp8"""
    passes: float
    """P, passes over the residual stream a layer"""
    errors: dict[str, float]

    @property
    def worst(self) -> float:
        return max(abs(error) for error in self.errors.values())


def optimizer_seconds(config: GPTConfig, gpu: GPU, ranks: int) -> float:
    """The part of a step that no micro-step hides: transport of gradients and weights, Muon on the busiest rank."""
    matrices = sum(FP32 * ranks * stack.slots(ranks) * stack.parameters[0].size for stack in muon_stacks(config))
    full = matrices + sum(
        p.size * p.dtype for shard in shards(config) if shard.kind == "rows" for p in shard.parameters
    )
    moved = 2 * full * (ranks - 1) / ranks
    return moved / gpu.bus + polar_flops(config, ranks) / (POLAR_EFFICIENCY * gpu.bf16)


def polar_flops(config: GPTConfig, ranks: int) -> int:
    """Polar Express on the rank that owns most: a, A = X X^T, A A, A X, for every matrix m <= n: 4 m^2 n + 2 m^3 an
    iteration."""
    total = 0
    for stack in muon_stacks(config):
        m, n = sorted(stack.parameters[0].shape)
        total += stack.slots(ranks) * POLAR_ITERATIONS * (4 * m * m * n + 2 * m**3)
    return total


def block_gigabytes(levers: Collection[str]) -> float:
    """What a d24's blocks move in a micro-step with `levers`, 10^9 bytes; without one on which another builds, near
    it."""
    return BLOCK_GB - sum(LEFT_OUT_GB[lever] for lever in levers)


def step_seconds(
    config: GPTConfig,
    batch_tokens: int,
    gpu: GPU,
    ranks: int,
    fp8: bool,
    fit: Fit | None = None,
    levers: Collection[str] = (),
) -> float:
    """One optimizer step of `batch_tokens` tokens on `ranks` GPUs, seconds; an estimate, see `Fit.worst`."""
    tokens = batch_tokens / ranks
    return tokens * token_seconds(config, gpu, fp8, fit, levers) + optimizer_seconds(config, gpu, ranks)


def token_seconds(
    config: GPTConfig, gpu: GPU, fp8: bool, fit: Fit | None = None, levers: Collection[str] = ()
) -> float:
    """Forward and backward of one token on one GPU."""
    fit = fit or published_fit()
    compute = flops_per_token(config) / (fit.flops * gpu.bf16 / REFERENCE.bf16)
    passes = fit.passes * block_gigabytes(levers if fp8 else ()) / BLOCK_GB
    memory = passes * _stream_bytes(config) / gpu.bandwidth
    return (compute + memory) * (1.0 if fp8 else BF16_TIME)


def _stream_bytes(config: GPTConfig) -> int:
    return BF16 * config.width * config.depth


def expected_error(config: GPTConfig, gpu: GPU) -> float:
    """Relative error to expect of `step_seconds`."""
    depths = [run.depth for run in RUNS]
    within = gpu is REFERENCE and min(depths) <= config.depth <= max(depths)
    return published_fit().worst if within else BEYOND


@functools.cache
def published_fit() -> Fit:
    """Fitted to every published fp8 run, with each run's error when the others alone are fitted."""
    runs = [run for run in RUNS if run.fp8]
    errors = {}
    for run in runs:
        others = Fit(*_solve([other for other in runs if other is not run]), errors={})
        errors[run.name] = predicted_step(run, others) / run.step_seconds - 1
    return Fit(*_solve(runs), errors=errors)


def predicted_step(run: Run, fit: Fit) -> float:
    """Seconds of one of `run`'s steps."""
    return step_seconds(run.config, run.batch_tokens, REFERENCE, RANKS, run.fp8, fit)


def _solve(runs: list[Run]) -> tuple[float, float]:
    """(E, P) with the least relative error over `runs`."""
    rows, rest, speeds = [], [], np.array([REFERENCE.bf16, REFERENCE.bandwidth])
    for run in runs:
        work = run.batch_tokens / RANKS * np.array([flops_per_token(run.config), _stream_bytes(run.config)])
        rows.append(work / speeds / run.step_seconds)
        rest.append(1 - optimizer_seconds(run.config, REFERENCE, RANKS) / run.step_seconds)
    (inverse, passes), *_ = np.linalg.lstsq(np.array(rows), np.array(rest), rcond=None)
    return REFERENCE.bf16 / float(inverse), float(passes)
