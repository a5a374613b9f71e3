"""One rank's warm-up with the compiler, on a CPU, where the product compiles nothing: prints what it reports, then what
training gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from job.recipe.config import resolve
from job.recipe.derive import derive
from job.reporter import RankReporter
from job.train import compile_cache, loop
from job.train.context import RankContext, StopSignal
from model.optimizer import Optimizer

OVERRIDES = [
    "model.depth=1",
    "model.seq_len=32",
    "data.vocab_size=300",
    "train.device_batch_size=2",
    "train.dtype=fp32",
]
CPU = torch.device("cpu")


def main() -> None:
    torch.set_num_threads(1)
    recipe = resolve("smoke", overrides=OVERRIDES)
    derived = derive(recipe)
    reporter = RankReporter(sys.stdout)
    context = RankContext(Path(), None, Path(), 0, 1, reporter, StopSignal())
    run = loop.build(context, recipe, derived, SimpleNamespace(id="none"), None, CPU)
    run.model.compile_blocks()
    run.optimizer = Optimizer(run.model.groups(), derived.specs, polar_dtype=torch.float32, compile=True)
    with compile_cache.warming(context):
        loop.warm_up(run)
    rows = torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(3):
        loss = run.model.loss(rows[:, :-1], rows[:, 1:])
        loss.backward()
        run.optimizer.step(derived.schedule.at(step))
        losses.append(loss.item())
    print(json.dumps({"losses": losses}))


if __name__ == "__main__":
    main()
