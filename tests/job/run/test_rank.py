"""A rank's side: what it imports; which failures are a lack of memory, and what is said then."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from job.run.rank import lacks_memory, memory_sentence

GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 3 has a total capacity of 79.11 GiB of which 1.20 GiB is"
    " free. "
    "See documentation for Memory Management"
)
REMEDY = "use a smaller train.device_batch_size or a machine with more memory"


def of_the_cpu() -> BaseException:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    return raised.value


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (torch.OutOfMemoryError(GPU), " (tried to allocate 2.50 GiB)"),
        (of_the_cpu(), " (tried to allocate 1152921504606846976 bytes)"),
        (MemoryError(), ""),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_a_lack_of_memory_is_one_sentence(error: BaseException, detail: str) -> None:
    assert lacks_memory(error)
    assert memory_sentence("pretrain", error) == f"pretrain ran out of memory{detail}; {REMEDY}"


def test_another_error_of_torch_is_none() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(2) @ torch.zeros(3)
    assert not lacks_memory(raised.value)


def test_a_cpu_run_imports_no_compiler() -> None:
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, job.train.loop, job.evaluation.stage; print('torch._dynamo' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "False\n", "it takes two seconds of every process"
