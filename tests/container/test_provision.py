"""The `sky` image in the hands of SkyPilot's own provisioning code (provision.py), up to the rsync that arrives; and
without HOME."""

from __future__ import annotations

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


@pytest.fixture
def rented(sky_image: Any, sky_env: Path, tmp_path: Path) -> Iterator[Rented]:
    """The container, with the sshd in it, is gone at the end."""
    (port,) = free_ports(1)
    (tmp_path / ".ssh").mkdir(mode=0o700)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sudo").write_text(SUDO)
    (tmp_path / "bin/sudo").chmod(0o755)
    key = tmp_path / ".ssh/key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    (tmp_path / ".ssh/authorized_keys").write_text(key.with_suffix(".pub").read_text())
    machine = Rented(sky_image.engine, tmp_path, port, sky_env / "bin/python")
    try:
        yield machine
    finally:
        machine.engine.run(["docker", "rm", "--force", machine.container])
        Path(f"/tmp/{machine.container}.sky.lifecycle.lock").unlink(missing_ok=True)


def login(ended: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What the login saw; SkyPilot prints around it."""
    return next(json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{"))


def run_options(repository: Path) -> list[str]:
    return yaml.safe_load((repository / "sky/speedrun.yaml").read_text())["config"]["docker"]["run_options"]


def test_what_skypilot_sends_arrives_in_the_home_of_the_images_user(
    rented: Rented, sky_image: Any, repository: Path
) -> None:
    ended = rented.provision(sky_image.name, *run_options(repository))
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr[-3000:]}\n{rented.log()}"
    seen = login(ended)
    assert seen.pop("speedrun").endswith("/bin/speedrun"), "the YAMLs call it by name"
    assert seen == {"HOME": "/home/speedrun", "user": "speedrun", "writable": "yes"}
    inside = ["exec", rented.container, "bash", "-c", "cat ~/.sky/sent; stat --format=%U ~/.sky/sent ~ ~/.ssh"]
    assert rented.engine.docker(*inside).splitlines() == ["a file of SkyPilot's own", *["speedrun"] * 3]


def test_without_home_in_the_image_nothing_arrives(
    rented: Rented, sky_image: Any, sky_build: tuple[str, ...], repository: Path, tmp_path: Path
) -> None:
    """Each login's home is root's then, and the folder for SkyPilot's first file is refused."""
    text = (repository / "Dockerfile").read_text()
    assert text.count(HOME) == 1
    (tmp_path / "Dockerfile").write_text(text.replace(HOME, ""))
    homeless = f"{sky_image.name}-homeless"
    rented.engine.build(repository, homeless, *sky_build, f"--file={tmp_path / 'Dockerfile'}")
    ended = rented.provision(homeless, *run_options(repository))
    assert ended.returncode != 0
    assert login(ended)["HOME"] == "/root"
    assert re.search("mkdir: .*/root.*: Permission denied", ended.stderr), ended.stderr
