"""A real engine and the image built by it, once for all tests of this folder; what a test does with them is
`image.run(...)`.

SPEEDRUN_ENGINE=FOLDER keeps the engine's packages, base image and build cache in FOLDER from one run of the tests to
the next.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import load

ROOT = Path(__file__).resolve().parents[2]
UID = 10001
HARDENED = (
    "--network=none",
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--pids-limit=512",
    "--tmpfs=/tmp:rw,exec,size=1g",
)
EPOCH = "1700000000"


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    engines = load(Path(__file__).with_name("engine.py"), "container_engine")
    if (against := engines.reason_against()) is not None:
        pytest.skip(against)
    kept = os.environ.get("SPEEDRUN_ENGINE")
    folder = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="speedrun-engine-", dir="/var/tmp"))
    try:
        with engines.running(folder) as running:
            yield running
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the linters' programs, from their own lock in an environment of their own."""
    folder = tmp_path_factory.mktemp("tools")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--require-hashes"]
    subprocess.run([*pip, "--requirement", Path(__file__).with_name("requirements.txt")], check=True)
    return folder / "bin"


@dataclasses.dataclass
class Ended:
    """A container that has run to its end."""

    code: int
    stdout: str
    stderr: str


@dataclasses.dataclass
class Image:
    """An image of the program, and containers of it as a user starts them: hardened, with one mounted folder."""

    engine: Any
    name: str
    speedrun: Any
    """the root conftest's: its tiny recipe and its corpus"""

    def words(self, *command: str, out: Path | None, flags: tuple[str, ...] = (), user: str = "") -> list[str]:
        mounts = [f"--volume={self.speedrun.data}:/data:ro"] + ([f"--volume={out}:/out"] if out else [])
        asked = [f"--user={user}"] if user else []
        return ["docker", "run", *HARDENED, *mounts, *asked, *flags, self.name, *command]

    def run(
        self,
        *command: str,
        out: Path | None = None,
        flags: tuple[str, ...] = (),
        user: str = "",
        code: int = 0,
        timeout: float = 300,
    ) -> Ended:
        ended = self.engine.run(self.words(*command, out=out, flags=("--rm", *flags), user=user), timeout=timeout)
        assert ended.returncode == code, f"exit {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def start(self, *command: str, out: Path, flags: tuple[str, ...] = ()) -> str:
        """The name of a container that runs in the background."""
        name = f"speedrun-{uuid.uuid4().hex[:12]}"
        self.engine.docker(*self.words(*command, out=out, flags=("--detach", f"--name={name}", *flags))[1:])
        return name

    def tiny(self, command: str = "run", *more: str) -> list[str]:
        """The tiny recipe on the small corpus, as words after the image's name."""
        words = self.speedrun.tiny(command, Path("/out"), *(word for value in more for word in ("-o", value)))
        words = words[words.index(command) :]
        return [word.replace(str(self.speedrun.data), "/data") for word in words]


@pytest.fixture(scope="session")
def image(engine: Any, speedrun: Any) -> Image:
    """The CPU image, `runtime` target."""
    name = "speedrun:test"
    engine.build(ROOT, name, "--target=runtime", "--build-arg=TORCH=cpu", f"--build-arg=SOURCE_DATE_EPOCH={EPOCH}")
    speedrun.data.chmod(0o755)  # pytest's folders are its user's alone, and the image's user is another
    return Image(engine, name, speedrun)


@pytest.fixture(scope="session")
def sky_build() -> tuple[str, ...]:
    """What the CPU image of the `sky` target is built with."""
    return ("--target=sky", "--build-arg=TORCH=cpu", f"--build-arg=SOURCE_DATE_EPOCH={EPOCH}")


@pytest.fixture(scope="session")
def sky_image(image: Image, sky_build: tuple[str, ...]) -> Image:
    """The same program as SkyPilot wants it."""
    name = "speedrun:test-sky"
    image.engine.build(ROOT, name, *sky_build)
    return dataclasses.replace(image, name=name)


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder that the image's user may write."""
    folder = tmp_path / "out"
    folder.mkdir()
    os.chown(folder, UID, UID)
    return folder
