"""Before a run that trains: can this machine do the work as fast as the recipe means it? Asked before anything is prepared or written.

Training has faster and slower ways to the same weights. On a laptop the slower one is welcome; on eight GPUs that are paid by the minute
it must never be taken unasked. So `--strict`, which everything sets that rents a machine, turns each of these into exit 10:

    what would be slow                                 with --strict               otherwise
    torch sees no GPU                                  refused                     the CPU trains
    fewer ranks than GPUs                              refused                     GPUs stay idle, and that is said
    the compiler is switched off in the environment    refused                     said
    attention on a slower kernel than asked for        refused but for --allow-fa2 said, with its cost
    less memory than checkpoints and warm-up take      refused                     said
    fp8 on a GPU without it                            refused                     refused
    fp8 that computes something else than fp32         refused                     refused    (by the ranks, before they train)

More ranks than GPUs cannot run at all. Whatever is accepted is printed before the first stage. The ranks choose by the same function
from the same facts, so what was printed is what they run on, and a kernel that there cannot be loaded, fails or is wrong is an error,
not another kernel.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from job.errors import PreflightError, UsageError
from job.machine import container
from job.machine.host import gpu_count, has_fast_bf16, memory_bytes
from job.plan.memory import host_memory
from job.plan.quote import make_plan
from job.recipe.config import Recipe
from job.recipe.derive import derive
from job.run.processes import python_environment
from model import kernels

if TYPE_CHECKING:
    import torch

    from model.config import GPTConfig
    from model.gpt import GPT

CUDA_NAMES = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100-80gb"}
"""what CUDA calls the GPUs that `job.plan.quote` knows"""
COMPILER_SWITCHES = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")


@dataclasses.dataclass(frozen=True)
class Machine:
    """The GPUs that torch sees: how many, and the first one's name and compute capability (None without a GPU)."""

    gpus: int = 0
    name: str = ""
    capability: tuple[int, int] | None = None


def this_machine() -> Machine:
    """Asked in a process of its own: a process that has touched a GPU keeps some of its memory until it ends."""
    if not gpu_count():
        return Machine()
    command = [sys.executable, "-m", "job.run.preflight"]
    asked = subprocess.run(command, env=python_environment(os.environ), capture_output=True, text=True, check=False)
    if asked.returncode:
        raise PreflightError(
            f"the GPUs cannot be used: {asked.stderr.strip().splitlines()[-1]}; check the driver with nvidia-smi"
        )
    found = json.loads(asked.stdout)
    return Machine(found["gpus"], found["name"], tuple(found["capability"]))


def machine_of(device: torch.device) -> Machine:
    """As a rank sees its own device."""
    import torch

    if device.type != "cuda":
        return Machine()
    return Machine(
        torch.cuda.device_count(), torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    )


def choose_kernels(
    recipe: Recipe,
    machine: Machine,
    ranks: int | None = None,
    *,
    strict: bool = False,
    allow_fa2: bool = False,
    prove_on: torch.device | None = None,
) -> dict[str, str]:
    """The attention kernel, put in place for this process, and fp8: what was chosen and why, in words. PreflightError as at the top.

    ranks: that train, for the price of a slower kernel; None where nothing is trained. prove_on: a rank's device, on which the kernel
    and, for training, the products in fp8 are compiled and compared first ("proof" says how well they agree).
    """
    proof = {}
    try:
        backend = kernels.choose_backend(
            recipe.train.attention,
            machine.capability,
            kernels.installed(),
            strict=strict,
            allow_fa2=allow_fa2,
            price="" if ranks is None else price_of(kernels.FA2_COST, recipe, machine, ranks),
        )
        kernels.activate(backend)
        if prove_on is not None:
            from model import attention

            attention.prove(backend, prove_on, gradients=ranks is not None)
        in_fp8 = kernels.require_fp8(machine.capability, machine.name) if recipe.train.fp8 else "off"
        if recipe.train.fp8 and ranks is not None and prove_on is not None:
            proof = {"proof": prove_fp8(recipe, prove_on)}
    except (kernels.BackendError, kernels.Fp8Error) as error:
        raise PreflightError(str(error)) from None
    return {"attention": backend.description, "fp8": in_fp8} | proof


def prove_fp8(recipe: Recipe, device: torch.device) -> str:
    """How well the products of the recipe's model agree with fp32 on `device`; Fp8Error where they do not."""
    import torch

    tokens = recipe.train.device_batch_size * recipe.model.seq_len
    model = layers_in_fp8(derive(recipe).config, tokens, recipe.model.generation)
    from model import fp8_proof  # torchao takes seconds to import: only where there is fp8

    proof = fp8_proof.prove(model, tokens, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the comparison took is of other sizes than training's
    return proof


def layers_in_fp8(config: GPTConfig, tokens: int, generation: str) -> GPT:
    """A model without its numbers, its large layers in fp8."""
    import torch

    from model import fp8
    from model.gpt import GPT

    with torch.device("meta"):
        model = GPT(config)
    fp8.apply(model, tokens, generation)
    return model


def price_of(share: float, recipe: Recipe, machine: Machine, ranks: int) -> str:
    """What `share` of the training's time comes to, in words; empty for a GPU whose speed nobody has published."""
    try:
        plan = make_plan(recipe, CUDA_NAMES[machine.name], ranks)
    except (KeyError, UsageError):
        return ""
    minutes = share * sum(plan.on_node.training) / 2
    hourly = plan.on_node.node.price
    return f"{minutes:.1f} minutes" + (
        "" if hourly is None else f" or ${minutes / 60 * hourly:.2f} of this run at ${hourly:g} an hour"
    )


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
    """What is worth knowing of this machine before it trains, one sentence each; PreflightError when it should not.

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
    said = [f"{here}: {machine.name}"]
    slow = []
    if ranks < machine.gpus:
        slow.append(f"{machine.gpus - ranks} of {here} would stay idle: give --ranks {machine.gpus}")
    off = [name for name in COMPILER_SWITCHES if environment.get(name, "0") not in ("", "0")]
    if off:
        slow.append(
            f"the compiler is switched off by {off[0]} in the environment, and steps would be several times slower: unset it"
        )
    needed, there = host_memory(derive(recipe).config, ranks).total, memory or memory_bytes()
    if needed > there:
        slow.append(
            f"checkpoints and the warm-up take {needed / 1e9:.1f} GB of this machine's memory on {ranks} ranks, and there are"
            f" {there / 1e9:.1f} GB: {container.memory_remedy()}"
        )
    if slow and strict:
        raise PreflightError(slow[0])
    kernels = choose_kernels(recipe, machine, ranks, strict=strict, allow_fa2=allow_fa2)
    return said + [f"warning: {sentence}" for sentence in slow] + [kernels["attention"], f"fp8: {kernels['fp8']}"]


def about_comm(recipe: Recipe, world_size: int, gpus: int | None = None) -> list[str]:
    """Which changed keys of [comm] do nothing here, and why; UsageError for one that cannot be. gpus: those that torch sees."""
    changed = [f.name for f in dataclasses.fields(recipe.comm) if getattr(recipe.comm, f.name) != f.default]
    gpus = gpu_count() if gpus is None else gpus
    on_gpus_only = ("high_priority", "sm_carveout")
    in_bf16 = recipe.train.dtype == "bf16" or (recipe.train.dtype == "auto" and (gpus > 0 or has_fast_bf16()))
    if "bf16" in changed and world_size > 1 and not in_bf16:
        raise UsageError(
            "comm.bf16=true cannot be used where training computes in fp32: ranks would read different weights; say -o train.dtype=bf16"
        )
    if world_size == 1:
        return [f"comm.{name} does nothing here: one rank sends nothing" for name in changed]
    return [f"comm.{name} does nothing here: there is no GPU" for name in changed if name in on_gpus_only and not gpus]


def _no_gpu() -> str:
    import torch

    reason = (
        "this is torch's CPU build"
        if torch.version.cuda is None
        else "check nvidia-smi, and that the container is given the GPUs"
    )
    return (
        f"--strict is set and torch sees no GPU here ({reason}): mend that, or leave --strict out to train on the CPU"
    )


if __name__ == "__main__":
    import torch

    print(json.dumps(dataclasses.asdict(machine_of(torch.device("cuda", 0)))))
