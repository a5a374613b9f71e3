"""What a measurement was made on: card, driver, versions, revision, and whether the versions are the CUDA lock's.

Nothing but the standard library and torch: measurements are also made where no other package is installed.
"""

from __future__ import annotations

from typing import Any

import torch

from job.machine.host import driver, revision, versions

LOCKED = {"torch": "2.13.0", "triton": "3.7.1", "torchao": "0.18.0", "flash-attn-4": "4.0.0b12"}
"""what requirements-cuda.lock pins of the packages that compute"""


def describe_stack() -> dict[str, Any]:
    """gpu, driver, cuda, python, revision, and the versions of LOCKED's packages; None for what is not there."""
    on_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name(0) if on_gpu else None,
        "gpus": torch.cuda.device_count(),
        "driver": driver() if on_gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        **dict.fromkeys(LOCKED),
        **versions(*LOCKED),
        "torch": torch.__version__,  # which names its CUDA, where the package's own does not
        "revision": revision(),
    }


def differences(stack: dict[str, Any]) -> list[str]:
    """What of `stack` is not as locked, e.g. "torch 2.11.0 instead of 2.13.0"; without a GPU, of what a CPU needs."""
    wanted = LOCKED if stack["gpu"] else {name: LOCKED[name] for name in ("torch", "torchao")}
    found = {name: (stack[name] or "missing").partition("+")[0] for name in wanted}
    return [f"{name} {found[name]} instead of {version}" for name, version in wanted.items() if found[name] != version]


def lines(stack: dict[str, Any]) -> list[str]:
    """For people: the card, the versions, and whether a pass here says something of the image."""
    driver = f", driver {stack['driver']}" if stack["driver"] else ""
    card = f"{stack['gpus']} x {stack['gpu']}{driver}" if stack["gpu"] else "none, the CPU computes"
    versions = ", ".join(f"{name} {stack[name]}" for name in (*LOCKED, "cuda", "cudnn", "python") if stack[name])
    other = differences(stack)
    verdict = (
        f"not the lock's ({', '.join(other)}): a pass here is none of the image's" if other else "the lock's versions"
    )
    return [f"card: {card}", f"stack: {versions}; {verdict}", f"revision: {stack['revision'] or 'unknown'}"]
