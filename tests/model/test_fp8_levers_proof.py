"""The proof of levers: a right one passes, a broken one is refused by its name, with the way out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from model import fp8_passes
from model.config import LEVERS, GPTConfig
from model.fp8_levers_proof import prove
from model.fp8_proof import Agreement
from model.fp8_tensor import Copies, Quantised
from model.kernels import Fp8Error

SMALL = GPTConfig.for_depth(3, 256, 32, width=128, head_dim=64)


def proven(*levers: str) -> list[Agreement]:
    return prove(SMALL, 64, "head", levers, torch.device("cpu"))


def test_all_levers_agree_and_do_not_compute_the_same_bits() -> None:
    found = proven(*LEVERS)
    assert len(found) == 10 and all(each.holds for each in found)
    assert all(each.error > 0.2 * each.bound for each in found), "bounds are what rounding needs"


def kept_forever(copies: Copies, weights: Sequence[Tensor], make: Callable[..., Quantised]) -> bool:
    copies.current = copies.__dict__.get("current") or make(*weights)
    return False


BROKEN: dict[str, tuple[object, str, object]] = {
    "kept_columns": (fp8_passes, "transposed", lambda x: x.t().roll(1, 0).contiguous()),
    "bounded_scales": (fp8_passes, "longest_row", lambda weight: torch.full((), 1e-3)),
    "norm_output": (fp8_passes._Norm, "backward", staticmethod(lambda ctx, dy: dy)),
    "kept_weights": (Copies, "refresh", kept_forever),
}


@pytest.mark.parametrize("lever", BROKEN)
def test_a_broken_lever_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, lever: str) -> None:
    monkeypatch.setattr(*BROKEN[lever])
    with pytest.raises(Fp8Error) as refused:
        proven(lever, "shared_input")
    said = str(refused.value)
    assert said.startswith(f"train.levers: {lever} computes something else on this device: block with levers, ")
    assert said.endswith("; say -o train.levers= (none), and have it reported")


def test_a_kernel_that_does_not_compile_names_its_lever(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Tensor) -> Tensor:
        raise RuntimeError("PassManager::run failed\nand a stack")

    monkeypatch.setattr(fp8_passes, "transposed", fails)
    with pytest.raises(
        Fp8Error, match=r"^train\.levers: kept_columns fails on this device: PassManager::run failed; say"
    ):
        proven("shared_input", "kept_columns")
