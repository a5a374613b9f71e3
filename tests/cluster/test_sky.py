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
ALL = ["aws", "azure", "gcp", "lambda", "nebius", "runpod"]
TABLE = {
    "speedrun": {
        "nebius": ("eu-north1", "gpu-h100-sxm_8gpu-128vcpu-1600gb", True, 10.00),
        "aws": ("us-east-2", "p5.48xlarge", True, 11.2543),
        "gcp": ("europe-north1", "a3-highgpu-8g", True, 10.6952 + 1.61762),
        "lambda": (None, "gpu_8x_h100_sxm5", False, 31.92),
    },
    "try": {
        "nebius": ("eu-north1", "gpu-h100-sxm_1gpu-16vcpu-200gb", False, 2.95),
        "aws": (None, "p5.4xlarge", False, 6.88),
        "lambda": (None, "gpu_1x_h100_sxm5", False, 4.29),  # a PCIe board would be cheaper
    },
    "try8": {
        "nebius": ("eu-north1", "gpu-h100-sxm_8gpu-128vcpu-1600gb", False, 23.60),
        "lambda": (None, "gpu_8x_h100_sxm5", False, 31.92),
    },
    "prepare": {
        "nebius": (None, "cpu-d3_16vcpu-64gb", False, 0.3968),
        "aws": ("us-east-2", "m6i.4xlarge", True, 0.2414),
        "lambda": (None, "gpu_1x_a10", False, 1.29),
    },
    "smoke": {
        "nebius": (None, "cpu-d3_4vcpu-16gb", False, 0.0992),
        "aws": ("us-east-2", "m6i.xlarge", False, 0.192),
        "lambda": (None, "cpu_4x_general", False, 0.20),
    },
}
"""what is rented where one cloud is enabled: region (None where several cost the same), type, spot, dollars an hour"""
NOT_ENABLED = "which are not enabled. To enable access, change the task cloud requirement or run"
IMAGE = {"image_id": "docker:ghcr.io/me/gpt2-speedrun:1"}
AWS = {"cloud": "aws", "region": "us-east-2", "use_spot": False}
CASES: dict[str, tuple[str, list[str], dict[str, Any], Any]] = {
    **{f"{file} on {cloud}": (file, [cloud], {}, row) for file, rows in TABLE.items() for cloud, row in rows.items()},
    **{
        f"{file} on {cloud}": (file, [cloud], {}, NOT_ENABLED)
        for file in ("speedrun", "try", "try8")
        for cloud in ALL
        if cloud not in TABLE[file]
    },
    **{f"{file} on all": (file, ALL, {}, TABLE[file]["nebius"]) for file in ("speedrun", "try", "try8", "smoke")},
    "prepare on all": ("prepare", ALL, {}, TABLE["prepare"]["aws"]),
    "on demand, no type named": ("speedrun", ALL, IMAGE | AWS, "Max hourly cost limit ($33"),
    "on demand, by name": (
        "speedrun",
        ALL,
        IMAGE | AWS | {"instance_type": "p5.48xlarge"},
        ("us-east-2", "p5.48xlarge", False, 55.04),
    ),
    "on GCP no cap is looked at": (
        "speedrun",
        ALL,
        IMAGE | {"cloud": "gcp", "region": "us-central1", "use_spot": False},
        ("us-central1", "a3-highgpu-8g", False, 33.60609 + 9.46006),
    ),
    "Lambda has one kind of disk": (
        "speedrun",
        ALL,
        IMAGE | {"cloud": "lambda", "region": "*", "zone": "*"},
        "Disk tier high is not supported",
    ),
    "Lambda by name": (
        "speedrun",
        ALL,
        IMAGE | {"cloud": "lambda", "region": "*", "zone": "*", "disk_tier": "best"},
        TABLE["speedrun"]["lambda"],
    ),
}
BROKEN = {
    "an unknown key": ("autostop:", "auto_stop:", "auto_stop"),
    "an unknown GPU": ("H100:8", "H199:8", "H199"),
    "a cap below every price": ("_cost: ", "_cost: 0.0", "ResourcesUnavailable"),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def opinions(sky_env: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What SkyPilot says to every case; one process for all, since importing it takes seconds."""
    asked = {name: (f"{ROOT}/sky/{file}.yaml", clouds, options) for name, (file, clouds, options, _) in CASES.items()}
    good = (ROOT / "sky" / "speedrun.yaml").read_text()
    for name, (old, new, _) in BROKEN.items():
        assert old in good
        broken = tmp_path_factory.mktemp("broken") / "speedrun.yaml"
        broken.write_text(good.replace(old, new))
        asked[name] = (str(broken), ["aws", "lambda", "nebius"], {})
    words = [
        sky_env / "bin" / "python",
        Path(__file__).with_name("optimize.py"),
        json.dumps(list(asked.values())),
    ]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return dict(zip(asked, json.loads(ended.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_skypilot_rents_what_the_table_says_or_refuses(case: str, opinions: dict[str, dict[str, Any]]) -> None:
    *_, options, expected = CASES[case]
    said = opinions[case]
    if isinstance(expected, str):
        assert expected in said.get("error", said)
        return
    assert "error" not in said, said
    region, instance, spot, dollars = expected
    assert (said["region"] if region else None, said["instance"], said["spot"]) == (region, instance, spot)
    assert said["dollars_an_hour"] == pytest.approx(dollars)
    assert said["autostop"] == [2, True]
    assert said["image"] == ("ghcr.io/me/gpt2-speedrun:1" if options else "ghcr.io/YOUR-NAME/gpt2-speedrun:latest")
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= set(said["secrets"])


@pytest.mark.parametrize("case", BROKEN)
def test_skypilot_refuses_what_is_broken(case: str, opinions: dict[str, dict[str, Any]]) -> None:
    assert BROKEN[case][2] in opinions[case].get("error", "taken")


STAND_IN = """#!/usr/bin/env bash
python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@" >>"$CALLS"
"""


def test_the_documents_lines_are_whole_to_skypilots_command_line(sky_env: Path, tmp_path: Path) -> None:
    """The README's block and every `sky` line of both documents are run by bash, with a `sky` and a `make` that write
    down what they are given."""
    readme = (ROOT / "README.md").read_text().split("\n## On a cloud\n")[1].split("\n## ")[0]
    cloud = (ROOT / "docs/cloud.md").read_text()
    own = re.findall(r"^    (?:export|MINE=).*", readme, re.MULTILINE)
    lines = re.findall(r"^    (sky .*)", readme + cloud, re.MULTILINE)
    script = "\n".join([*(line for line in own if "PATH=" not in line), *lines])
    (tmp_path / "sky").write_text(STAND_IN)
    (tmp_path / "sky").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    exported = subprocess.run(
        ["bash", "-euc", f"{script}\nenv -0"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    environment = dict(entry.split("=", 1) for entry in exported.stdout.rstrip("\0").split("\0"))
    words = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    command = [sky_env / "bin" / "python", Path(__file__).with_name("command_line.py"), json.dumps(words)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    tasks = [task for task in json.loads(ended.stdout.splitlines()[-1]) if task]
    files = [line[-1] for line in words if "launch" in line]
    assert files[:4] == [f"sky/{name}.yaml" for name in ("smoke", "try", "try8", "speedrun")]
    assert set(files[4:]) == {"sky/speedrun.yaml"} and len(files) == len(tasks)
    for task in tasks:
        assert task["images"] == ["ghcr.io/me/gpt2-speedrun:1"]
        assert task["envs"]["BUCKET"] == "s3://my-bucket/gpt2"
        assert task["secrets"]["AWS_ACCESS_KEY_ID"] and task["secrets"]["AWS_SECRET_ACCESS_KEY"]
    assert [(task["rows"], task["nodes"]) for task in tasks[4:]] == [
        (["nebius/eu-north1 False", "nebius/eu-north1 True"], 1),
        (["aws/us-east-2 True"], 1),
        (["gcp/europe-north1 True"], 1),  # on demand it would be $96.71, and no cap is looked at there
        (["lambda False", "lambda True"], 1),
        (["aws/us-east-2 False"], 1),
        (["gcp/us-central1 False"], 1),
        (["nebius/eu-north1 False", "nebius/eu-north1 True"], 2),
    ]
