"""The GPU's script without a GPU: every step executed in its dry form, its watchdog, what stays of a step that fails,
the adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers import load
from job.machine.stack import LOCKED, differences, lines

HERE = Path(__file__).parent
STEPS = [
    "products",
    "attention",
    "compiled",
    "steps",
    "profile",
    "rates",
    "checkpoint",
    "tuned",
    "levers",
    "forks",
    "ranks",
    "resume",
    "doubled",
    "plain",
    "curves",
]
PATIENT = ("--budget", "1500", "--limit-factor", "10")
"""a machine that others use too"""


def script(out: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, str(HERE / "run.py"), "--out", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def outcomes(out: Path) -> dict[str, str]:
    return {step["name"]: step["outcome"] for step in json.loads((out / "gpu.json").read_text())["steps"]}


def module(name: str) -> ModuleType:
    """A module of this folder, which the script's own path has."""
    return load(HERE / f"{name}.py", f"gpu_{name}")


@pytest.mark.slow
def test_a_dry_run_executes_every_step(tmp_path: Path) -> None:
    ended = script(tmp_path, "--dry", *PATIENT)
    assert outcomes(tmp_path) == dict.fromkeys(STEPS, "holds"), ended.stdout
    assert ended.returncode == 0 and "DRY RUN" in ended.stdout
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"## {step}: " in page for step in STEPS) and page.startswith("# make gpu\n")
    assert "| fixed sums: tensors that differ | 0 |" in page and "| graph breaks | 0 |" in page
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.mark.slow
def test_a_step_that_raises_leaves_the_others(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "broken-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pydoc_data/__init__.py", "")
        wheel.writestr("pydoc_data/topics.py", "raise RuntimeError('no text today')")
    words = (
        "--dry",
        *PATIENT,
        "--only",
        "products",
        "--only",
        "steps",
        "--only",
        "forks",
        "--wheels",
        str(tmp_path / "wheels"),
    )
    ended = script(tmp_path / "out", *words, TMPDIR=str(tmp_path))
    assert outcomes(tmp_path / "out") == {
        "products": "holds",
        "steps": "raised RuntimeError: no text today",
        "forks": "holds",
    }
    assert ended.returncode == 1 and "from wheels: broken-1-py3-none-any.whl" in ended.stdout


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_stopped_and_the_next_one_begun(tmp_path: Path) -> None:
    ended = script(tmp_path, "--dry", "--limit-factor", "0.001", "--only", "products", "--only", "forks")
    assert outcomes(tmp_path) == {"products": "stopped after 0 s", "forks": "stopped after 0 s"}
    assert ended.returncode == 1


@pytest.mark.slow
def test_what_no_time_is_left_for_says_so(tmp_path: Path) -> None:
    script(tmp_path, "--dry", "--budget", "0")
    assert outcomes(tmp_path) == dict.fromkeys(STEPS, "no time was left for it")


def test_without_a_gpu_it_is_skipped_with_a_reason(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: `make gpu` uses it")
    ended = script(tmp_path)
    assert ended.returncode == 0 and ended.stdout.startswith("skipped: torch sees no GPU here")
    assert list(tmp_path.iterdir()) == []


# ---- what an older stack lacks


def test_the_adapter_takes_the_limit_where_compile_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo

    asked = []

    def older(function: object = None, *, fullgraph: bool = False, dynamic: bool | None = None) -> object:
        asked.append((function, fullgraph, dynamic))
        return function

    monkeypatch.setattr(torch, "compile", older)
    for name in ("reduce_scatter_single", "all_gather_single"):
        monkeypatch.delattr(torch.distributed, name)
    said = module("conftest").adapt()
    assert len(said) == 3 and torch.distributed.all_gather_single is torch.distributed.all_gather_into_tensor
    with torch._dynamo.config.patch(recompile_limit=8):  # monkeypatch would leave a setting that is gone
        assert torch.compile(len, fullgraph=True, dynamic=False, recompile_limit=64) is len
        layer = torch.nn.Linear(2, 2)
        layer.compile(fullgraph=True, dynamic=False, recompile_limit=64)
        assert torch._dynamo.config.recompile_limit == 64
    assert asked == [(len, True, False), (layer._call_impl, True, False)]


def test_this_torch_needs_no_adapter() -> None:
    assert module("conftest").adapt() == []


# ---- what a table names


def test_the_lock_s_versions_are_the_lock_s() -> None:
    lock = (HERE.parents[1] / "requirements-cuda.lock").read_text()
    assert all(f"\n{name}=={version} \\\n" in lock for name, version in LOCKED.items())


def test_a_pass_on_another_stack_is_none_of_the_image_s() -> None:
    locked = {
        "gpu": "NVIDIA H100 80GB HBM3",
        "gpus": 1,
        "driver": "580.1",
        "cuda": "13.0",
        "cudnn": 91500,
        "python": "3.11.7",
    }
    locked |= LOCKED | {"revision": None}
    assert differences(locked) == [] and lines(locked)[1].endswith("; the lock's versions")
    older = locked | {"torch": "2.11.0+cu130", "triton": "3.6.0", "flash-attn-4": None}
    assert differences(older) == [
        "torch 2.11.0 instead of 2.13.0",
        "triton 3.6.0 instead of 3.7.1",
        "flash-attn-4 missing instead of 4.0.0b12",
    ]
    assert (
        "not the lock's (torch 2.11.0 instead of 2.13.0, " in lines(older)[1]
        and "none of the image's" in lines(older)[1]
    )


@pytest.mark.parametrize(
    ("names", "counted"),
    [
        (["aten::_scaled_mm", "CompiledFunction", "speedrun: forward"], "fp8 products"),
        (
            ["triton_poi_fused__scaled_mm__to_copy_clamp_clone_2", "CompiledFunctionBackward"],
            "backward: quantising (maxima, casts, transposed copies)",
        ),
        (["aten::_scaled_mm", "speedrun: loss", "speedrun: forward"], "fp8 products"),
        (["triton_red_fused_log_sum_0", "speedrun: loss", "speedrun: forward"], "loss between its products"),
        (["torch_attn::_varlen_attn_backward", "CompiledFunctionBackward"], "attention"),
        (
            ["triton_red_fused_abs_amax_3", "CompiledFunctionBackward"],
            "backward: quantising (maxima, casts, transposed copies)",
        ),
        (["triton_poi_fused_mul_7", "CompiledFunctionBackward"], "backward: the rest"),
        (
            ["triton_red_fused_abs_amax_3", "CompiledFunction", "speedrun: forward"],
            "forward: norms, rotary, quantising and the rest",
        ),
        (["aten::embedding_dense_backward", "EmbeddingBackward0"], "tables: look-up and gradient"),
        (["aten::add_", "torch::autograd::AccumulateGrad"], "adding to the weights' gradients"),
        (["aten::mm", "speedrun: update"], "update (all of it, on one rank)"),
    ],
)
def test_a_kernel_is_counted_by_who_launched_it(
    monkeypatch: pytest.MonkeyPatch, names: list[str], counted: str
) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    profile = module("steps/profile")
    assert profile.component(names) == counted and counted in profile.MEASURED
