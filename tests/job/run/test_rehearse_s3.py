"""A whole rehearsal of two ranks on a real S3 server, machines lost too; a file of its own, so that a worker has it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_nothing_is_lost_on_s3(speedrun: Any, s3: Any, tmp_path: Path) -> None:
    words = ["rehearse", "--kills", "10", "--seed", "17", "--ranks", "2", "--out", str(tmp_path / "out")]
    there = dataclasses.replace(speedrun, variables=s3.variables())
    done = there(there.command(*words, "--bucket", s3.url), seconds=3000)
    assert done.stdout.startswith("nothing was lost: 10 kills, ")
    assert len(re.findall(r"^ *\d+\. ", done.stderr, re.M)) == 10
