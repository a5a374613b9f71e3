"""What an older torch lacks of what `model/` calls, for measuring on a machine that has no newer one. The product has
none of this.

torch 2.11 (Python 3.12, CUDA 13, Triton 3.6): `torch.compile` has no `recompile_limit`; torch.distributed has no
`reduce_scatter_single` and `all_gather_single` (other names for what it has); its wrapper of FlashAttention 4 refuses
windows backward, and forward hands on -1 where the package wants None. Wheels that the machine lacks lie in a folder,
as they are or as a .tar.xz of their contents, and are unpacked into another (`unpack`).
"""

from __future__ import annotations

import functools
import inspect
import shutil
import site
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def adapt() -> list[str]:
    """Give this process's torch what it lacks; what that was, one sentence each. Before anything of `model/` is
    imported."""
    import torch
    import torch.distributed as dist

    done = []
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        torch.compile = _without_limit(torch.compile)
        done.append("torch.compile has no recompile_limit: the limit is set for the whole process")
    for name, older in (
        ("reduce_scatter_single", "reduce_scatter_tensor"),
        ("all_gather_single", "all_gather_into_tensor"),
    ):
        if not hasattr(dist, name):
            setattr(dist, name, getattr(dist, older))
            done.append(f"torch.distributed.{name} is {older}")
    if "window_size_left" not in inspect.signature(fa4()._fa4_run_backward).parameters:
        _give_windows(fa4())
        done.append("torch's wrapper of FlashAttention 4 takes a window")
    return done


def fa4() -> ModuleType:
    from torch.nn.attention import _fa4

    return _fa4


def _without_limit(compiler):
    @functools.wraps(compiler)
    def compile(*args, recompile_limit: int | None = None, **options):
        import torch._dynamo

        torch._dynamo.config.recompile_limit = max(recompile_limit or 0, torch._dynamo.config.recompile_limit)
        return compiler(*args, **options)

    return compile


def _give_windows(wrapper: ModuleType) -> None:
    """What torch 2.13's wrapper of FlashAttention 4 does with windows and lengths, in an older one that is not active
    yet."""
    import torch

    run_forward = wrapper._fa4_run_forward

    def bound(size: int | None) -> int | None:
        return None if size == -1 else size

    def forward(query, key, value, starts_q, starts_k, scale, causal, left, right, *others):
        return run_forward(query, key, value, starts_q, starts_k, scale, causal, bound(left), bound(right), *others)

    def backward(
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp,
        starts_q,
        starts_k,
        max_q,
        max_k,
        dropout_p,
        causal,
        *_,
        scale=None,
        window_size_left=None,
        window_size_right=None,
    ):
        package = wrapper._fa4_import_module(wrapper._FA4_MODULE_PATH)
        return package._flash_attn_bwd(
            query,
            key,
            value,
            out,
            grad_out,
            logsumexp.contiguous(),
            softmax_scale=scale,
            causal=causal,
            window_size_left=bound(window_size_left),
            window_size_right=bound(window_size_right),
            cu_seqlens_q=starts_q,
            cu_seqlens_k=starts_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    wrapper._fa4_run_forward = forward
    wrapper._fa4_flash_attention_backward_impl = backward


def unpack(wheels: Path, into: Path) -> list[str]:
    """Put the packages of a folder's wheels on this process's path, unpacked below `into`; their file names."""
    names = []
    for wheel in sorted([*wheels.glob("*.whl"), *wheels.glob("*.tar.xz")]):
        if not (into / f"{wheel.name}.done").exists():
            shutil.unpack_archive(wheel, into, "zip" if wheel.suffix == ".whl" else "xztar")
            (into / f"{wheel.name}.done").touch()
        names.append(wheel.name)
    site.addsitedir(str(into))  # some add paths of their own in a .pth file
    sys.path.insert(0, str(into))
    return names
