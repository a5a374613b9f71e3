"""`speedrun doctor`: every check of job/run/examination.py and what preflight looks at, and with --deep whether the
machine computes correctly, and how fast.

    look      card, driver, versions, whether these are the lock's; GPUs, disk, bucket and network; attention, fp8
    --deep    on the first GPU: attention against the windowed SDPA, forward and backward milliseconds at the recipe's
              shapes; each fp8 layer shape's three products and the head's loss against fp32 (model/fp8_proof.py); a
              block with the recipe's levers against one without. Without a GPU the same at small sizes.

A machine that computes wrongly is refused always, one that a check finds slow unless that is accepted, one with a
slower kernel or without a GPU with --strict.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import torch

from job.errors import PreflightError, first_line
from job.machine import host
from job.machine.finding import Finding, refusal
from job.machine.stack import describe_stack, differences, lines
from job.recipe.config import Recipe
from job.recipe.derive import derive
from job.run import preflight
from job.train.kernels import choose_kernels, layers_in_fp8
from job.train.step_metrics import now, seconds_between
from model import attention
from model.config import GPTConfig
from model.kernels import Fp8Error

REPEATS = 11
"""timings of one thing"""


def look(
    recipe: Recipe,
    findings: list[Finding],
    *,
    ranks: int = 0,
    strict: bool,
    allow_fa2: bool,
    accept_slow: bool = False,
    deep: bool,
) -> dict[str, Any]:
    """`stack`, `differs` (from the lock), `checks` (the findings), `found` (sentences), `proofs` (rows), `refused` (a
    sentence or None)."""
    stack = describe_stack()
    bf16 = "with" if host.has_fast_bf16() else "without"
    found = [f"CPU: {host.cpu_name()}, {host.usable_cores()} usable cores, {bf16} bf16 instructions"]
    proofs: list[dict[str, Any]] = []
    refused = refusal(findings, accept_slow=accept_slow)
    try:
        here = preflight.this_machine()
        said = preflight.check(recipe, ranks or max(1, here.gpus), strict=strict, allow_fa2=allow_fa2, machine=here)
        found += said or ["no GPU that torch can use: the CPU would train"]
        if deep and not refused:
            _prove(recipe, here, proofs, strict=strict, allow_fa2=allow_fa2)
    except PreflightError as error:
        refused = refused or error
    return {
        "stack": stack,
        "differs": differences(stack),
        "deep": deep,
        "checks": [dataclasses.asdict(finding) for finding in findings],
        "found": found,
        "proofs": proofs,
        "refused": str(refused) if refused else None,
    }


def page(document: dict[str, Any]) -> str:
    """What was found, the proofs as a Markdown table, and that all is well where nothing is `refused`."""
    checks = [Finding(**check).line() for check in document["checks"]]
    text = [*lines(document["stack"]), *document["found"], *checks]
    if document["proofs"]:
        text += ["", "| proven | error | bound | ms |", "| --- | ---: | ---: | ---: |"]
        for row in document["proofs"]:
            error = "no number" if row["error"] is None else f"{row['error']:.4f}"
            text.append(f"| {row['what']} | {error} | {row['bound']:.4f} | {row['ms'] or ''} |")
    if not document["refused"]:
        shallow = "nothing stands against it; --deep computes and compares"
        text += ["", "what was computed agrees" if document["deep"] else shallow]
    return "\n".join(text)


def _prove(recipe: Recipe, here: host.Machine, rows: list[dict[str, Any]], *, strict: bool, allow_fa2: bool) -> None:
    """Fill `rows`; PreflightError for a kernel that fails or computes something else."""
    device = torch.device("cuda", 0) if here.gpus else torch.device("cpu")
    choose_kernels(recipe, here, None, strict=strict, allow_fa2=allow_fa2, prove_on=device)
    config, batch = derive(recipe).config, recipe.train.device_batch_size
    if not here.gpus:
        config, batch = GPTConfig.for_depth(2, 512, 128, recipe.model.generation, window_tile=32), 2
    for window in sorted(set(config.windows)):
        narrow = window < config.seq_len - 1  # in a row of the proof's length a real window would see everything
        try:
            error = attention.disagreement(device, 64 if narrow else attention.PROOF_LENGTH, gradients=True)
            forward, both = _attention_ms(config, window, batch, device)
        except Exception as failure:  # whatever it is, this kernel cannot be used here
            raise PreflightError(
                f"attention, window {window}, fails on this machine: {first_line(failure)}; take another machine"
            ) from failure
        rows.append(
            _row(f"attention, window {window}", error, attention.PROOF_BOUND, f"{forward:.2f} + {both - forward:.2f}")
        )
    if recipe.train.fp8:
        from model import fp8_levers_proof, fp8_proof  # torchao takes seconds to import

        tokens, generation, levers = batch * config.seq_len, recipe.model.generation, recipe.train.levers
        try:
            model = layers_in_fp8(config, tokens, generation)
            for name, agreements in fp8_proof.measurements(model, tokens, device):
                rows += [_row(f"{name}, {found.what}", found.error, found.bound) for found in agreements]
            if levers:
                agreements = fp8_levers_proof.prove(config, tokens, generation, levers, device)
                rows += [_row(found.what, found.error, found.bound) for found in agreements]
        except Fp8Error as error:
            raise PreflightError(str(error)) from None
    if wrong := next((row for row in rows if row["error"] is None or row["error"] > row["bound"]), None):
        found = "no number" if wrong["error"] is None else f"wrong by {wrong['error']:.1%}"
        raise PreflightError(
            f"{wrong['what']} is {found} where rounding explains {wrong['bound']:.1%}: take another machine"
        )


def _row(what: str, error: float, bound: float, ms: str | None = None) -> dict[str, Any]:
    """error: None for what is no number, which JSON has no other word for."""
    return {"what": what, "error": error if math.isfinite(error) else None, "bound": bound, "ms": ms}


def _attention_ms(config: GPTConfig, window: int, rows: int, device: torch.device) -> tuple[float, float]:
    """Medians of forward, and of forward and backward, of a micro-batch.

    All are queued before any is waited for: a GPU that waits for the host would count the host's time as the kernel's.
    """
    shape = (rows, config.seq_len, config.heads, config.head_dim)
    q, k, v, weight = (torch.randn(shape, device=device).bfloat16().requires_grad_() for _ in range(4))
    marks = []
    for _ in range(REPEATS + 2):  # the first two warm up
        began = now(device)
        out = attention.attention(q, k, v, window)
        middle = now(device)
        torch.autograd.grad(out, (q, k, v), weight.detach())
        marks.append((began, middle, now(device)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken = [(seconds_between(began, middle), seconds_between(began, ended)) for began, middle, ended in marks[2:]]
    forward, both = (1000 * statistics.median(each) for each in zip(*taken, strict=True))
    return forward, both
