"""The `sky` image in the hands of SkyPilot's own code (provision.py): provisioned, set up, a job run and its log and
results fetched; and without HOME."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import free_ports
from job.store.sealed import open_sealed

pytestmark = pytest.mark.slow

HOME = "ENV HOME=/home/speedrun\n"
SUDO = """#!/bin/sh
# SkyPilot's `sudo docker ...` goes through; what else it would change (users, services) is not done to this machine.
[ "$1" = docker ] || exit 0
exec "$@"
"""


@dataclasses.dataclass
class Rented:
    """A rented machine as SkyPilot sees it: a home with its key, a `sudo`, `docker`. `container` is what SkyPilot
    starts on it."""

    engine: Any
    home: Path
    port: int
    python: Path

    @property
    def container(self) -> str:
        return f"sky_container_{self.port}"

    def provision(self, image: str, *run_options: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.home / 'bin'}:{self.engine.environment['PATH']}"
        environment = self.engine.environment | {"HOME": str(self.home), "PATH": path}
        words = [str(self.python), str(Path(__file__).with_name("provision.py")), image, self.container, str(self.port)]
        words += [str(self.home / ".ssh/key"), *run_options]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)

    def log(self) -> str:
        return (self.home / "provision.log").read_text(errors="replace")[-6000:]


@contextlib.contextmanager
def rented(engine: Any, sky_env: Path, home: Path) -> Iterator[Rented]:
    """The container, with the sshd in it, is gone at the end."""
    (port,) = free_ports(1)
    (home / ".ssh").mkdir(mode=0o700)
    (home / "bin").mkdir()
    (home / "bin/sudo").write_text(SUDO)
    (home / "bin/sudo").chmod(0o755)
    key = home / ".ssh/key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    (home / ".ssh/authorized_keys").write_text(key.with_suffix(".pub").read_text())
    machine = Rented(engine, home, port, sky_env / "bin/python")
    try:
        yield machine
    finally:
        machine.engine.run(["docker", "rm", "--force", machine.container])
        Path(f"/tmp/{machine.container}.sky.lifecycle.lock").unlink(missing_ok=True)


def said(ended: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What the login saw, and exit codes; SkyPilot prints around them."""
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


def run_options(repository: Path) -> list[str]:
    return yaml.safe_load((repository / "sky/speedrun.yaml").read_text())["config"]["docker"]["run_options"]


@pytest.fixture(scope="module")
def provisioned(
    sky_image: Any, sky_env: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Rented, dict[str, str], dict[str, int]]]:
    """A machine on which SkyPilot has done all that provision.py does; what the login saw; exit codes."""
    with rented(sky_image.engine, sky_env, tmp_path_factory.mktemp("rented")) as machine:
        ended = machine.provision(sky_image.name, *run_options(repository))
        assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr[-3000:]}\n{machine.log()}"
        yield machine, *said(ended)


def test_what_skypilot_sends_arrives_in_the_home_of_the_images_user(provisioned: Any) -> None:
    machine, seen, _ = provisioned
    assert seen["speedrun"].endswith("/bin/speedrun"), "the YAMLs call it by name"
    assert (seen["HOME"], seen["user"], seen["writable"]) == ("/home/speedrun", "speedrun", "yes")
    inside = ["exec", machine.container, "bash", "-c", "cat ~/.sky/sent; stat --format=%U ~/.sky/sent ~ ~/.ssh"]
    assert machine.engine.docker(*inside).splitlines() == ["a file of SkyPilot's own", *["speedrun"] * 3]


def test_the_set_up_of_each_cloud_succeeds_as_far_as_it_fetches_nothing(provisioned: Any) -> None:
    machine, _, codes = provisioned
    assert [codes[name] for name in ("nebius", "aws", "gcp", "lambda")] == [0] * 4, machine.log()
    inside = "stat --format=%U ~/sky_workdir ~/.sky/sky_app; cat ~/.sky/ray_port.json"
    *owners, ports = machine.engine.docker("exec", machine.container, "bash", "-c", inside).splitlines()
    assert (owners, json.loads(ports)["ray_port"]) == (["speedrun"] * 2, 6380)


def test_a_jobs_log_and_exit_code_and_what_it_made_come_back(provisioned: Any) -> None:
    machine, _, codes = provisioned
    log = (machine.home / "sky_logs/smoke/run.log").read_text()
    assert codes["smoke"] == 0, log[-3000:]
    assert log.splitlines()[-1].endswith("/home/speedrun/out/runs/smoke/report/report.html")
    report = open_sealed(machine.home / "report", kind="report")
    assert json.loads((report.path / "result.json").read_text())["state"] == "complete"
    assert codes["nosuch"] == 2
    assert "nosuch" in (machine.home / "sky_logs/nosuch/run.log").read_text()


def test_without_home_in_the_image_nothing_arrives(
    sky_image: Any, sky_env: Path, sky_build: tuple[str, ...], repository: Path, tmp_path: Path
) -> None:
    """Each login's home is root's then, and the folder for SkyPilot's first file is refused."""
    text = (repository / "Dockerfile").read_text()
    assert text.count(HOME) == 1
    (tmp_path / "Dockerfile").write_text(text.replace(HOME, ""))
    homeless = f"{sky_image.name}-homeless"
    sky_image.engine.build(repository, homeless, *sky_build, f"--file={tmp_path / 'Dockerfile'}")
    with rented(sky_image.engine, sky_env, tmp_path) as machine:
        ended = machine.provision(homeless, *run_options(repository))
    assert ended.returncode != 0
    assert said(ended)[0]["HOME"] == "/root"
    assert re.search("mkdir: .*/root.*: Permission denied", ended.stderr), ended.stderr
