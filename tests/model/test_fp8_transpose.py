"""The transposing kernel: what it computes, by Triton's interpreter, and that it becomes machine code for an H100."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import locked

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = """
import torch
from model.fp8_transpose import TILE
from model.fp8_transpose_kernel import transpose_kernel
for rows, columns in ((256, 128), (272, 144), (16, 48)):
    x = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    out = torch.full((columns + 1, rows), 7, dtype=torch.uint8)
    transpose_kernel[-(-rows // TILE), -(-columns // TILE)](x, out, rows, columns, TILE=TILE)
    assert torch.equal(out[:-1], x.t()) and (out[-1] == 7).all()
"""
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from model.fp8_transpose import TILE
from model.fp8_transpose_kernel import transpose_kernel
source = ASTSource(transpose_kernel, {"x": "*u8", "out": "*u8", "rows": "i32", "columns": "i32", "TILE": "constexpr"},
                   {"TILE": TILE}, {(i,): [["tt.divisibility", 16]] for i in range(4)})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
assert compiled.asm["cubin"] and "st.global.v4" in compiled.asm["ptx"] and "ld.global.v4" in compiled.asm["ptx"]
"""


@pytest.mark.slow
def test_the_kernel_by_the_interpreter_and_for_hopper(tmp_path: Path) -> None:
    try:
        python = locked.environment(tmp_path / "env", "triton")
    except locked.Unavailable as error:
        pytest.skip(f"the locked Triton cannot be had here: {error}")
    for program, more in ((INTERPRETED, {"TRITON_INTERPRET": "1"}), (COMPILED, {"TRITON_CACHE_DIR": str(tmp_path)})):
        ended = subprocess.run(
            [python, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | more
        )
        assert ended.returncode == 0, ended.stderr
