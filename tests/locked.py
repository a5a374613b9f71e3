"""Packages of the CUDA lock in an environment of their own: what it takes to compile for a GPU on a machine that has
none."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "requirements-cuda.lock"


class Unavailable(Exception):
    """The packages cannot be had here: pip's last line."""


def environment(folder: Path, packages: str) -> Path:
    """The Python of a new environment in `folder` with all that this one has and, as the lock pins them, the
    `packages` (a regex)."""
    python, lock = folder / "bin" / "python", folder / "packages.lock"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
    lock.write_text("".join(re.findall(rf"^(?:{packages})==[^\n]+\n(?: [^\n]+\n)*", LOCK.read_text(), re.M)))
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", lock]
    got = subprocess.run(install, capture_output=True, text=True, check=False)
    if got.returncode:
        raise Unavailable(got.stderr.strip().splitlines()[-1])
    return python
