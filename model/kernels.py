"""Which kernels a GPU can run, attention's and fp8's, told without torch.

fa2   FlashAttention 2, part of torch          Ampere and later    a step is about 7 % slower (estimated)
fa3   FlashAttention 3, a package of its own   Hopper
fa4   FlashAttention 4, a package of its own   Hopper, Blackwell   later releases return more than torch unpacks
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

FA4_PACKAGE, FA4_FITS = "flash-attn-4", "4.0.0b12"
FA2_TIME = 49.4 / 30.6
"""FlashAttention 2's time over 4's in a micro-step of a d24, forward and backward (measured on one H100 80GB HBM3 with
torch 2.11: LOG, 2026-11-26)"""
ATTENTION_SHARE = 30.6 / 268
"""of that micro-step that FlashAttention 4 takes (measured there)"""
FA2_COST = (FA2_TIME - 1) * ATTENTION_SHARE
"""estimated share of a step that FlashAttention 2 takes longer on Hopper and Blackwell: 7 %"""
BF16_TIME = 740 / 630
"""a bf16 step's time over an fp8 one's: tokens per second of a d26 on 8xH100, published"""


class BackendError(ValueError):
    """No acceptable attention kernel: one sentence with what is missing and what to do."""


@dataclass(frozen=True)
class Backend:
    """The kernel that attention runs on: "sdpa", "fa2", "fa3" or "fa4", and a sentence for people."""

    name: str
    description: str

    @property
    def packaged(self) -> bool:
        """Whether the kernel comes from a package beside torch."""
        return self.name in ("fa3", "fa4")


class Fp8Error(ValueError):
    """fp8 that cannot be: one sentence with the offending value and what to do."""


def why_it_failed(error: Exception) -> str:
    """The first line of what a kernel failed with. A lack of memory is no fault of a kernel and raised again."""
    if type(error).__name__ == "OutOfMemoryError":
        raise error
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def installed() -> dict[str, str]:
    """The kernels that this environment has, each with the version of its package (for FlashAttention 2, torch's)."""
    found = {"fa2": importlib.metadata.version("torch")}
    if importlib.util.find_spec("flash_attn_interface"):
        found["fa3"] = "unversioned"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["fa4"] = importlib.metadata.version(FA4_PACKAGE)
    return found


def choose_backend(
    wanted: str,
    capability: tuple[int, int] | None,
    have: Mapping[str, str],
    *,
    strict: bool,
    allow_fa2: bool = False,
    price: str = "",
) -> Backend:
    """The kernel to run on.

    wanted: "fa2", "fa3", "fa4", or "fastest" for what the hardware can do at best. capability: the GPU's, (9, 0); None:
    a CPU. have: as `installed` returns. strict: somebody pays for this machine, so a slower kernel than wanted raises
    BackendError unless allow_fa2 accepts it; otherwise it is taken, and the description says what it costs. price: what
    FA2_COST of the run comes to, in words.
    """
    if capability is None:
        return Backend("sdpa", "attention: torch's SDPA on blocks of one window")
    if capability < (8, 0):
        raise BackendError(
            f"a GPU of compute capability {capability[0]}.{capability[1]} has no attention kernel here: "
            "use Ampere or later"
        )
    fast = [name for name, generations in {"fa3": (9,), "fa4": (9, 10)}.items() if capability[0] in generations]
    usable = [name for name in fast if name in have and (name != "fa4" or have[name] == FA4_FITS)]
    if wanted not in ("fa2", "fa3", "fa4", "fastest"):
        raise BackendError(f"there is no attention kernel called {wanted!r}: choose fastest, fa2, fa3 or fa4")
    if wanted in ("fa3", "fa4") and wanted not in fast:
        raise BackendError(
            f"{wanted} does not run on compute capability {capability[0]}.{capability[1]}: choose fastest"
        )
    if wanted == "fa2" or not fast:
        return Backend("fa2", "attention: FlashAttention 2, part of torch")
    if usable:
        name = wanted if wanted in usable else usable[0]
        return Backend(name, f"attention: FlashAttention {name[-1]} ({have[name]})")
    missing = f"{FA4_PACKAGE}=={FA4_FITS} is not installed"
    if "fa4" in have:
        missing = f"{FA4_PACKAGE} {have['fa4']} does not fit this torch, {FA4_FITS} does"
    cost = f"{FA2_COST:.0%} of each step slower (estimated" + (f": {price})" if price else ")")
    slower = f"FlashAttention 2, {cost}: {missing}"
    if strict and not allow_fa2:
        raise BackendError(f"attention would run on {slower}; install it, or accept that with --allow-fa2")
    return Backend("fa2", f"attention: {slower}")


def activate(backend: Backend) -> None:
    """Put the chosen kernel behind `varlen_attn` in this process; BackendError for a package that torch cannot call."""
    if not backend.packaged:
        return
    from torch.nn.attention import activate_flash_attention_impl

    try:
        activate_flash_attention_impl(backend.name.upper())
    except (ImportError, RuntimeError) as error:
        raise BackendError(f"{backend.name} cannot be used: {error}; install it again or choose fa2") from error


def require_fp8(capability: tuple[int, int] | None, name: str) -> str:
    """Why fp8 works on this GPU of (9, 0) and "NVIDIA H100 80GB HBM3", or on a CPU (None); Fp8Error says why not."""
    if capability is None:
        return "fp8 on a CPU is computed exactly as on a GPU but slower than bf16: it is for tests"
    generation = _generation(capability)
    if capability >= (8, 9):
        return f"{name} ({generation}) multiplies fp8 at twice its bf16 rate"
    raise Fp8Error(
        f"{name} ({generation}) has no fp8 matrix units (Ada, Hopper and Blackwell have): set train.fp8=false, "
        f"which takes {BF16_TIME - 1:.0%} longer than the same card with fp8 would (as published for a d26)"
    )


def _generation(capability: tuple[int, int]) -> str:
    major, minor = capability
    if capability == (8, 9):
        return "Ada"
    turing = "Turing" if minor >= 5 else "Volta"
    names = {7: turing, 8: "Ampere", 9: "Hopper", 10: "Blackwell", 11: "Blackwell", 12: "Blackwell"}
    return names.get(major, f"compute capability {major}.{minor}")
