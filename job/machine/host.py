"""What this machine is: processor, cores, and the precision it computes fast in."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.machine import cgroup, cloud

if TYPE_CHECKING:
    import torch


REVISION, IMAGE = "SPEEDRUN_REVISION", "SPEEDRUN_IMAGE"
"""the environment variables in which an image names the commit that it was built from, and itself"""
INSTALLED_LOCK = "installed.lock"
"""what an environment was installed from, a copy in its folder (Makefile, Dockerfile)"""


def usable_cores() -> int:
    """Cores this process may run on, or the whole ones of a smaller quota (a container's --cpus)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup.cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def memory_bytes() -> int:
    """The machine's memory, or what this control group may use of it if that is less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(whole, cgroup.memory_limit() or whole)


def available_memory() -> int | None:
    """Bytes that this process may still take, of its machine's or control group's if less; None where nobody says."""
    found = [cgroup.memory_left()]
    with contextlib.suppress(OSError, KeyError):
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    return min((left for left in found if left is not None), default=None)


@dataclasses.dataclass(frozen=True)
class Machine:
    """The GPUs that torch sees: how many, and the first one's name and compute capability (None without a GPU)."""

    gpus: int = 0
    name: str = ""
    capability: tuple[int, int] | None = None


def gpu_count() -> int:
    """GPUs that torch sees; torch (seconds to import) is asked only where it is loaded or NVIDIA's driver is there."""
    drivers = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/dxg")
    if "torch" not in sys.modules and not any(Path(device).exists() for device in drivers):
        return 0
    import torch

    return torch.cuda.device_count()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The processor's feature flags as Linux names them; empty elsewhere."""
    return frozenset(_cpuinfo("flags").split())


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    """What Linux says of the first processor; empty elsewhere."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
    return ""


def has_fast_bf16() -> bool:
    """Whether this CPU has bf16 matrix instructions (AMX or AVX512-BF16)."""
    return bool(cpu_flags() & {"amx_bf16", "avx512_bf16"})


def computes_in_bf16(wanted: str, gpu: bool) -> bool:
    """Whether activations are bf16: as the recipe says, or for "auto" where that is fast (`gpu`: on any)."""
    return wanted == "bf16" or (wanted == "auto" and (gpu or has_fast_bf16()))


def compute_dtype(wanted: str, gpu: bool = False) -> torch.dtype:
    """The dtype of activations: bf16 or fp32."""
    import torch

    return torch.bfloat16 if computes_in_bf16(wanted, gpu) else torch.float32


def gpu_names() -> str:
    """Names, compute capabilities and driver of the GPUs as nvidia-smi lists them, each kind once; empty if none."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    return "; ".join(sorted(set((printed(query, seconds=60) or "").splitlines())))


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those `packages` that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def describe() -> dict[str, Any]:
    """Fields of the event attempt.started: host, its boot and whether it is rented, versions, CPU and provenance."""
    cpu = {"model": cpu_name(), "cores": usable_cores(), "bf16": has_fast_bf16()}
    known = versions("torch", "torchao", "numpy", "rustbpe", "tiktoken", "gpt2-speedrun")
    here = {"host": platform.node(), "boot": cloud.boot(), "rented": cloud.rental() is not None}
    return {**here, "versions": known, "cpu": cpu, "provenance": provenance()}


def provenance() -> dict[str, Any]:
    """Commit, image, SHA-256 of the environment's lock, driver, names of the GPUs; None or empty where nobody says."""
    lock, gpus = Path(sys.prefix) / INSTALLED_LOCK, Path("/proc/driver/nvidia/gpus")
    named = [re.search(r"^Model:\s*(.+)", file.read_text(), re.MULTILINE) for file in gpus.glob("*/information")]
    return {
        "commit": revision(),
        "image": os.environ.get(IMAGE) or None,
        "lock": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None,
        "driver": driver(),
        "gpus": [found[1].strip() for found in named if found],
    }


def driver() -> str | None:
    """NVIDIA's driver's version, as its kernel module says, or nvidia-smi where that is silent; None without one."""
    with contextlib.suppress(OSError):
        if found := re.search(r"\d+\.\d+[.\d]*", Path("/proc/driver/nvidia/version").read_text()):
            return found[0]
    listed = printed(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or ""
    return next(iter(listed.split()), None)


def revision() -> str | None:
    """The commit that this program is of: as its image says, or git where it runs from a clone; None elsewhere."""
    if name := os.environ.get(REVISION):
        return name
    clone = Path(__file__).resolve().parents[2]
    if not (clone / ".git").exists():  # installed: a repository further up is somebody else's
        return None
    named = printed(["git", "-C", str(clone), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
    return named and named.strip()


def printed(command: Sequence[str], seconds: float = 20.0) -> str | None:
    """What `command` prints; None where it is not there, fails or takes longer. (Without the persistence daemon each
    nvidia-smi wakes all GPUs first.)"""
    with contextlib.suppress(OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds).stdout
    return None
