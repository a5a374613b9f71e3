"""What each lever (`model/fp8_passes.py`) leaves out of a block of a d24, counted as `hopper.py` counts.

    python tests/model/hopper_levers.py                      prints the table, each row with one lever more
    python tests/model/hopper_levers.py fast frontier        prints the rows of these presets alone

GB are of a block, forward and backward, without and with value embedding. Launches are Triton's; those of an operator
of ours count among them. A micro-step has 12 blocks of each kind, and where weights are kept a share of their copies,
made once in MICRO_STEPS. The last column is run 6's step by the fitted model, its passes scaled by these bytes: an
estimate.
"""

from __future__ import annotations

import sys
from typing import Any

import hopper

MICRO_STEPS = 4
"""of run 6's optimizer step on eight GPUs"""
DEPTH = 24
HEAD = """\
| levers | GB without | GB with | launches | saved, bytes/(token x channel) | GB a micro-step | step, ms |
|---|---:|---:|---:|---:|---:|---:|
"""


def counted(levers: tuple[str, ...], counting: hopper.Counting) -> tuple[list[hopper.Graph], float]:
    """The four graphs of both kinds of block, and the bytes of a step's copies of all weights."""
    import torch

    import model.loss
    from model import fp8
    from model.attention import attention
    from model.config import GPTConfig
    from model.gpt import GPT

    torch._dynamo.reset()
    model.loss.fused.cache_clear()
    counting.graphs.clear()
    config = GPTConfig.for_depth(DEPTH, hopper.VOCAB, hopper.T)
    counting.width = config.width
    with torch.device("meta"):
        gpt = GPT(config, compute_dtype=torch.bfloat16)
        x, x0, value_embed = (
            torch.empty(hopper.ROWS, hopper.T, config.width, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        lambdas = torch.empty((), requires_grad=True), torch.empty((), requires_grad=True)
    fp8.apply(gpt, hopper.ROWS * hopper.T, levers=levers)
    gpt.compile_blocks()
    if gpt.before_loss:
        gpt.before_loss()
    copies = sum(graph.calls * graph.bytes for graph in counting.graphs)
    counting.graphs.clear()
    for layer, embedded in ((2, None), (1, value_embed)):
        cos_sin: Any = gpt._rotary.tables(hopper.T, x)
        out = gpt.blocks[layer](x, x0, lambdas, embedded, cos_sin, attention)
        out.backward(torch.empty_like(out))
    return counting.graphs, copies


def row(name: str, levers: tuple[str, ...], counting: hopper.Counting, plain: float | None) -> tuple[str, float]:
    """A row of the table, and the bytes of a micro-step; `plain`: those without levers."""
    from job.plan.published_runs import GPUS, RUNS
    from job.plan.steptime import REFERENCE, Fit, published_fit, step_seconds

    graphs, copies = counted(levers, counting)
    own = [graph.triton + sum(n for op, n in graph.other.items() if op.startswith("speedrun")) for graph in graphs]
    kinds = [(sum(g.bytes for g in graphs[i : i + 2]), sum(own[i : i + 2]), graphs[i + 1].saved) for i in (0, 2)]
    whole = DEPTH / 2 * sum(size for size, _, _ in kinds) + copies / MICRO_STEPS
    fit, run = published_fit(), next(run for run in RUNS if run.name == "Run 6")
    scaled = Fit(fit.flops, fit.passes * whole / (plain or whole), {})
    ms = 1000 * step_seconds(run.config, run.batch_tokens, REFERENCE, GPUS, run.fp8, scaled)
    (without, launches, saved), (with_one, more_launches, more_saved) = kinds
    numbers = f"{without / 1e9:.3f} | {with_one / 1e9:.3f} | {launches}, {more_launches} | {saved}, {more_saved}"
    return f"| {name} | {numbers} | {whole / 1e9:.1f} | {ms:.0f} |", whole


def main() -> None:
    hopper.with_triton()
    hopper.pretend()
    counting = hopper.Counting()
    counting.install()
    from job.recipe.config import resolve
    from model.config import LEVERS

    sets = {name: tuple(resolve(name).train.levers) for name in sys.argv[1:]}
    sets = sets or {f"and {LEVERS[i]}": LEVERS[: i + 1] for i in range(len(LEVERS))}
    text, plain = row("none", (), counting, None)
    print(HEAD + text, flush=True)
    for name, levers in sets.items():
        print(row(name, levers, counting, plain)[0], flush=True)


if __name__ == "__main__":
    main()
