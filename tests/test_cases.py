"""The cases of tests/cases: what users did that once went wrong, as they would do it, in a shell."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = sorted((Path(__file__).parent / "cases").glob("[0-9]*.sh"))
QUICK = ("01-", "04-", "05-", "22-", "36-")
FOREIGN = ("12-", "14-", "15-")
"""of models from elsewhere"""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.stem, marks=[] if case.name.startswith(QUICK) else pytest.mark.slow) for case in CASES],
)
def test_case(case: Path) -> None:
    if case.name.startswith(FOREIGN) and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: make hf")
    command = Path(sys.executable).with_name("speedrun")
    ended = subprocess.run(
        [str(case)],
        env=os.environ | {"SPEEDRUN": str(command)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
