"""What an older torch lacks of what `model/` calls, for measuring on a machine that has no newer one. The product has
none of this.

torch 2.11 (Python 3.12, CUDA 13, Triton 3.6): `torch.compile` has no `recompile_limit`; torch.distributed has no
`reduce_scatter_single` and `all_gather_single` (other names for what it has); torch's wrapper of FlashAttention 4
refuses windows, so its package is called directly (`flash_attention_4`). Wheels that the machine lacks lie in a
folder and are unpacked into another (`unpack`).
"""

from __future__ import annotations

import functools
import inspect
import site
import sys
import zipfile
from pathlib import Path

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
    return done


def _without_limit(compiler):
    @functools.wraps(compiler)
    def compile(*args, recompile_limit: int | None = None, **options):
        import torch._dynamo

        torch._dynamo.config.recompile_limit = max(recompile_limit or 0, torch._dynamo.config.recompile_limit)
        return compiler(*args, **options)

    return compile


def torch_calls_windows() -> bool:
    """Whether torch's own wrapper of FlashAttention 4 takes a window, forward and backward."""
    from torch.nn.attention import _fa4

    return "window_size_left" in inspect.signature(_fa4._fa4_run_backward).parameters


def flash_attention_4(q, k, v, window: int, scale: float | None = None):
    """FlashAttention 4 without torch's wrapper, in the place of `model.attention.attention`: (B, T, H, D), bf16."""
    from flash_attn.cute.interface import flash_attn_func

    full = window >= q.size(1) - 1
    out = flash_attn_func(q, k, v, softmax_scale=scale, causal=full, window_size=(None, None) if full else (window, 0))
    return out[0] if isinstance(out, tuple) else out


def unpack(wheels: Path, into: Path) -> list[str]:
    """Put the packages of a folder's wheels on this process's path, unpacked below `into`; their file names."""
    names = []
    for wheel in sorted(wheels.glob("*.whl")):
        if not (into / f"{wheel.name}.done").exists():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(into)
            (into / f"{wheel.name}.done").touch()
        names.append(wheel.name)
    site.addsitedir(str(into))  # some add paths of their own in a .pth file
    sys.path.insert(0, str(into))
    return names
