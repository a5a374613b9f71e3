"""FlashAttention 4 as the CUDA lock pins it, called by torch's own wrapper, compiled for a Hopper GPU by a machine
that has none.

The kernels' compiler runs anywhere and is told the target; tensors are fake ones. Only its last step, which asks for
a driver, is left out. What is seen: the locked versions fit each other, torch's call fits theirs (arguments and
number of values), and forward and backward, full and windowed, become machine code for sm_90a. What is not: a result;
on a GPU `model.attention.prove` looks at that.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import locked

PACKAGES = r"flash-attn-4|quack-kernels|nvidia-cutlass-dsl\S*|cuda-\w+|apache-tvm-ffi|torch-c-dlpack-ext|einops"
COMPILE = """
import json
import torch
from cutlass.base_dsl.compiler import Compiler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import _fa4

Compiler._check_cuda_dependencies_once = lambda *_: None
_fa4._fa4_import_module("flash_attn.cute.interface")
_fa4._FA4_MODULE_PATH = "flash_attn.cute.interface"
B, T, H, D = 2, 2048, 11, 128
said = []
for left in (-1, 768):
    with FakeTensorMode():
        q, k, v, g = (torch.empty(B * T, H, D, dtype=torch.bfloat16, device="cuda") for _ in range(4))
        starts = torch.empty(B + 1, dtype=torch.int32, device="cuda")
        out, lse = _fa4._fa4_run_forward(q, k, v, starts, starts, T, T, None, False, left, 0, None)
        gradients = _fa4._fa4_run_backward(g, q, k, v, out, lse, starts, starts, None, False, left, 0)
        said.append([[*x.shape, str(x.dtype)] for x in (out, lse, *gradients)])
print(json.dumps(said))
"""


@pytest.mark.slow
def test_the_locked_kernels_compile_for_hopper_as_torch_calls_them(tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    dump.mkdir()
    try:
        python = locked.environment(tmp_path / "env", PACKAGES)
    except locked.Unavailable as error:
        pytest.skip(f"the locked kernels cannot be had here: {error}")

    target = {
        "FLASH_ATTENTION_ARCH": "sm_90",
        "CUTE_DSL_ARCH": "sm_90a",
        "CUTE_DSL_KEEP_CUBIN": "1",
        "CUTE_DSL_DUMP_DIR": str(dump),
    }
    ended = subprocess.run(
        [python, "-c", COMPILE], capture_output=True, text=True, env=os.environ | target, check=False
    )
    assert ended.returncode == 0, ended.stderr
    data, statistics = [2 * 2048, 11, 128, "torch.bfloat16"], [11, 2 * 2048, "torch.float32"]
    assert json.loads(ended.stdout.splitlines()[-1]) == [[data, statistics, data, data, data]] * 2
    code = [path.name for path in dump.glob("*.sm_90a.cubin")]  # the two kinds of window have one name
    assert all(
        any(kernel in name for name in code) for kernel in ("FlashAttentionForwardSm90", "FlashAttentionBackwardSm90")
    )
