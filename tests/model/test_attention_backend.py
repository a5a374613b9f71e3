"""The GPU's kernels: which is chosen, how it is called, and that one which is wrong is not trained with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen

import model.attention
from model.attention import attention, disagreement, prove
from model.kernels import FA4_FITS, BackendError, activate, choose_backend, installed

CPU = torch.device("cpu")
HOPPER, BLACKWELL, BLACKWELL_CARD, ADA, AMPERE, TURING = (9, 0), (10, 0), (12, 0), (8, 9), (8, 0), (7, 5)
FA2 = {"fa2": "2.13.0"}
FA3 = FA2 | {"fa3": "unversioned"}
FA4 = FA2 | {"fa4": FA4_FITS}
FA4_LATER = FA2 | {"fa4": "4.0.0b20"}


@pytest.mark.parametrize(
    ("wanted", "capability", "have", "chosen"),
    [
        ("fastest", None, FA2, "sdpa"),
        ("fastest", AMPERE, FA3 | FA4, "fa2"),
        ("fastest", ADA, FA2, "fa2"),
        ("fastest", BLACKWELL_CARD, FA4, "fa2"),
        ("fastest", HOPPER, FA3, "fa3"),
        ("fastest", HOPPER, FA4, "fa4"),
        ("fastest", HOPPER, FA3 | FA4_LATER, "fa3"),
        ("fastest", BLACKWELL, FA3 | FA4, "fa4"),
        ("fa4", HOPPER, FA3 | FA4, "fa4"),
        ("fa4", HOPPER, FA3, "fa3"),  # as fast
        ("fa2", HOPPER, FA3 | FA4, "fa2"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_the_kernel_chosen(
    wanted: str, capability: tuple[int, int] | None, have: dict[str, str], chosen: str, strict: bool
) -> None:
    assert choose_backend(wanted, capability, have, strict=strict).name == chosen


@pytest.mark.parametrize(
    ("wanted", "capability", "have", "missing"),
    [
        ("fastest", HOPPER, FA2, "flash-attn-4==4.0.0b12 is not installed"),
        ("fa3", HOPPER, FA2, "flash-attn-4==4.0.0b12 is not installed"),
        ("fastest", HOPPER, FA4_LATER, "flash-attn-4 4.0.0b20 does not fit this torch, 4.0.0b12 does"),
        ("fastest", BLACKWELL, FA3, "flash-attn-4==4.0.0b12 is not installed"),
    ],
)
def test_a_slower_kernel_is_an_error_where_it_is_paid_for(
    wanted: str, capability: tuple[int, int], have: dict[str, str], missing: str
) -> None:
    slower = f"FlashAttention 2, 7% of each step slower (estimated): {missing}"
    with pytest.raises(BackendError) as refused:
        choose_backend(wanted, capability, have, strict=True)
    assert str(refused.value) == f"attention would run on {slower}; install it, or accept that with --allow-fa2"
    for said in ({"strict": True, "allow_fa2": True}, {"strict": False}):
        taken = choose_backend(wanted, capability, have, **said)
        assert taken.name == "fa2" and taken.description == f"attention: {slower}"


@pytest.mark.parametrize(
    ("wanted", "capability", "says"),
    [("fastest", TURING, "7.5"), ("fa5", HOPPER, "'fa5'"), ("fa3", BLACKWELL, "10.0"), ("fa4", AMPERE, "8.0")],
)
def test_what_cannot_be(wanted: str, capability: tuple[int, int], says: str) -> None:
    with pytest.raises(BackendError, match=says):
        choose_backend(wanted, capability, FA3 | FA4, strict=False)


def test_this_environment() -> None:
    have = installed()
    assert have["fa2"] == torch.__version__
    activate(choose_backend("fastest", None, have, strict=True))
    if "fa3" not in have:
        with pytest.raises(BackendError, match=r"fa3 cannot be used: .*; install it again or choose fa2"):
            activate(choose_backend("fa3", HOPPER, FA3, strict=True))


# ---- how it is called


def documented_varlen_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple,
) -> Tensor:
    """What torch documents of `varlen_attn`, one sequence and one query at a time: q, k, v (tokens, H, D)."""
    assert starts.dtype == key_starts.dtype == torch.int32 and torch.equal(starts, key_starts)
    assert max_q == max_k == int(starts.diff().max()) and int(starts[-1]) == len(q) and window_size[1] == 0
    out = torch.zeros_like(q)
    for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        for i in range(first, end):
            low = first if window_size[0] == -1 else max(first, i - window_size[0])
            scores = torch.einsum("hd,shd->hs", q[i], k[low : i + 1]) * (scale or 1 / math.sqrt(q.size(-1)))
            out[i] = torch.einsum("hs,shd->hd", scores.softmax(-1), v[low : i + 1])
    return out


@settings(max_examples=25, deadline=None)
@given(T=st.integers(1, 12), window=st.integers(1, 14), B=st.integers(1, 3), scale=st.sampled_from([None, 0.7]))
def test_the_kernel_is_asked_for_what_the_blocks_compute(T: int, window: int, B: int, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(B, T, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(varlen, "varlen_attn", documented_varlen_attn)
        asked = model.attention._kernel(q, k, v, window, scale)
    torch.testing.assert_close(asked, attention(q, k, v, window, scale), rtol=0, atol=1e-12)


def test_the_stand_in_has_the_signature_of_the_real_one() -> None:
    real = inspect.signature(varlen.varlen_attn).parameters
    ours = inspect.signature(documented_varlen_attn).parameters
    positional = [p for p in real.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(positional) == 7 and {"scale", "window_size"} <= real.keys() and {"scale", "window_size"} <= ours.keys()


# ---- whether it is right


def test_a_kernel_that_agrees_passes_the_proof() -> None:
    for gradients in (True, False):
        assert 0 < disagreement(CPU, 64, gradients) < 0.01
        prove(choose_backend("fastest", HOPPER, FA4, strict=True), CPU, gradients)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda q, k, v, window: attention(q, k, v, window - 1), "fa4 computes something else on this GPU, wrong by "),
        (
            lambda q, k, v, window: attention(q, k, v, window) * float("nan"),
            "fa4 computes something else on this GPU, wrong by inf%",
        ),
        (lambda q, k, v, window: attention(q, k, v), "fa4 fails on this GPU: "),
    ],
    ids=["a window of one less", "nan", "raises"],
)
def test_one_that_does_not_is_an_error(monkeypatch: pytest.MonkeyPatch, wrong: Callable, sentence: str) -> None:
    def mixed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return (wrong if q.dtype == torch.bfloat16 else attention)(q, k, v, window)

    monkeypatch.setattr(model.attention, "attention", mixed)
    with pytest.raises(BackendError) as raised:
        prove(choose_backend("fastest", HOPPER, FA4, strict=True), CPU, gradients=True)
    assert str(raised.value).startswith(sentence) and str(raised.value).endswith(
        "install it again or say -o train.attention=fa2"
    )


def test_a_lack_of_memory_is_no_fault_of_the_kernel_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    monkeypatch.setattr(model.attention, "attention", lacks)
    with pytest.raises(torch.OutOfMemoryError):
        prove(choose_backend("fastest", HOPPER, FA4, strict=True), CPU, gradients=True)
