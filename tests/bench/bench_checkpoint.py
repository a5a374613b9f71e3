"""What a checkpoint costs training, and what a resume costs a start.

make bench, or: python -m pytest tests/bench/bench_checkpoint.py --override-ini "python_files=bench_*.py" --capture=no
"""

from __future__ import annotations

import io
import json
import multiprocessing
import signal
import socket
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from job.recipe.config import resolve
from job.recipe.derive import derive
from job.reporter import RankReporter
from job.store.attempt import newest_attempt, read_events
from job.train.checkpoint import Writer
from model.gpt import GPT
from model.optimizer import Optimizer

CHECKPOINTS = 4
RESTARTS = 3


class Silent(RankReporter):
    def send(self, message: dict[str, Any]) -> None:
        pass


def _rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    recipe = resolve("run6", overrides=["model.depth=8"])
    derived = derive(recipe)
    model = GPT(derived.config, compute_dtype=torch.bfloat16)
    model.init_weights(1)
    optimizer = Optimizer(model.groups(), derived.specs, dist.group.WORLD)
    context = SimpleNamespace(run=Path(folder), rank=rank, attempt=1, reporter=Silent(io.StringIO()))
    writer = Writer(optimizer, context, {}, rows_per_step=8)
    writer.finish()  # its buffers are made while training begins
    times = []
    for step in range(1, CHECKPOINTS + 1):
        dist.barrier()
        started = time.perf_counter()
        writer.save(step)
        stall = time.perf_counter() - started
        writer.finish()
        times.append((stall, time.perf_counter() - started))
    size = sum(b.numel() * b.element_size() for b in writer._buffers.values())
    (Path(folder) / f"{rank}.json").write_text(json.dumps({"times": times, "bytes": size}))
    dist.destroy_process_group()


def test_asynchronous_against_synchronous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0")))
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    measured = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    print(
        f"\n\nd8, 2 gloo ranks, {sum(m['bytes'] for m in measured) / 1e9:.2f} GB of state; "
        "the slower rank of each checkpoint"
    )
    print(f"{'checkpoint':>12} {'training waits':>16} {'written':>10} {'share':>8}")
    for number, both in enumerate(zip(*(m["times"] for m in measured), strict=True), 1):
        stall, whole = (max(column) for column in zip(*both, strict=True))
        print(f"{number:>12} {stall:>14.2f} s {whole:>8.2f} s {stall / whole:>8.1%}")


def first_step_after(speedrun: Any, out: Path) -> float:
    """Seconds from the start of the process to its first step; it is stopped by SIGTERM, with a checkpoint."""
    run = out / "runs" / "t"
    attempt = newest_attempt(run) + 1
    started = time.time()
    process = speedrun.start(speedrun.tiny("pretrain", out, "-o", "train.steps=100000"))
    while not (steps := [e for e in read_events(run) if e["attempt"] == attempt and e["kind"] == "train.step"]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    return steps[0]["t"] - started


def test_resume_against_cold_start(tmp_path: Path, speedrun: Any) -> None:
    speedrun(speedrun.tiny("pretrain", tmp_path / "warm"))
    cold, resumed = [], []
    for number in range(RESTARTS):
        out = tmp_path / str(number)
        out.mkdir()
        (out / "prepared").symlink_to(tmp_path / "warm" / "prepared")
        cold.append(first_step_after(speedrun, out))
        resumed.append(first_step_after(speedrun, out))
    print(f"\n\nfrom process start to the first step, medians of {RESTARTS}, interleaved")
    first, again = statistics.median(cold), statistics.median(resumed)
    print(f"cold {first:.2f} s, resumed {again:.2f} s: {again / first:.2f} times")
