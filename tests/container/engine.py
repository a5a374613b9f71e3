"""A Docker engine of its own, from Debian packages, for the tests of the image: as root, on Debian 12, without an
image registry.

    python tests/container/engine.py FOLDER COMMAND ...     an engine in FOLDER, COMMAND with `docker` on its path

The engine is the next Debian release's, unpacked into FOLDER: nothing is installed beside the machine's own. It has
no bridge and no packet filter (builds use the host's network, containers have none), so it needs nothing of the
machine but root and cgroups. No registry is asked: the base image is a stand-in for `python:3.11-slim-bookworm`, made
by mmdebstrap from the machine's own Debian mirror. FOLDER may be kept: packages, base image and build cache are then
found again, and so is an engine that runs there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

RELEASE, NEXT_RELEASE = "bookworm", "trixie"
BASE_IMAGE = f"local/python:3.11-slim-{RELEASE}"
ENGINE = ("docker.io", "docker-cli", "docker-buildx", "docker-compose", "containerd")
IN_BASE = "python3,python3-venv,python3-pip,libpython3-dev,ca-certificates"

LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/lib/python3*/config-*/*.a")
"""what the real base does not hold either"""


def reason_against() -> str | None:
    """Why no engine can run here; None when one can."""
    release = Path("/etc/os-release").read_text() if Path("/etc/os-release").exists() else ""
    if f"VERSION_CODENAME={RELEASE}" not in release:
        return f"a Docker engine is unpacked here only on Debian {RELEASE}"
    if os.getuid():
        return "a Docker engine of our own needs root"
    return None


def debian_mirror() -> str:
    """The address that this machine's own apt uses."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for file in files:
        if file.is_file() and (
            found := re.search(r"^[^#\n]*?(https?://\S+/debian)/?(?:\s|$)", file.read_text(), re.MULTILINE)
        ):
            return found[1]
    raise RuntimeError("apt on this machine names no Debian mirror")


def retried(command: list[str], **options) -> None:
    """Run `command`, three times where it fails: mirrors have bad moments."""
    for attempt in range(3):
        ended = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
        )
        if ended.returncode == 0:
            return
        time.sleep(5 * attempt)
    raise RuntimeError(f"{' '.join(command[:4])} ... ended with {ended.returncode}:\n{ended.stdout[-3000:]}")


class Engine:
    """A running engine; `docker` and `run` use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "programs"
        self.state = folder / "state"
        socket = self.state / "engine.sock"
        path = f"{self.programs}/usr/bin:{self.programs}/usr/sbin:{os.environ['PATH']}"
        config = folder / "config"
        self.environment = os.environ | {"PATH": path, "DOCKER_CONFIG": str(config), "DOCKER_HOST": f"unix://{socket}"}
        self.process: subprocess.Popen[bytes] | None = None
        for each in (self.programs, self.state, config / "cli-plugins"):
            each.mkdir(parents=True, exist_ok=True)

    def run(self, command: list[str], *, timeout: float = 600, **options) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False, **options
        )

    def docker(self, *arguments: str, timeout: float = 600) -> str:
        """What `docker ...` prints; AssertionError with all it said when it fails."""
        ended = self.run(["docker", *arguments], timeout=timeout)
        assert ended.returncode == 0, (
            f"docker {' '.join(arguments)}: exit {ended.returncode}\n{ended.stdout[-4000:]}\n{ended.stderr[-8000:]}"
        )
        return ended.stdout.strip()

    # --- from nothing to a running engine

    def unpack(self) -> None:
        """The engine's packages of the next Debian release, unpacked below `programs`."""
        if (self.programs / "complete").exists():
            return
        apt = self.folder / "apt"
        for each in ("lists/partial", "cache/archives/partial", "packages"):
            (apt / each).mkdir(parents=True, exist_ok=True)
        keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
        (apt / "sources.list").write_text(f"deb [signed-by={keyring}] {debian_mirror()} {NEXT_RELEASE} main\n")
        settings = {
            "Dir::Etc::sourcelist": apt / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State::lists": apt / "lists",
            "Dir::Cache": apt / "cache",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
        }
        options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        retried(["apt-get", *options, "update"])
        retried(["apt-get", *options, "download", *(f"{name}/{NEXT_RELEASE}" for name in ENGINE)], cwd=apt / "packages")
        for package in sorted((apt / "packages").glob("*.deb")):
            subprocess.run(["dpkg", "-x", package, self.programs], check=True)
        shutil.rmtree(apt)
        init = self.programs / "usr/bin/docker-init"
        init.unlink(missing_ok=True)
        init.symlink_to(shutil.which("tini"))
        plugins = Path(self.environment["DOCKER_CONFIG"]) / "cli-plugins"
        for plugin in (self.programs / "usr/libexec/docker/cli-plugins").iterdir():
            (plugins / plugin.name).unlink(missing_ok=True)
            (plugins / plugin.name).symlink_to(plugin)
        (self.programs / "complete").touch()

    def start(self) -> None:
        """Start it, unless one runs in this folder already: that one is used, and left running by `stop`."""
        if self.run(["docker", "version"]).returncode == 0:
            return
        with open(self.state / "log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    "dockerd",
                    f"--data-root={self.state}/data",
                    f"--exec-root={self.state}/exec",
                    f"--pidfile={self.state}/pid",
                    f"--host={self.environment['DOCKER_HOST']}",
                    "--bridge=none",
                    *(f"--{name}=false" for name in ("iptables", "ip6tables", "ip-forward", "ip-masq")),
                ],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while self.run(["docker", "version"]).returncode:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the engine does not start:\n{(self.state / 'log').read_text()[-3000:]}")
            time.sleep(0.3)

    def make_base_image(self) -> None:
        """The stand-in base. It carries this machine's certificates, so that pip works inside a build behind a
        proxy."""
        if self.run(["docker", "image", "inspect", BASE_IMAGE]).returncode == 0:
            return
        archive = self.folder / "base.tar"
        hooks = (
            'for name in python python3; do ln -sf /usr/bin/python3 "$1/usr/local/bin/$name"; done; '
            'rm -f "$1"/usr/lib/python3.*/EXTERNALLY-MANAGED',
            'cp -a /usr/local/share/ca-certificates/. "$1/usr/local/share/ca-certificates/"; '
            'chroot "$1" update-ca-certificates >/dev/null 2>&1; '
            'printf "[global]\\ncert = /etc/ssl/certs/ca-certificates.crt\\n" >"$1/etc/pip.conf"',
        )
        retried(
            [
                *(
                    "mmdebstrap",
                    "--quiet",
                    "--mode=root",
                    "--variant=minbase",
                    "--format=tar",
                    "--dpkgopt=force-unsafe-io",
                ),
                f"--include={IN_BASE}",
                *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
                *(f"--customize-hook={hook}" for hook in hooks),
                *(RELEASE, str(archive), debian_mirror()),
            ],
        )
        path = "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        self.docker(
            "import", "-c", f"ENV {path}", "-c", "ENV LANG=C.UTF-8", "-c", 'CMD ["python3"]', str(archive), BASE_IMAGE
        )
        archive.unlink()

    def stop(self) -> None:
        """End every container and the engine, and wait until both are gone."""
        if self.process is None:
            return
        with contextlib.suppress(AssertionError):
            if containers := self.docker("ps", "--all", "--quiet").split():
                self.docker("rm", "--force", *containers)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None

    # --- images

    def build(self, context: Path, tag: str, *arguments: str, timeout: float = 900) -> str:
        """Build `context` as `tag` on the stand-in base, with pip's find-links of this machine as the "wheels"
        context; what it said."""
        wheels = wheels_folder() or self.folder / "no-wheels"
        wheels.mkdir(exist_ok=True)
        words = ["docker", "build", "--progress=plain", "--network=host", f"--build-arg=BASE_IMAGE={BASE_IMAGE}"]
        words += [f"--build-context=wheels={wheels}", f"--tag={tag}", *arguments, str(context)]
        ended = self.run(words, timeout=timeout)
        assert ended.returncode == 0, ended.stderr[-8000:]
        return ended.stderr

    def size(self, image: str) -> int:
        """Bytes unpacked."""
        return int(self.docker("image", "inspect", "--format={{.Size}}", image))

    def layers(self, image: str) -> list[int]:
        """Bytes of each layer, unpacked."""
        return [int(size) for size in self.docker("history", "--human=false", "--format={{.Size}}", image).split()]

    def configuration(self, image: str) -> dict:
        return json.loads(self.docker("image", "inspect", "--format={{json .Config}}", image))


def wheels_folder() -> Path | None:
    """The local folder of wheels that pip is set up to look into, if there is one."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    found = re.findall(r"find-links='([^']+)'", asked)
    return next((Path(each) for each in found if Path(each).is_dir()), None)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Engine]:
    """An engine in `folder` with the base image, stopped at the end. RuntimeError where the packages of .ci/run are
    missing."""
    if missing := [name for name in ("mmdebstrap", "runc", "tini") if not shutil.which(name)]:
        raise RuntimeError(f"not installed: {', '.join(missing)}; .ci/run installs them")
    engine = Engine(folder)
    engine.unpack()
    engine.start()
    try:
        engine.make_base_image()
        yield engine
    finally:
        engine.stop()


if __name__ == "__main__":
    if (against := reason_against()) is not None:
        sys.exit(against)
    with running(Path(sys.argv[1]).resolve()) as here:
        sys.exit(subprocess.run(sys.argv[2:], env=here.environment, check=False).returncode)
