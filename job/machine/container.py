"""What a container lacks, said with the flag of `docker run` that mends it.

`check` is asked before a run is opened, so that nothing is paid for or begun in a container that cannot finish it.
Outside a container the same want is another sentence's business: every function here has nothing to say there.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from job.errors import PreflightError
from job.recipe.config import Recipe, preset_header

MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_NEEDED = 1 << 30
"""bytes of /dev/shm that NCCL is given for eight ranks (its own documentation asks for 1g); a container has 64 MiB
unless told otherwise"""


def inside() -> bool:
    """Whether this process runs in a container of Docker or Podman."""
    return any(mark.exists() for mark in MARKS)


def check(recipe: Recipe, ranks: int) -> None:
    """PreflightError, with the flag, for the first thing that `recipe` on `ranks` ranks will want and this container
    does not have."""
    if not inside():
        return
    made_for = preset_header(recipe.preset).machine
    if not on_gpu() and made_for != "cpu":
        raise PreflightError(
            f"preset {recipe.preset} is made for {made_for} and this container sees no GPU; start it with: docker run"
            " --gpus all "
            "--ipc=host --ulimit memlock=-1 ... (the host needs NVIDIA's container toolkit)"
        )
    if on_gpu() and ranks > 1 and (size := _bytes_of(SHARED_MEMORY)) < SHARED_MEMORY_NEEDED:
        raise PreflightError(
            f"{SHARED_MEMORY} has {size >> 20} MiB, and NCCL's ranks talk to each other through it; start the"
            " container with: docker run "
            "--ipc=host ..., or --shm-size=1g"
        )


def on_gpu() -> bool:
    return any(device.exists() for device in GPU_DEVICES)


def check_temporary_folder() -> None:
    """PreflightError in a container where temporary files, or what torch.compile loads from among them, have no
    place."""
    if not inside():
        return
    mend = "docker run --tmpfs /tmp:rw,exec,size=4g ..."
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        raise PreflightError(f"this container has no folder for temporary files; start it with: {mend}") from None
    if on_gpu() and os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise PreflightError(
            f"{folder} is mounted noexec and torch.compile loads what it has compiled from there; start it with: {mend}"
        )


def _bytes_of(folder: Path) -> int:
    facts = os.statvfs(folder)
    return facts.f_blocks * facts.f_frsize


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
