"""What needs no tensors, tables, pictures or bucket starts without their libraries, whose imports take seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from helpers import unpacked_run
from job.cli.commands import main

PROGRAM = """
import json, sys
from click.testing import CliRunner
from job.cli.commands import main

heavy = {"torch", "pyarrow", "matplotlib", "boto3", "botocore"}
for words, code, says in json.loads(sys.argv[1]):
    ended = CliRunner().invoke(main, words, prog_name="speedrun")
    assert ended.exit_code == code, (words, ended.output, ended.exception)
    assert says in ended.output, (words, ended.output)
    assert not heavy & set(sys.modules), (words, heavy & set(sys.modules))

import job.run.supervise
from job.machine.host import Machine
from job.recipe.config import resolve
from job.run import preflight
preflight.check(resolve("smoke"), 1, strict=False, allow_fa2=False, machine=Machine())
on_gpus = Machine(8, "NVIDIA H100 80GB HBM3", (9, 0))
preflight.check(resolve("run6", overrides=["train.attention=fa2"]), 8, strict=False, allow_fa2=True, machine=on_gpus)
assert "torch" not in sys.modules
"""


def test_help_plans_lists_and_usage_errors_import_nothing_heavy(tmp_path: Path) -> None:
    unpacked_run("interrupted", tmp_path)
    out = ["--out", str(tmp_path / "out")]
    lines = [
        (["--help"], 0, "Usage"),
        *(([name, "--help"], 0, "Usage") for name in main.commands),
        (["plan", "run6"], 0, "run6"),
        (["list", *out], 0, "interrupted"),
        (["list", *out, "--bucket", str(tmp_path)], 0, "no runs"),
        (["status", "interrupted", *out], 0, "Training has stopped"),
        (["presets"], 0, "free"),
        (["keys"], 0, "model.depth"),
        (["frobnicate"], 2, "no command"),
        (["run", "--nope"], 2, "--nope"),
        (["run", "--ranks", "x"], 2, "--ranks"),
        (["run", "--preset", "nope"], 2, "nope"),
        (["run", "-o", "train.nope=1"], 2, "train.nope"),
        (["run", "--bucket", "gs://x"], 2, "s3://"),
        (["evaluate", "--hf", "nowhere", *out], 11, "no Hugging Face model"),
        (["report", "--run-id", "nope", *out], 2, "no run nope"),
        (["run", "--preset", "smoke", "--ranks", "1", "--dry-run", *out], 0, "micro_steps"),
        (["pretrain", "--preset", "run6", "--ranks", "8", "--dry-run", *out], 10, "micro_steps"),  # no GPU here
    ]
    command = [sys.executable, "-c", PROGRAM, json.dumps(lines)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
