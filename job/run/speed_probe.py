"""How fast each GPU multiplies and all of them exchange, in some ten seconds: a process a GPU, as training has.

    speeds(8)  ->  {"matmul": [FLOP/s by rank], "all_reduce": [bytes/s by rank]}

All multiply at once, so that they also share the node's power and cooling. On a CPU (gloo) the same at small sizes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from job.errors import PreflightError
from job.run.processes import environment_for, free_port, python_environment

if TYPE_CHECKING:
    import torch

SECONDS = 90.0
"""that the whole probe may take: eight processes load torch and CUDA from a disk that nobody has read yet"""
WIDTH = {"cuda": 8192, "cpu": 512}
DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
PRODUCTS = {"cuda": 200, "cpu": 2}
"""that are timed as one"""
ELEMENTS = {"cuda": 1 << 29, "cpu": 1 << 18}
"""that an all-reduce adds up"""
REPEATS = 7


def speeds(ranks: int) -> dict[str, list[float]]:
    """By rank of this machine; one rank alone reduces nothing. PreflightError says what a process died of, or that it
    took too long."""
    shared = {
        **python_environment(environment_for("probe", os.environ)),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    end = time.monotonic() + SECONDS
    with contextlib.ExitStack() as stack:
        started = []
        for rank in range(ranks):
            said, errors = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            command = [sys.executable, "-m", "job.run.speed_probe"]
            process = subprocess.Popen(command, env=shared | {"RANK": str(rank)}, stdout=said, stderr=errors)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append((process, said, errors))
        while any(process.poll() is None for process, *_ in started):
            failed = any(process.poll() for process, *_ in started)
            if failed or time.monotonic() > end:
                break
            time.sleep(0.05)
        for rank, (process, _, errors) in enumerate(started):
            if process.poll():
                errors.seek(0)
                raise PreflightError(f"rank {rank}: {(errors.read().strip().splitlines() or ['nothing said'])[-1]}")
        if silent := [rank for rank, (process, *_) in enumerate(started) if process.poll() is None]:
            raise PreflightError(f"rank {silent[0]}: no answer within {SECONDS:.0f} s")
        said = started[0][1]
        said.seek(0)
        return json.loads(said.read())


def measure(rank: int, ranks: int) -> dict[str, list[float]] | None:
    """One rank's part; what all found on the first one."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=SECONDS),
            device_id=device if on_gpu else None,
        )
        dist.barrier()
    mine = matmul(device), all_reduce(device, ranks) if ranks > 1 else 0.0
    found = [mine] * ranks
    if ranks > 1:
        dist.all_gather_object(found, mine)
        dist.destroy_process_group()
    products, reduced = zip(*found, strict=True)
    return {"matmul": [*products], "all_reduce": [*reduced] if ranks > 1 else []} if rank == 0 else None


def matmul(device: torch.device) -> float:
    """FLOP/s of square products, bf16 on a GPU: of numbers that vary, since zeros take less power."""
    import torch

    width, products = WIDTH[device.type], PRODUCTS[device.type]
    a, b = (torch.randn(width, width, device=device, dtype=getattr(torch, DTYPE[device.type])) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    return 2 * width**3 * products / _median_seconds(device, multiply)


def all_reduce(device: torch.device, ranks: int) -> float:
    """Bytes/s of the bus, as nccl-tests counts it: 2 (n - 1) / n times the bytes."""
    import torch
    import torch.distributed as dist

    data = torch.zeros(ELEMENTS[device.type], device=device, dtype=getattr(torch, DTYPE[device.type]))
    seconds = _median_seconds(device, lambda: dist.all_reduce(data))
    return 2 * (ranks - 1) / ranks * data.numel() * data.element_size() / seconds


def _median_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Of REPEATS times, all queued before any is waited for, after one that warms up."""
    import torch

    from job.train.step_metrics import now, seconds_between

    work()
    marks = [now(device)]
    for _ in range(REPEATS):
        work()
        marks.append(now(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return statistics.median(seconds_between(*each) for each in itertools.pairwise(marks))


if __name__ == "__main__":
    found = measure(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if found:
        print(json.dumps(found))
