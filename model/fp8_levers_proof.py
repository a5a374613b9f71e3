"""Whether a block with levers (`model/fp8_passes.py`) computes what it computes without them, asked before training.

`model/fp8_proof.py` compares torchao's layers with fp32. Here one block with a value embedding, levers in it and
compiled as trained on a GPU, is compared with the same block in fp8 without levers and not compiled: its attention
alone (what the MLP adds is zero), then its MLP alone, output and gradients. Weights change in between, so that copies
which should have followed show. The inputs are small beside what a block adds: an error is not diluted by the residual
stream.

**Bounds.** Both sides round, independently at worst, so that roundings on the way to a result add in squares, and
twice. A product of two e4m3 operands is off by p = 5.1 %, one with a gradient in e5m2 by g = 8.1 % (`fp8_proof`);
relu squared doubles p. Logits of the standard deviation s = qk_scale^2, their q and k each off by p, move attention's
weights by t = sqrt(2) s p. The worst row and column may be SPREAD times as far off.

    MLP          output 2p, p;  down g, 2p;  up and input g, p, g
    attention    output p, t, p;  o g, p, t;  v g, t, g;  q, k and input g, t, p, p, g
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model import fp8
from model.attention import attention
from model.config import GPTConfig
from model.fp8_proof import FEWEST_TOKENS, GRADIENT, SPREAD, Agreement, disagreement, drawing, errors_of_products
from model.fp8_tensor import MULTIPLE
from model.gpt import GPT
from model.kernels import Fp8Error, why_it_failed

INPUT = 2**-6
"""size of the numbers that come in"""
GAIN = 2.0
"""of each layer: what the norms of q and k divide by is not 1, so that a norm which does not would show"""
IDLE = {"attention": "mlp.down.weight", "MLP": "attn.o.weight"}
"""a part of a block, and the weight that is zero where the part is looked at alone"""


def prove(
    config: GPTConfig, tokens: int, generation: str, levers: Sequence[str], device: torch.device
) -> list[Agreement]:
    """How well `levers` agree with none on `device`, result by result. tokens: of a micro-batch.

    Raises Fp8Error naming the lever where a result is wrong or a kernel fails.
    """
    rows, length = tokens // config.seq_len, config.seq_len
    if device.type != "cuda":  # few tokens, and for any length a number that fp8 can do
        rows, length = MULTIPLE, min(length, FEWEST_TOKENS // MULTIPLE)
    one = dataclasses.replace(config, depth=1, vocab_size=64, seq_len=length)
    right = _computed(one, rows, generation, (), device)
    found, fault = _compared(one, rows, generation, levers, device, right)
    if not fault:
        return found
    culprit = " with ".join(levers)
    for lever in levers if len(levers) > 1 else ():
        _, alone = _compared(one, rows, generation, (lever,), device, right)
        if alone:
            culprit, fault = lever, alone
            break
    raise Fp8Error(f"train.levers: {culprit} {fault}; say -o train.levers= (none), and have it reported")


def _compared(
    config: GPTConfig,
    rows: int,
    generation: str,
    levers: Sequence[str],
    device: torch.device,
    right: dict[tuple[str, str], Tensor],
) -> tuple[list[Agreement], str]:
    """The comparisons, and what is wrong with them, in words; "" where nothing is."""
    try:
        got = _computed(config, rows, generation, levers, device)
    except Exception as error:  # whatever it is, these levers cannot be used here
        return [], f"fails on this device: {why_it_failed(error)}"
    bounds = _bounds(config)
    agreements = [
        Agreement(f"block with levers, {part}, {what}", disagreement(got[part, what], wanted), bounds[part, what])
        for (part, what), wanted in right.items()
    ]
    wrong = next((each for each in agreements if not each.holds), None)
    if wrong is None:
        return agreements, ""
    return agreements, f"computes something else on this device: {wrong.what}, is wrong by {wrong.words}"


def _computed(
    config: GPTConfig, rows: int, generation: str, levers: Sequence[str], device: torch.device
) -> dict[tuple[str, str], Tensor]:
    """Output and gradients of each part of a block, as matrices, by part and name; the same numbers go in each time."""
    with device:
        model = GPT(config, torch.bfloat16)
    fp8.apply(model, rows * config.seq_len, generation, levers)
    if levers and device.type == "cuda":
        model.compile_blocks()
    block, draw = model.blocks[0], drawing(device)
    shape = rows, config.seq_len, config.width
    x, x0 = (draw(*shape).mul_(INPUT).bfloat16().requires_grad_() for _ in range(2))
    value_embed, dy = draw(*shape).bfloat16().requires_grad_(), draw(*shape).mul_(GRADIENT).bfloat16()
    lambdas = torch.ones((), device=device, requires_grad=True), torch.ones((), device=device, requires_grad=True)
    weights, found = dict(block.named_parameters()), {}
    for part, idle in IDLE.items():
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(draw(*weight.shape) * (GAIN / math.sqrt(weight.size(1)) * (name != idle)))
        if model.before_loss:
            model.before_loss()
        out = block(x, x0, lambdas, value_embed, model._rotary.tables(config.seq_len, x), attention)
        names = [what for of, what in _bounds(config) if of == part and what != "output"]
        gradients = torch.autograd.grad(out, [x if what == "input" else weights[what] for what in names], dy)
        found[part, "output"] = out.detach().flatten(0, -2)
        found |= {(part, what): gradient.flatten(0, -2) for what, gradient in zip(names, gradients, strict=True)}
    return found


def _bounds(config: GPTConfig) -> dict[tuple[str, str], float]:
    """What rounding explains of each result of each part: its output, and the gradients by what is named."""
    p, g = errors_of_products()
    t = math.sqrt(2) * config.qk_scale**2 * p
    steps = {
        ("attention", "output"): (p, t, p),
        ("attention", "input"): (g, t, p, p, g),
        ("attention", "attn.q.weight"): (g, t, p, p, g),
        ("attention", "attn.k.weight"): (g, t, p, p, g),
        ("attention", "attn.v.weight"): (g, t, g),
        ("attention", "attn.o.weight"): (g, p, t),
        ("MLP", "output"): (2 * p, p),
        ("MLP", "input"): (g, p, g),
        ("MLP", "mlp.up.weight"): (g, p, g),
        ("MLP", "mlp.down.weight"): (g, 2 * p),
    }
    return {result: SPREAD * math.sqrt(2) * math.hypot(*errors) for result, errors in steps.items()}
