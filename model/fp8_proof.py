"""Whether a device computes in fp8 what fp32 computes, asked of every shape of a model before it is trained.

Compiled kernels find the maxima and round, a library picks a kernel for the shape, and both have to agree on layouts
and scales. A fault of one of them need not stop anything: the loss falls, only less well. So each distinct layer is run
once as it is trained, compiled on a GPU, at the tokens of a real micro-batch, and its three products are compared with
fp32 products of the same numbers; and so are the head's loss and its two gradients.

**Bounds.** Rounding to a float of step eps (1/8 in e4m3, 1/4 in e5m2) leaves an error of root mean square at most eps /
sqrt(12): 3.6 % in e4m3, 7.2 % in e5m2, two thirds of that for normally distributed numbers. Errors of two operands add
in squares:

    forward                 e4m3 x e4m3     5.1 %        about 3.7 % expected
    the two gradients       e5m2 x e4m3     8.1 %        about 5.8 % expected

in the norm of the result. The worst row and the worst column count, so that a tile that was never written shows; chance
lets them be half as much again (SPREAD). A transposed operand is off by 140 %, a forgotten product by 100 %.

The loss first rounds logits z: off by 5.1 % of their standard deviation, STEEPNESS; call that d. In p = e^z / sum it is
a relative error of d, to which the gradients add the rounding of dz (e5m2) and of the other operand (e4m3). A rare
word's row hangs on few tokens, so that chance may double it (LOSS_SPREAD). The mean of N losses is off by at most d^2 /
2 in the sum of e^z, and by d / sqrt(N) in the target's logit: d^2 + 4 d / sqrt(N) are allowed.

The gradients that come in are tiny (1e-6), as in training: without their scale e5m2 would round all of them to zero.
The layers are compiled anew inside their blocks, where the compiler fuses more; a fault of such a kernel shows in the
first steps. Blocks with levers are `model/fp8_levers_proof.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.fp8_linear import Float8Linear, convert_to_float8
from model.fp8_tensor import E4M3, E5M2
from model.gpt import GPT, Linear
from model.kernels import Fp8Error, why_it_failed
from model.loss import cross_entropy

FEWEST_TOKENS = 256
"""tokens at least, so that chance averages out; and all that is computed where there is no GPU"""
SPREAD, LOSS_SPREAD = 1.5, 2.0
"""the worst row's or column's error over the whole's"""
STEEPNESS = 1.0
"""standard deviation of the logits"""
GRADIENT = 1e-6
"""size of the gradients that come in"""
REFERENCE_ELEMENTS = 1 << 26  # logits that exist in fp32 at a time


class Agreement(NamedTuple):
    """One comparison: `error` and the `bound` that rounding allows, both relative (of "loss": nats)."""

    what: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound

    @property
    def words(self) -> str:
        return f"{self.error:.1%} where rounding explains {self.bound:.1%}"


def prove(model: GPT, tokens: int, device: torch.device) -> str:
    """A sentence of how well fp8 on `device` agrees with fp32 for the layers of `model` (on any device, also meta).

    tokens: of a micro-batch. Raises Fp8Error naming the layer and the product that does not agree, or that fails.
    """
    worst = Agreement("", 0.0, 1.0)
    for name, agreements in measurements(model, tokens, device):
        for found in agreements:
            if not found.holds:
                raise Fp8Error(
                    f"fp8 computes something else on this device: {name}, {found.what}, is wrong by {found.words}; "
                    "say -o train.fp8=false, and have the GPU and its driver looked at"
                )
            worst = max(worst, found._replace(what=f"{name}, {found.what}"), key=lambda each: each.error / each.bound)
    wrong = f"{worst.error:.1%} wrong where rounding explains {worst.bound:.1%}: {worst.what}"
    return f"fp8 agrees with fp32 (at most {wrong})"


def measurements(model: GPT, tokens: int, device: torch.device) -> Iterator[tuple[str, list[Agreement]]]:
    """For each distinct fp8 layer of `model` and for the head: its name with its shape, and its comparisons.

    A kernel that cannot be compiled or fails is an Fp8Error with the name.
    """
    tokens = max(tokens, FEWEST_TOKENS) if device.type == "cuda" else FEWEST_TOKENS
    for (inputs, outputs), name in shapes(model).items():
        label = f"{name} ({inputs} to {outputs} channels)"
        yield label, _named(label, partial(layer_agreements, inputs, outputs, tokens, device))
    config = model.config
    label = f"head and loss ({config.width} channels to {config.vocab_size} words)"
    head = config.width, config.vocab_size, config.padded_vocab, config.softcap
    yield label, _named(label, partial(loss_agreements, *head, tokens, device))


def shapes(model: nn.Module) -> dict[tuple[int, int], str]:
    """(inputs, outputs) of the fp8 layers but the head, whose products are the loss's, each with the first layer that
    has it."""
    found: dict[tuple[int, int], str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Float8Linear) and name != "head":
            found.setdefault((layer.in_features, layer.out_features), name)
    return found


def _named(label: str, compared: Callable[[], list[Agreement]]) -> list[Agreement]:
    try:
        return compared()
    except Exception as error:
        why = why_it_failed(error)
        raise Fp8Error(f"fp8 fails on this device: {label}: {why}; say -o train.fp8=false") from error


def layer_agreements(inputs: int, outputs: int, tokens: int, device: torch.device) -> list[Agreement]:
    """The three products of an fp8 layer, as trained (bf16 in and out, fp32 weight), against fp32."""
    layer = fp8_layer(inputs, outputs, device)
    draw = drawing(device)
    x = draw(tokens, inputs).bfloat16().requires_grad_()
    dy = draw(tokens, outputs).mul_(GRADIENT).bfloat16()
    with torch.no_grad():
        layer.weight.copy_(draw(outputs, inputs) / math.sqrt(inputs))
    if device.type == "cuda":
        layer.compile(fullgraph=True, dynamic=False)
    y = layer(x)
    dx, dw = torch.autograd.grad(y, (x, layer.weight), dy)
    wide_x, w, wide_dy = x.detach().float(), layer.weight.detach(), dy.float()
    forward, backward = errors_of_products()
    return [
        Agreement("forward product", disagreement(y.detach(), wide_x @ w.mT), SPREAD * forward),
        Agreement("gradient by the input", disagreement(dx, wide_dy @ w), SPREAD * backward),
        Agreement("gradient by the weight", disagreement(dw, wide_dy.mT @ wide_x), SPREAD * backward),
    ]


def loss_agreements(
    width: int, vocab_size: int, rows: int, softcap: float, tokens: int, device: torch.device
) -> list[Agreement]:
    """The head's loss and its gradients against fp32. rows: of the head, padding included."""
    head, draw = fp8_layer(width, rows, device), drawing(device)
    with torch.no_grad():
        head.weight.copy_(draw(rows, width) * (STEEPNESS / math.sqrt(width)))
    hidden = F.rms_norm(draw(tokens, width), (width,)).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab_size, (tokens,), generator=torch.Generator(device).manual_seed(1), device=device)
    loss = cross_entropy(
        hidden, head.weight, targets, softcap, vocab_size, quantised=head.quantised(), compiled=device.type == "cuda"
    )
    got = torch.autograd.grad(loss, (hidden, head.weight))
    right_loss, *right = _reference_loss(hidden.detach(), head.weight.detach(), targets, softcap, vocab_size)
    off = STEEPNESS * errors_of_products()[0]
    bound = LOSS_SPREAD * math.hypot(off, rounding(E5M2), rounding(E4M3))
    difference = (loss.detach() - right_loss).abs().nan_to_num(nan=torch.inf).item()
    return [
        Agreement("loss", difference, off**2 + 4 * off / math.sqrt(tokens)),
        Agreement("gradient by the hidden state", disagreement(got[0], right[0]), bound),
        Agreement("gradient by the weight", disagreement(got[1], right[1]), bound),
    ]


def _reference_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients by autograd in fp32, some rows at a time."""
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    total = torch.zeros((), device=hidden.device)
    step = max(1, REFERENCE_ELEMENTS // len(weight))
    for part, right in zip(hidden.split(step), targets.split(step), strict=True):
        logits = softcap * torch.tanh((part @ weight.mT)[:, :vocab_size] / softcap)
        loss = F.cross_entropy(logits, right, reduction="sum") / len(targets)
        loss.backward()
        total += loss.detach()
    assert hidden.grad is not None and weight.grad is not None
    return total, hidden.grad, weight.grad


def fp8_layer(inputs: int, outputs: int, device: torch.device) -> Float8Linear:
    """One layer of this shape, put into fp8 as a model's are; its weight is not filled."""
    with device:
        holder = nn.ModuleList([Linear(inputs, outputs)])
    convert_to_float8(holder, {"0"})
    layer = holder[0]
    assert isinstance(layer, Float8Linear)
    return layer


def rounding(dtype: torch.dtype) -> float:
    """The largest root mean square of the error that rounding to `dtype` leaves, relative."""
    return torch.finfo(dtype).eps / math.sqrt(12)


def errors_of_products() -> tuple[float, float]:
    """What rounding of both operands makes of a product of two e4m3, 5.1 %, and of one with a gradient, 8.1 %."""
    return math.hypot(rounding(E4M3), rounding(E4M3)), math.hypot(rounding(E5M2), rounding(E4M3))


def disagreement(got: Tensor, right: Tensor) -> float:
    """The largest |got - right| / |right| of any row or column of two matrices; infinite for what is no number."""
    difference = (got.float() - right).square()
    squares = right.square()
    ratios = [difference.sum(dim) / squares.sum(dim).clamp(min=torch.finfo(torch.float32).tiny) for dim in (0, 1)]
    return max(ratio.max().nan_to_num(nan=torch.inf).item() for ratio in ratios) ** 0.5


def drawing(device: torch.device) -> Callable[..., Tensor]:
    """Normally distributed fp32 numbers of a shape, from a generator of its own."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)
