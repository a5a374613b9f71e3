"""Matrix products in eight bits: which layers, and how.

A tensor core multiplies fp8 numbers at twice the rate of bf16 ones, and a GPT of this size spends nine tenths of its
arithmetic in matrix products. There are two formats:

    e4m3    4 bits exponent, 3 mantissa    to 448       relative step 1/8     weights and activations: precision counts
    e5m2    5 bits exponent, 2 mantissa    to 57,344    relative step 1/4     gradients: their range counts

**Scales.** A tensor is stored as numbers of those formats and one scale per tensor, chosen from the tensor itself each
time:

    s = largest of the format / max |x|        x8 = round(s x)        x ~ x8 / s

The product of two such tensors is accumulated in higher precision and divided by both scales: a dot product of
thousands of terms averages the rounding errors of its operands away. One scale per row would be more exact and was
slower (0.90 of bf16's speed, published); a scale of the previous step would save a pass over memory and needs a remedy
for growing values. `model/fp8_tensor.py` does what the published runs did.

**A linear layer has three products**, and each operand is quantised where it is used:

    forward            y  = x W^T           e4m3 x e4m3      fast accumulation (off by less than the rounding)
    for the input      dx = dy W            e5m2 x e4m3
    for the weight     dW = dy^T x          e5m2 x e4m3      sums over all tokens of the micro-batch

Hardware wants the first operand by rows and the second by columns, so the backward pass makes transposed copies. Every
dimension that a product reads must be divisible by 16: inputs and outputs of a layer, and the tokens of a micro-batch.

**Which layers.** From February on those with inputs and outputs divisible by 16; from July on also no side below 128.
That is every matrix of the blocks and the head, and none of the gates. Attention's own products stay in bf16.

**What stays.** Weights are fp32 and so are their accumulated gradients; the optimizer knows nothing of fp8. Each
forward pass quantises the fp32 weight anew. The head is the exception: its loss is computed in many chunks
(`model/loss.py`), so its quantised copies are made once per optimizer step and kept (`model/fp8_linear.py`).

**Levers** leave passes over memory out (`model/fp8_passes.py`), where a recipe names them; `model/fp8_levers_proof.py`
asks the device whether a block with them computes the same.

**Evaluation is outside fp8.** Where no gradient is wanted (`torch.no_grad`), the same layers compute in the dtype of
their input, so that scores agree with the checkpoint loaded into a model without fp8.

Sources: torchao.float8 (tensorwise, dynamic), whose layer this is; arXiv 2209.05433 for the formats; the leaderboard's
runs 2-6.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from model import fp8_passes
from model.fp8_tensor import MULTIPLE
from model.gpt import GPT
from model.kernels import Fp8Error

SMALLEST_SIDE = {"feb": 16, "head": 128}


def layers(model: nn.Module, generation: str = "head") -> tuple[list[str], list[str]]:
    """Names of the linear layers that `generation` computes in fp8, and of those that it leaves.

    Raises Fp8Error for a matrix of a block or the head whose dimensions are not divisible by 16.
    """
    chosen: list[str] = []
    left: list[str] = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            sides = (layer.in_features, layer.out_features)
            fits = all(side % MULTIPLE == 0 for side in sides)
            if not fits and not name.endswith("gate"):
                raise Fp8Error(
                    f"{name} maps {sides[0]} to {sides[1]} channels, and fp8 needs both divisible by {MULTIPLE}: "
                    "choose another width or vocabulary, or set train.fp8=false"
                )
            (chosen if fits and min(sides) >= SMALLEST_SIDE[generation] else left).append(name)
    return chosen, left


def apply(model: GPT, tokens: int, generation: str = "head", levers: Collection[str] = ()) -> list[str]:
    """Put fp8 into the layers of `layers(model, generation)`, in place (parameters stay); returns their names.

    tokens: of a micro-batch, B x T. levers: of `model.config.LEVERS`. Raises Fp8Error where a dimension is not
    divisible by 16 or no layer is large enough.
    """
    if tokens % MULTIPLE:
        raise Fp8Error(
            f"a micro-batch has {tokens} tokens, and fp8 needs a multiple of {MULTIPLE}: "
            "change train.device_batch_size or model.seq_len"
        )
    chosen, _ = layers(model, generation)
    if not chosen:
        raise Fp8Error(
            f"no layer has both sides of at least {SMALLEST_SIDE[generation]}: "
            "set train.fp8=false for a model this small"
        )
    from model.fp8_linear import convert_to_float8  # takes seconds to import: only where there is fp8

    convert_to_float8(model, set(chosen))
    if levers:
        fp8_passes.install(model, frozenset(levers))
    return chosen
