"""Which attention kernel and matrix products a process computes with: chosen, priced, and proven on its device.

Torch is imported only to prove: a supervisor that says what its ranks will choose does without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.errors import PreflightError, UsageError
from job.machine.gpus import CUDA_NAMES
from job.machine.host import Machine
from job.plan.quote import make_plan
from job.recipe.config import Recipe
from job.recipe.derive import derive
from model import kernels

if TYPE_CHECKING:
    import torch

    from model.config import GPTConfig
    from model.gpt import GPT


def machine_of(device: torch.device) -> Machine:
    """As a rank sees its own device."""
    import torch

    if device.type != "cuda":
        return Machine()
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return Machine(torch.cuda.device_count(), name, capability)


def choose_kernels(
    recipe: Recipe,
    machine: Machine,
    ranks: int | None = None,
    *,
    strict: bool = False,
    allow_fa2: bool = False,
    prove_on: torch.device | None = None,
) -> dict[str, str]:
    """Activate the attention kernel in this process; the kernel and fp8 with the reason, in words. PreflightError if
    none.

    ranks: that train, for the price of a slower kernel; None where nothing is trained. prove_on: a rank's device, on
    which the kernel and, for training, the products in fp8 are compiled and compared first ("proof" says how well they
    agree).
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
            proof = {"proof": _prove_fp8(recipe, prove_on)}
    except (kernels.BackendError, kernels.Fp8Error) as error:
        raise PreflightError(str(error)) from None
    return {"attention": backend.description, "fp8": in_fp8} | proof


def _prove_fp8(recipe: Recipe, device: torch.device) -> str:
    """How well the model's products agree with fp32 on `device`, and levers with none; Fp8Error where they do not."""
    import torch

    from model import fp8_levers_proof, fp8_proof  # torchao takes seconds to import: only where there is fp8

    config, generation, levers = derive(recipe).config, recipe.model.generation, recipe.train.levers
    tokens = recipe.train.device_batch_size * recipe.model.seq_len
    proof = fp8_proof.prove(layers_in_fp8(config, tokens, generation), tokens, device)
    if levers:
        found = fp8_levers_proof.prove(config, tokens, generation, levers, device)
        worst = max(found, key=lambda each: each.error / each.bound)
        proof += f"; levers agree with none (at most {worst.words}: {worst.what})"
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the comparison's blocks have other sizes than training's
    return proof


def layers_in_fp8(config: GPTConfig, tokens: int, generation: str) -> GPT:
    """A model on the meta device, its large layers in fp8."""
    import torch

    from model import fp8
    from model.gpt import GPT

    with torch.device("meta"):
        model = GPT(config)
    fp8.apply(model, tokens, generation)
    return model


def price_of(share: float, recipe: Recipe, machine: Machine, ranks: int, price: float | None = None) -> str:
    """Minutes and dollars (by the node's `price` an hour) of `share` of the training's time; empty for a GPU whose
    speed nobody has published."""
    try:
        on_node = make_plan(recipe, CUDA_NAMES[machine.name], ranks, price).on_node
    except (KeyError, UsageError):
        return ""
    if on_node is None:
        return ""
    minutes, hourly = share * sum(on_node.training) / 2, on_node.node.price
    dollars = "" if hourly is None else f" or ${minutes / 60 * hourly:.2f} of this run at ${hourly:g} an hour"
    return f"{minutes:.1f} minutes{dollars}"
