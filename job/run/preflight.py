"""Before a run that trains: can this machine do the work as fast as the recipe means it?

Training has faster and slower ways to the same weights. On a laptop the slower one is welcome; on eight GPUs that are
paid by the minute it must never be taken unasked. So `--strict`, which everything sets that rents a machine, turns each
of these into exit 10:

    slower                                             with --strict               otherwise
    torch sees no GPU                                  refused                     the CPU trains
    fewer ranks than GPUs                              refused                     GPUs stay idle, and that is said
    the compiler is switched off in the environment    refused                     said
    attention on a slower kernel than asked for        refused but for --allow-fa2 said, with its cost
    less memory than checkpoints and warm-up take      refused                     said
    fp8 on a GPU without it                            refused                     refused
    fp8 that computes something else than fp32         refused                     refused    (by the ranks)

More ranks than GPUs cannot run at all. Accepted choices are printed before the first stage. The ranks choose by the
same function from the same facts, so that they run on what was printed, and a kernel that cannot be loaded there, fails
or is wrong is an error, not another kernel.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping

from job.errors import PreflightError, UsageError
from job.machine import container
from job.machine.host import Machine, computes_in_bf16, driver, gpu_count, memory_bytes, revision
from job.plan.measured import has_passed
from job.plan.memory import host_memory
from job.recipe.config import Recipe
from job.recipe.derive import derive
from job.run.processes import environment_for, python_environment
from job.store.stores import Store
from job.train.kernels import choose_kernels, machine_of

COMPAT = "/opt/cuda-compat"
"""where the image has CUDA's forward-compatibility libraries, if it has any"""
CUDA_13_DRIVER = 580
"""the oldest driver that CUDA 13 works with by itself"""
ANSWER_SECONDS = 180.0
"""that torch has to say what GPUs there are: it may be loaded from a disk that nobody has read yet"""
COMPILER_SWITCHES = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")


def this_machine() -> Machine:
    """Asked in a process of its own: a process that has touched a GPU keeps some of its memory until it ends."""
    if not gpu_count():
        return Machine()
    command, environment = [sys.executable, "-m", "job.run.preflight"], environment_for("probe", os.environ)
    refused = "the GPUs cannot be used: {}; check the driver with nvidia-smi"
    try:
        asked = subprocess.run(
            command, env=python_environment(environment), capture_output=True, text=True, timeout=ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise PreflightError(refused.format(f"no answer within {ANSWER_SECONDS:.0f} s")) from None
    if asked.returncode:
        said = asked.stderr.strip().splitlines() or [f"torch ended with {asked.returncode} and said nothing"]
        raise PreflightError(refused.format(said[-1]))
    found = json.loads(asked.stdout)
    return Machine(found["gpus"], found["name"], tuple(found["capability"]))


def check(
    recipe: Recipe,
    ranks: int,
    *,
    strict: bool,
    allow_fa2: bool,
    machine: Machine | None = None,
    memory: float | None = None,
    environment: Mapping[str, str] = os.environ,
) -> list[str]:
    """Facts of this machine to print before it trains, one sentence each; PreflightError when it should not train.

    machine, memory (bytes): this one's unless given.
    """
    machine = machine or this_machine()
    if not machine.gpus:
        if strict:
            raise PreflightError(_no_gpu())
        choose_kernels(recipe, machine, ranks)
        return []
    here = f"{machine.gpus} GPU{'s' * (machine.gpus > 1)}"
    if ranks > machine.gpus:
        raise PreflightError(f"--ranks {ranks} needs as many GPUs and torch sees {here}: give --ranks {machine.gpus}")
    slow = []
    if ranks < machine.gpus:
        slow.append(f"{machine.gpus - ranks} of {here} would stay idle: give --ranks {machine.gpus}")
    off = [name for name in COMPILER_SWITCHES if environment.get(name, "0") not in ("", "0")]
    if off:
        slow.append(
            f"the compiler is switched off by {off[0]} in the environment, and steps would be several times slower:"
            " unset it"
        )
    needed, there = host_memory(derive(recipe).config, ranks).total, memory or memory_bytes()
    if needed > there:
        slow.append(
            f"checkpoints and the warm-up take {needed / 1e9:.1f} GB of this machine's memory on {ranks} ranks, and"
            f" there are {there / 1e9:.1f} GB: {container.memory_remedy()}"
        )
    if slow and strict:
        raise PreflightError(slow[0])
    kernels = choose_kernels(recipe, machine, ranks, strict=strict, allow_fa2=allow_fa2)
    warnings = [f"warning: {sentence}" for sentence in slow]
    return [
        f"{here}: {machine.name}",
        *about_driver(environment),
        *warnings,
        kernels["attention"],
        f"fp8: {kernels['fp8']}",
    ]


def about_driver(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The driver, and whether CUDA's forward-compatibility libraries come before it (docker/speedrun); nothing where
    there is none."""
    if (version := driver()) is None:
        return []
    too_old = ", too old for CUDA 13: its forward-compatibility libraries are used"
    return [f"driver {version}" + too_old * uses_compat(environment)]


def uses_compat(environment: Mapping[str, str]) -> bool:
    """Whether CUDA's forward-compatibility libraries come before the driver's."""
    return COMPAT in environment.get("LD_LIBRARY_PATH", "").split(":")


def about_comm(recipe: Recipe, world_size: int, gpus: int | None = None) -> list[str]:
    """Which changed keys of [comm] do nothing here, and why; UsageError for one that cannot be. gpus: torch's count."""
    changed = [f.name for f in dataclasses.fields(recipe.comm) if getattr(recipe.comm, f.name) != f.default]
    if world_size == 1 or not changed:
        return [f"comm.{name} does nothing here: one rank sends nothing" for name in changed]
    gpus = gpu_count() if gpus is None else gpus
    if "bf16" in changed and not computes_in_bf16(recipe.train.dtype, gpu=gpus > 0):
        raise UsageError(
            "comm.bf16=true cannot be used where training computes in fp32: ranks would read different weights; say"
            " -o train.dtype=bf16"
        )
    only_on_gpus = {"high_priority", "sm_carveout"} if not gpus else set()
    return [f"comm.{name} does nothing here: there is no GPU" for name in changed if name in only_on_gpus]


def about_try8(store: Store, machine: Machine) -> list[str]:
    """A warning where `store` holds no passed `speedrun try8` of this image on such GPUs."""
    if has_passed(store, revision(), machine.name):
        return []
    return [
        f"warning: {store.url} has no passed trial of this image ({revision() or 'unknown'}) on {machine.name}:"
        " sky/try8.yaml finds in ten minutes what may end this run"
    ]


def _no_gpu() -> str:
    import torch

    reason = "this is torch's CPU build"
    if torch.version.cuda is not None:
        version = driver()
        reason = "check nvidia-smi, and that the container is given the GPUs"
        if version and torch.version.cuda.startswith("13.") and int(version.partition(".")[0]) < CUDA_13_DRIVER:
            reason = (
                f"driver {version} is older than the {CUDA_13_DRIVER} of CUDA {torch.version.cuda}: take a host with a"
                " newer one, or an image built with COMPAT=DIR (Makefile)"
            )
    return (
        f"--strict is set and torch sees no GPU here ({reason}): mend that, or leave --strict out to train on the CPU"
    )


if __name__ == "__main__":
    import torch

    print(json.dumps(dataclasses.asdict(machine_of(torch.device("cuda", 0)))))
