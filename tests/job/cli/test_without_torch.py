"""What needs no tensors starts without torch, whose import takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import click
from job.cli.commands import main
try:
    main(sys.argv[1:], standalone_mode=False)
except click.ClickException as error:
    print(error.message)
import job.run.supervise
from job.machine.host import Machine
from job.recipe.config import resolve
from job.run import preflight
preflight.check(resolve("smoke"), 1, strict=False, allow_fa2=False, machine=Machine())
on_gpus = Machine(8, "NVIDIA H100 80GB HBM3", (9, 0))
preflight.check(resolve("run6", overrides=["train.attention=fa2"]), 8, strict=False, allow_fa2=True, machine=on_gpus)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--help"], "Usage"),
        (["plan", "--preset", "run6"], "run6"),
        (["run", "--nope"], "--nope"),
        (["run", "-o", "train.nope=1"], "train.nope"),
        (["run", "--preset", "smoke", "--ranks", "1", "--dry-run"], "micro_steps"),
        (["pretrain", "--preset", "run6", "--ranks", "8", "--dry-run"], "micro_steps"),
    ],
    ids=" ".join,
)
def test_no_torch(tmp_path: Path, words: list[str], says: str) -> None:
    out = ["--out", str(tmp_path)] if "--dry-run" in words else []
    ended = subprocess.run([sys.executable, "-c", PROGRAM, *words, *out], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert says in ended.stdout + ended.stderr
