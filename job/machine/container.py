"""What a container lacks, said with the flag of `docker run` that mends it.

`check` is asked before a run is opened, so that nothing is paid for or begun in a container that cannot finish it.
Outside a container the same want is another sentence's business: every function here has nothing to say there.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from job.errors import PreflightError
from job.recipe.config import Recipe, preset_header

MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_NEEDED = 1 << 30
"""bytes of /dev/shm for NCCL's eight ranks (its documentation asks for 1g); a container has 64 MiB by default"""

TEMPORARY_FLAG = "docker run --tmpfs /tmp:rw,exec,size=4g ..."


def inside() -> bool:
    """Whether this process runs in a container of Docker or Podman."""
    return any(mark.exists() for mark in MARKS)


def check(recipe: Recipe) -> None:
    """PreflightError, with the flag, where `recipe` is made for GPUs and this container sees none."""
    if not inside():
        return
    made_for = preset_header(recipe.preset).machine
    if not on_gpu() and made_for != "cpu":
        raise PreflightError(
            f"preset {recipe.preset} is made for {made_for} and this container sees no GPU; start it with: docker run"
            " --gpus all --ipc=host --ulimit memlock=-1 ... (the host needs NVIDIA's container toolkit)"
        )


def on_gpu() -> bool:
    return any(device.exists() for device in GPU_DEVICES)


def check_temporary_folder() -> None:
    """PreflightError in a container where temporary files have no place."""
    if not inside():
        return
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        said = f"this container has no folder for temporary files; start it with: {TEMPORARY_FLAG}"
        raise PreflightError(said) from None


def shared_memory() -> int | None:
    """Bytes of /dev/shm; None where there is none (macOS)."""
    with contextlib.suppress(OSError):
        facts = os.statvfs(SHARED_MEMORY)
        return facts.f_blocks * facts.f_frsize
    return None


def remedy_for(out: Path) -> str:
    """How a container comes by an `out` that it can write."""
    place, user = out.absolute(), os.getuid()
    if not _is_mounted(place):
        flag = f"docker run --volume DIR:{place} ..."
        return f"mount a folder that user {user} may write: {flag} (what is not mounted would be lost)"
    return (
        f"on the host, give the mounted folder to this user (chown {user} DIR), or start the container as its owner "
        "(docker run --user $(id -u):$(id -g) ...), and mount it without :ro"
    )


def _is_mounted(place: Path) -> bool:
    """Whether `place` lies in a file system of its own, below the container's root."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return os.stat(place).st_dev != os.stat("/").st_dev


def memory_remedy() -> str:
    return "give the container more (docker run --memory ...)" if inside() else "take a machine with more memory"
