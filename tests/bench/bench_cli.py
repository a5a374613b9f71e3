"""Seconds until a command that computes little has answered: a process each, the fastest of five.

pytest tests/bench/bench_cli.py --override-ini "python_files=bench_*.py" --capture=no
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

from helpers import unpacked_run

TURNS = 5


def test_seconds_until_the_answer(tmp_path: Path) -> None:
    unpacked_run("interrupted", tmp_path)
    lines = ("--help", "run --nope", "run --preset nope", "plan run6", "presets", "keys", "list", "status interrupted")
    print(f"\n{'speedrun ...':<24}{'wall s':>8}{'CPU s':>8}")
    for line in lines:
        walls, processors = [], []
        for _ in range(TURNS):
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            command = [sys.executable, "-m", "job.cli", *line.split()]
            subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
            walls.append(time.perf_counter() - began)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            processors.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        print(f"{line:<24}{min(walls):>8.2f}{min(processors):>8.2f}")
