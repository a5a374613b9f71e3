"""`make` makes the environment: once, from the lock, whole or not at all. The real Makefile, tiny wheels, no
network."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ".venv/project-installed"

BACKEND = """
import shutil

def build_editable(folder, config_settings=None, metadata_directory=None):
    return shutil.copy("speedrun_stand_in-1-py3-none-any.whl", folder).rsplit("/", 1)[1]
"""

pytestmark = pytest.mark.slow


def write_wheel(folder: Path, name: str, version: str, extra: dict[str, str] | None = None) -> str:
    """A wheel with one module, as pip wants it; returns its SHA-256."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **{f"{info}/{file}": text for file, text in (extra or {}).items()},
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}\n"
        for path, text in files.items()
    )
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            archive.writestr(path, text)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


class Tree:
    """A folder with the real Makefile, a project of one file, and locks that the wheels satisfy (but for torch's CUDA
    build)."""

    def __init__(self, root: Path, wheels: Path) -> None:
        self.root, self.wheels = root, wheels
        root.mkdir()
        wheels.mkdir()
        shutil.copy(ROOT / "Makefile", root)
        (root / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        )
        (root / "backend.py").write_text(BACKEND)
        write_wheel(
            root,
            "speedrun_stand_in",
            "1",
            {"entry_points.txt": "[console_scripts]\nspeedrun = speedrun_stand_in:main\n"},
        )
        cpu, cuda = write_wheel(self.wheels, "torch", "2.13.0+cpu"), write_wheel(root, "torch", "2.13.0")
        small = write_wheel(self.wheels, "small", "1")
        self.lock = root / "requirements.lock"
        pythons = "# Python: 3.11 3.12 3.13\n"
        self.lock.write_text(
            f"small==1 \\\n    --hash=sha256:{small}\ntorch==2.13.0 \\\n    --hash=sha256:{cpu}\n{pythons}"
        )
        (root / "requirements-cuda.lock").write_text(f"torch==2.13.0 \\\n    --hash=sha256:{cuda}\n{pythons}")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE", "MFLAGS"))
        }
        environment |= {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "HOME": str(self.root),
        }
        command = ["make", PROJECT, *(arguments or ["TORCH=cpu"])]
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def make(self, *arguments: str) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        return output

    def version(self, module: str) -> str:
        command = [self.root / ".venv/bin/python", "-c", f"import {module}; print({module}.version)"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "a tree", tmp_path / "wheels")


def test_made_once_and_again_when_the_lock_changes(tree: Tree) -> None:
    tree.make()
    assert tree.version("torch") == "2.13.0+cpu" and tree.version("small") == "1"
    assert os.access(tree.root / ".venv/bin/speedrun", os.X_OK)
    left = tree.root / ".venv/left-from-before"
    left.touch()
    assert "up to date" in tree.make() and left.exists()
    (tree.root / "pyproject.toml").touch()
    tree.make()
    assert left.exists(), "a changed pyproject.toml installs the project again, not its environment"
    tree.lock.write_text("# a changed lock\n" + tree.lock.read_text())
    tree.make()
    assert not left.exists() and tree.version("small") == "1"


def test_a_killed_make_leaves_nothing_that_passes_for_whole(tree: Tree) -> None:
    process = tree.start()
    deadline = time.monotonic() + 60
    while not (tree.root / ".venv/bin/python").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(tree.root.glob(".venv/made-from-*"))
    tree.make()
    assert tree.version("torch") == "2.13.0+cpu" and tree.version("small") == "1"


def test_without_a_cpu_build_the_cuda_lock_is_taken_and_said(tree: Tree) -> None:
    next(tree.wheels.glob("torch-*")).unlink()
    shutil.copy(tree.root / "torch-2.13.0-py3-none-any.whl", tree.wheels)
    output = tree.make("TORCH=cpu", f"TORCH_CPU_INDEX=file://{tree.wheels}/nothing")
    assert "taking the CUDA build, which runs on a CPU too (2.7 GB)" in output
    assert tree.version("torch") == "2.13.0"


def test_a_torch_that_does_not_exist_is_refused(tree: Tree) -> None:
    process = tree.start("TORCH=rocm")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "TORCH=cpu or TORCH=cuda" in output
    assert not (tree.root / ".venv").exists()
