"""A rank's side: what it imports; which failures are a lack of memory, and what is said then."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from job.run.rank import BROKEN_DEVICE, lacks_memory, memory_sentence

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


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error, NCCL version 2.29\nncclUnhandledCudaError: Call to CUDA"
        " function failed.\nLast error:\nFailed to CUDA calloc 6291456 bytes",
        "NCCL error: ncclUnhandledCudaError\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_a_lack_of_memory_outside_torchs_allocator_is_one_too(text: str) -> None:
    assert lacks_memory(RuntimeError(text))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "CUDA error: uncorrectable ECC error encountered\nSearch for",
            "CUDA error: uncorrectable ECC error encountered",
        ),
        (
            "CUDA error: an illegal memory access was encountered",
            "CUDA error: an illegal memory access was encountered",
        ),
        ("CUDA error: unspecified launch failure", "CUDA error: unspecified launch failure"),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `x`", "CUBLAS_STATUS_EXECUTION_FAILED"),
        ("NCCL error in: a.cpp\nncclRemoteError: A call failed possibly", "ncclRemoteError: A call failed possibly"),
        ("CUDA error: invalid argument", None),
        ("CUDA error: device-side assert triggered", None),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_what_a_broken_device_says(text: str, found: str | None) -> None:
    """The texts are CUDA's, cuBLAS's and NCCL's own; whether torch passes them on so, no GPU has shown here."""
    match = BROKEN_DEVICE.search(text)
    assert (match and match[0]) == found
    assert not lacks_memory(RuntimeError(text))


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
