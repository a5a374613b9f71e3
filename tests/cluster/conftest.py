"""SkyPilot's environment, and a real Slurm on this machine that `sky` launches on."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import free_ports

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SKY = ROOT / ".sky-env"
DEBIAN = {"slurmctld": "slurm-wlm", "munged": "munge", "sshd": "openssh-server", "rsync": "rsync", "setfacl": "acl"}

SPEEDRUN = """#!/usr/bin/env bash
# What the image's `speedrun` is on a node. The nodes share a disk here: each start gets a folder, as on a new machine.
out={state}/disks/$SLURM_JOB_ID.$SLURMD_NODENAME words=()
mkdir -p "$out"
date +%s.%N >"$out/started"
for word in "$@"; do
    case "$word" in
    "$HOME/out") words+=("$out") ;;
    --strict | --allow-fa2) ;; # they refuse a node without a GPU
    *) words+=("$word") ;;
    esac
done
exec {root}/.venv/bin/speedrun "${{words[@]}}"
"""


@dataclasses.dataclass
class Cluster:
    """A Slurm of two nodes and the SkyPilot that rents them; `state` holds everything that it writes."""

    state: Path
    environment: dict[str, str]

    def sky(self, *words: str, seconds: int = 300) -> subprocess.Popen[bytes]:
        """`sky words ...`, bounded by `timeout`; what it says goes to log/sky.log."""
        with open(self.state / "log" / "sky.log", "ab") as log:
            bounded = ["timeout", "--kill-after=10", str(seconds), str(SKY / "bin" / "sky"), *words]
            return subprocess.Popen(
                bounded, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, cwd=self.state
            )

    def call(self, *words: str, seconds: int = 300) -> None:
        code = self.sky(*words, seconds=seconds).wait()
        assert code == 0, f"sky {' '.join(words)} ended with {code}\n{self.said()}"

    def said(self) -> str:
        return (self.state / "log" / "sky.log").read_text(errors="replace")[-6000:]

    def slurm(self, *words: str) -> str:
        return subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()

    def task(self, name: str, **resources: Any) -> Path:
        """sky/NAME.yaml with `resources` instead of a cloud's; envs, secrets and `run:` are those that users launch."""
        task = yaml.safe_load((ROOT / "sky" / f"{name}.yaml").read_text())
        task["resources"] = {"infra": "slurm", "job_recovery": task["resources"]["job_recovery"], **resources}
        task.pop("config", None)
        path = self.state / f"{name}.yaml"
        path.write_text(yaml.safe_dump(task, sort_keys=False))
        return path

    def given(self, s3: Any, **envs: str) -> list[str]:
        """What a user adds to the command line: the bucket, its endpoint, the keys."""
        variables = s3.variables()
        envs |= {"BUCKET": s3.url, "AWS_ENDPOINT_URL": variables["AWS_ENDPOINT_URL"], "AWS_DEFAULT_REGION": "us-east-1"}
        keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        words = [word for name, value in envs.items() for word in ("--env", f"{name}={value}")]
        return words + [word for name in keys for word in ("--secret", f"{name}={variables[name]}")]


@pytest.fixture(scope="session")
def cluster(sky_env: Path) -> Iterator[Cluster]:
    """Slurm and SkyPilot's API server, up; afterwards everything is down and put back."""
    missing = sorted(
        {
            package
            for command, package in DEBIAN.items()
            if not shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin")
        }
    )
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"a Slurm of one's own needs root and Debian's {', '.join(missing or DEBIAN.values())} "
            "(.ci/run installs them)"
        )
    state = Path(tempfile.mkdtemp(prefix="speedrun-cluster-", dir="/var/tmp"))
    state.chmod(0o755)
    *ports, api = free_ports(5)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SKYPILOT_"))} | {
        "HOME": str(state / "home"),
        "PATH": f"{sky_env / 'bin'}:{os.environ['PATH']}",
        "SLURM_CONF": str(state / "slurm.conf"),
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        "SKYPILOT_API_SERVER_LOCAL_PORT": str(api),
        "SKYPILOT_POD_MEMORY_GB_LIMIT": "8",  # two job controllers instead of one for each 800 MB of the machine
    }
    made = Cluster(state, environment)
    try:
        subprocess.run([HERE / "slurm-up", state, sky_env, *map(str, ports)], check=True, timeout=120)
        command = state / "user" / ".local" / "bin" / "speedrun"
        command.write_text(SPEEDRUN.format(state=state, root=ROOT))
        command.chmod(0o755)
        (state / "disks").mkdir(mode=0o777)
        (state / "disks").chmod(0o777)
        # SkyPilot gives its server a minute to come up, which busy cores do not keep to; asked again, it finds it
        if all(made.sky("api", "start").wait() for _ in range(3)):
            pytest.fail(f"SkyPilot's API server did not start\n{made.said()}")
        yield made
    finally:
        made.sky("api", "stop", seconds=120).wait()
        subprocess.run([HERE / "slurm-down", state], timeout=60, check=False)
        shutil.rmtree(state, ignore_errors=True)
