"""SkyPilot's schema and optimizer on every YAML of sky/, offline, with a small catalog (optimize.py); its command
line on the README's lines."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ALL = ["aws", "lambda", "nebius"]
CASES = {
    "speedrun": ("speedrun", ALL, ("nebius", True, 10.00)),
    "speedrun, one cloud without spot": ("speedrun", ["lambda"], ("lambda", False, 31.92)),
    "speedrun, only a cloud that is too dear on demand": ("speedrun", ["aws"], ("aws", True, 10.20)),
    "nodes": ("nodes", ALL, ("nebius", True, 20.00)),
    "try": ("try", ALL, ("nebius", False, 2.95)),
    "try, a PCIe board would be cheaper": ("try", ["lambda"], ("lambda", False, 4.29)),
    "try, the dearest of its clouds": ("try", ["aws"], ("aws", False, 6.88)),
    "prepare": ("prepare", ALL, ("aws", True, 0.30)),
    "prepare, no spot": ("prepare", ["lambda"], ("lambda", False, 0.80)),
    "smoke": ("smoke", ALL, ("nebius", False, 0.0992)),
}
BROKEN = {
    "an unknown key": ("autostop:", "auto_stop:", "auto_stop"),
    "an unknown GPU": ("H100:8", "H199:8", "H199"),
    "a cap below every price": ("max_hourly_cost: 36", "max_hourly_cost: 3", "ResourcesUnavailable"),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def opinions(sky_env: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What SkyPilot says to every case; one process for all, since importing it takes seconds."""
    asked = {name: (ROOT / "sky" / f"{file}.yaml", clouds) for name, (file, clouds, _) in CASES.items()}
    good = (ROOT / "sky" / "speedrun.yaml").read_text()
    for name, (old, new, _) in BROKEN.items():
        assert old in good
        broken = tmp_path_factory.mktemp("broken") / "speedrun.yaml"
        broken.write_text(good.replace(old, new))
        asked[name] = (broken, ALL)
    words = [
        sky_env / "bin" / "python",
        Path(__file__).with_name("optimize.py"),
        json.dumps([[str(p), c] for p, c in asked.values()]),
    ]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return dict(zip(asked, json.loads(ended.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_skypilot_takes_it_and_rents_the_cheapest(case: str, opinions: dict[str, dict[str, Any]]) -> None:
    cloud, spot, dollars = CASES[case][2]
    said = opinions[case]
    assert "error" not in said, said
    assert (said["cloud"], said["spot"]) == (cloud, spot)
    assert said["dollars_an_hour"] == pytest.approx(dollars)
    assert said["autostop"] == [2, True]
    assert said["image"] == "ghcr.io/YOUR-NAME/gpt2-speedrun:latest"
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= set(said["secrets"])


@pytest.mark.parametrize("case", BROKEN)
def test_skypilot_refuses_what_is_broken(case: str, opinions: dict[str, dict[str, Any]]) -> None:
    assert BROKEN[case][2] in opinions[case].get("error", "taken")


STAND_IN = """#!/usr/bin/env bash
[ "$1" = launch ] || [ "$2" = launch ] || exit 0
python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@" >>"$CALLS"
"""


def test_the_readmes_lines_are_whole_tasks_to_skypilots_command_line(sky_env: Path, tmp_path: Path) -> None:
    """The block is run by bash, from the image's name on, with a `sky` and a `make` that write down what they are
    given."""
    section = (ROOT / "README.md").read_text().split("\n## On a cloud\n")[1]
    (block,) = re.findall(r"^    export IMAGE=.*?(?=^\S)", section, re.MULTILINE | re.DOTALL)
    for name in ("sky", "make"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    exported = subprocess.run(
        ["bash", "-euc", f"{block}\nenv -0"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    environment = dict(entry.split("=", 1) for entry in exported.stdout.rstrip("\0").split("\0"))
    lines = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [line[-1] for line in lines] == ["sky/smoke.yaml", "sky/try.yaml", "sky/speedrun.yaml"]

    words = [sky_env / "bin" / "python", Path(__file__).with_name("command_line.py"), json.dumps(lines)]
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for task in json.loads(ended.stdout.splitlines()[-1]):
        assert task["images"] == ["ghcr.io/me/gpt2-speedrun:1"]
        assert task["envs"]["BUCKET"] == "s3://my-bucket/gpt2"
        assert task["secrets"]["AWS_ACCESS_KEY_ID"] and task["secrets"]["AWS_SECRET_ACCESS_KEY"]
