"""The proof of fp8: it passes where fp8 is right, and each fault that a device could have is found and named."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model import fp8, fp8_proof, fp8_tensor
from model.config import GPTConfig
from model.fp8_proof import FEWEST_TOKENS, SPREAD, disagreement, measurements, prove, rounding, shapes
from model.fp8_tensor import E4M3, E5M2
from model.gpt import GPT
from model.kernels import Fp8Error

CPU = torch.device("cpu")
REAL_PRODUCT = torch._scaled_mm
RUN6_REDUCED = GPTConfig.for_depth(
    24, 500, 64, width=192, head_dim=64
)  # run 6's three shapes at an eighth, and padded words
SMALL = GPTConfig.for_depth(2, 256, 32, width=128, head_dim=64)


def model_in_fp8(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        model = GPT(config, compute_dtype=torch.bfloat16)
    fp8.apply(model, config.seq_len)
    return model


def test_run_6_at_an_eighth_agrees_and_the_worst_is_said() -> None:
    model = model_in_fp8(RUN6_REDUCED)
    assert shapes(model) == {
        (192, 192): "blocks.0.attn.q",
        (192, 768): "blocks.0.mlp.up",
        (768, 192): "blocks.0.mlp.down",
    }
    measured = dict(measurements(model, 16 * 2048, CPU))
    assert list(measured) == [
        "blocks.0.attn.q (192 to 192 channels)",
        "blocks.0.mlp.up (192 to 768 channels)",
        "blocks.0.mlp.down (768 to 192 channels)",
        "head and loss (192 channels to 500 words)",
    ]
    assert all(0 < found.error <= 0.85 * found.bound for agreements in measured.values() for found in agreements)
    assert prove(model, 16 * 2048, CPU).startswith("fp8 agrees with fp32 (at most ")


def test_the_bound_is_what_rounding_does() -> None:
    """Numbers spread over many powers of two are off by less than `rounding` says, and not by much less."""
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    for dtype in (E4M3, E5M2):
        rounded, inverse = fp8_tensor.quantise(x, dtype)
        error = (rounded.float() * inverse - x).norm() / x.norm()
        assert 0.6 * rounding(dtype) < error < rounding(dtype)


FORMAT = {"forward": E4M3, "backward": E5M2}
"""of a product's first operand"""


def zero_tile(a: Tensor, b: Tensor, *rest, **options) -> Tensor:
    out = REAL_PRODUCT(a, b, *rest, **options)
    out[:64, :64] = 0  # the first of the tiles that a kernel computes apart
    return out


FAULTS: dict[str, Callable[..., Tensor]] = {
    "NaN": lambda a, b, *rest, **options: REAL_PRODUCT(a, b, *rest, **options).mul_(math.nan),
    "one NaN": lambda a, b, *rest, **options: REAL_PRODUCT(a, b, *rest, **options).index_fill_(
        0, torch.tensor([3]), math.nan
    ),
    "zeros": lambda a, b, *rest, **options: REAL_PRODUCT(a, b, *rest, **options).zero_(),
    "a tile of zeros": zero_tile,
    "a scale forgotten": lambda a, b, s, t, **options: REAL_PRODUCT(a, b, torch.ones_like(s), t, **options),
    "a scale 25% too large": lambda a, b, s, t, **options: REAL_PRODUCT(a, b, s * 1.25, t, **options),
    "rows shifted by one": lambda a, b, *rest, **options: REAL_PRODUCT(a, b, *rest, **options).roll(1, 0),
}


def inject(monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Tensor], kind: str) -> None:
    """`fault` in place of torch's product where the product is of this kind."""

    def product(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None, **options: object
    ) -> Tensor:
        options.pop("scale_result", None)
        return (fault if a.dtype == FORMAT[kind] else REAL_PRODUCT)(a, b, scale_a, scale_b, bias=bias, **options)

    monkeypatch.setattr(torch, "_scaled_mm", product)


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_product_is_found_and_the_layer_named(monkeypatch: pytest.MonkeyPatch, fault: str, kind: str) -> None:
    inject(monkeypatch, FAULTS[fault], kind)
    with pytest.raises(Fp8Error) as refused:
        prove(model_in_fp8(SMALL), 64, CPU)
    product = {"forward": "forward product", "backward": "gradient by the input"}[kind]
    assert str(refused.value).startswith(
        f"fp8 computes something else on this device: blocks.0.attn.q (128 to 128 channels), {product}, is wrong by "
    )
    assert str(refused.value).endswith("; say -o train.fp8=false, and have the GPU and its driver looked at")


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_loss_finds_them_too(monkeypatch: pytest.MonkeyPatch, fault: str, kind: str) -> None:
    inject(monkeypatch, FAULTS[fault], kind)
    found = fp8_proof.loss_agreements(128, 250, 256, 15.0, FEWEST_TOKENS, CPU)
    assert not all(agreement.holds for agreement in found), found


def test_a_transposed_operand_is_found_where_shapes_do_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def transposed(a: Tensor, b: Tensor, *rest, **options) -> Tensor:
        return REAL_PRODUCT(a, fp8_tensor.transposed(b.t()).t() if b.size(0) == b.size(1) else b, *rest, **options)

    inject(monkeypatch, transposed, "forward")
    with pytest.raises(
        Fp8Error, match=r"blocks\.0\.attn\.q \(128 to 128 channels\), forward product, is wrong by 1\d\d\.\d%"
    ):
        prove(model_in_fp8(SMALL), 64, CPU)


def test_a_kernel_that_fails_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul\nand a stack")

    monkeypatch.setattr(torch, "_scaled_mm", refuses)
    with pytest.raises(Fp8Error) as refused:
        prove(model_in_fp8(SMALL), 64, CPU)
    assert str(refused.value) == (
        "fp8 fails on this device: blocks.0.attn.q (128 to 128 channels): CUBLAS_STATUS_NOT_SUPPORTED "
        "when calling cublasLtMatmul; "
        "say -o train.fp8=false"
    )


def test_a_lack_of_memory_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    monkeypatch.setattr(torch, "_scaled_mm", refuses)
    with pytest.raises(torch.OutOfMemoryError):
        prove(model_in_fp8(SMALL), 64, CPU)


def test_disagreement_is_of_the_worst_row_or_column() -> None:
    right = torch.ones(100, 100)
    got = right.clone()
    got[7, :25] = 0
    assert disagreement(got, right) == pytest.approx(0.5)
    assert disagreement(got.mT, right) == pytest.approx(0.5)
    assert disagreement(right * torch.nan, right) == math.inf
    assert disagreement(torch.zeros(4, 4), torch.zeros(4, 4)) == 0, "rows of padding have no gradient"
    assert disagreement(torch.ones(4, 4), torch.zeros(4, 4)) > SPREAD
