"""The GPUs that `speedrun plan` knows, by their data sheets, and the nodes they are rented in."""

from __future__ import annotations

import dataclasses

from job.errors import UsageError


@dataclasses.dataclass(frozen=True)
class GPU:
    """One card: dense FLOP/s (no sparsity), and the memory that a program can see of it."""

    name: str
    title: str
    memory: float
    """bytes"""
    bf16: float
    """FLOP/s of the bf16 matrix units"""
    fp8: float
    """FLOP/s of the fp8 matrix units; 0 = there are none"""
    bandwidth: float
    """bytes/s of the memory"""
    bus: float
    """bytes/s that a collective moves per GPU within a node"""
    nvlink: float
    """bytes/s of all its links, one way, as nvidia-smi counts them"""
    steady_bf16: float | None = None
    """FLOP/s that large bf16 products keep up, the least of what is published"""
    dollars: float | None = None
    """dollars an hour and GPU on demand, where a source is known"""
    spot: float | None = None
    """dollars an hour and GPU as spot or preemptible, where a source is known"""


# The H100's bus speed is assumed (a third of NVLink 4's 900 GB/s both ways); the others' go with NVLink's.
# What it keeps up: 650 to 750 TFLOP/s are published for 700 W; 660 to 780 by shape in LOG.md.
# Its prices: $24 an hour for eight is the leaderboard's own frame, $10 as spot the lowest seen in SkyPilot's catalogue.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("h100", "H100 SXM 80 GB", 85.5e9, 989e12, 1979e12, 3.35e12, 370e9, 478e9, 650e12, dollars=3.00, spot=1.25),
        GPU("h200", "H200 SXM 141 GB", 141e9, 989e12, 1979e12, 4.8e12, 370e9, 478e9, 650e12),
        GPU("a100-80gb", "A100 SXM 80 GB", 80e9, 312e12, 0.0, 2.04e12, 247e9, 300e9),
    )
}
CUDA_NAMES = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100-80gb"}
"""CUDA's names of them"""

PRICE_SOURCE = (
    "8xH100: $24/h is the leaderboard's own frame, $10/h spot the lowest in SkyPilot's catalogue (neither asked today)"
)
MOST_GPUS = 8  # one node


def find_gpu(name: str) -> GPU:
    """The GPU called `name`; UsageError naming the known ones."""
    if name.lower() not in GPUS:
        raise UsageError(f"--gpu {name} is not known; known are {', '.join(GPUS)}, and cpu for a plan without a GPU")
    return GPUS[name.lower()]


def check_count(gpus: int) -> int:
    """`gpus` itself; UsageError unless it is a number of GPUs in one node."""
    if not 1 <= gpus <= MOST_GPUS:
        raise UsageError(f"--gpus {gpus} cannot be planned: a run takes one node, give a number from 1 to {MOST_GPUS}")
    return gpus


def check_price(price: float, option: str = "--price") -> None:
    """UsageError unless `price`, given by `option`, is dollars an hour that somebody could ask."""
    if not 0 < price < 1e6:
        raise UsageError(
            f"{option} {price:g} cannot be used: give the whole node's price in dollars an hour, e.g. {option} 24"
        )
