"""The bytes that each lever leaves out of an H100's step, counted without one (tests/model/hopper_levers.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "model" / "hopper_levers.py"


def test_levers() -> None:
    assert subprocess.run([sys.executable, SCRIPT], check=False).returncode == 0
