"""What the image is: its text, its contents, its size; and that two builds of it are one."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
LARGEST = 1_600_000_000
LARGEST_LAYER = 1_000_000_000
"""bytes of the CPU image, unpacked"""
OURS = (
    "/opt/speedrun/bin/speedrun /opt/speedrun/lib/python3.11/site-packages/{job,model,gpt2_speedrun-*} "
    "/usr/local/bin/speedrun"
)


def inside(image: Any, script: str, user: str = "") -> str:
    return image.run("-c", script, flags=("--entrypoint=bash",), user=user).stdout.strip()


def test_hadolint_has_nothing_to_say(tools: Path, repository: Path) -> None:
    ended = subprocess.run(
        [tools / "hadolint", "--config", HERE / "hadolint.yaml", repository / "Dockerfile"],
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stdout + ended.stderr


def test_container_structure_test(tools: Path, image: Any) -> None:
    command = [
        str(tools / "container-structure-test"),
        "test",
        "--image",
        image.name,
        "--config",
        str(HERE / "structure.yaml"),
    ]
    ended = image.engine.run(command)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"^Failures: +0$", ended.stdout, re.MULTILINE), ended.stdout


def test_the_size(image: Any) -> None:
    assert image.engine.size(image.name) <= LARGEST


def test_the_layers_are_no_larger_than_a_pull_can_bear(sky_image: Any) -> None:
    """At most 1.5 GB packed, and packed is less; of the CUDA image that was measured by hand."""
    layers = sky_image.engine.layers(sky_image.name)
    assert max(layers) <= LARGEST_LAYER
    assert sum(layers) == sky_image.engine.size(sky_image.name)


def test_the_bill_of_materials_is_the_lock(tools: Path, image: Any, repository: Path) -> None:
    command = [
        str(tools / "syft"),
        "scan",
        f"docker:{image.name}",
        "--output=syft-json",
        "--quiet",
        "--select-catalogers=python",
    ]
    ended = image.engine.run(command)
    assert ended.returncode == 0, ended.stderr
    found = {
        (each["name"].lower(), each["version"].partition("+")[0]) for each in json.loads(ended.stdout)["artifacts"]
    }
    locked = dict(
        re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (repository / "requirements.lock").read_text(), re.MULTILINE)
    )
    for name in ("torch", "torchao", "boto3", "wandb"):
        assert (name, locked[name]) in found
        assert sum(each[0] == name for each in found) == 1
    assert not {"pytest", "hypothesis", "ruff"} & {name for name, _ in found}, "the developers' tools are no part of it"


def test_two_builds_differ_in_no_file_of_ours(image: Any, repository: Path) -> None:
    again = "speedrun:test-again"
    arguments = ("--target=runtime", "--build-arg=TORCH=cpu", "--no-cache-filter=project,program,runtime")
    said = image.engine.build(repository, again, *arguments, "--build-arg=SOURCE_DATE_EPOCH=1700000000")
    assert re.search(r"^#\d+ \[project .*wheel", said, re.MULTILINE)
    assert image.engine.docker("image", "inspect", "--format={{.Id}}", again) != image.engine.docker(
        "image", "inspect", "--format={{.Id}}", image.name
    ), "the second build was none"
    script = (
        f"find {OURS} -printf '%p %m %U %T@ %l\\n' | sort; find {OURS} -type f -print0 | sort -z | xargs -0 sha256sum"
    )
    first, second = inside(image, script), inside(dataclasses.replace(image, name=again), script)
    assert first == second
    assert ".cpython-311.pyc" in first and "job/recipe/presets/smoke.toml" in first


def test_compatibility_libraries_come_from_a_build_context(image: Any, repository: Path, tmp_path: Path) -> None:
    """A stand-in for NVIDIA's package: what the real one does on a GPU was not seen."""
    library = tmp_path / "package/usr/local/cuda-13.0/compat/libcuda.so.1"
    library.parent.mkdir(parents=True)
    library.write_text("a stand-in")
    control = tmp_path / "package/DEBIAN/control"
    control.parent.mkdir()
    control.write_text(
        "Package: cuda-compat-13-0\nVersion: 580.1\nArchitecture: amd64\nMaintainer: us\nDescription: no\n"
    )
    (tmp_path / "context").mkdir()
    package = tmp_path / "context/cuda-compat-13-0_580.1_amd64.deb"
    subprocess.run(["dpkg-deb", "--build", tmp_path / "package", package], check=True, capture_output=True)
    arguments = ("--target=runtime", "--build-arg=TORCH=cpu", f"--build-context=compat={package.parent}")
    image.engine.build(repository, "speedrun:test-compat", *arguments, "--build-arg=SOURCE_DATE_EPOCH=1700000000")
    with_it = dataclasses.replace(image, name="speedrun:test-compat")
    assert inside(with_it, "cat /opt/cuda-compat/libcuda.so.1; ls /tmp") == "a stand-in"
    assert inside(image, "ls /opt") == "speedrun"
    for words, flags in (("--version",), ()), (("-lc", "speedrun --version"), ("--entrypoint=bash",)):
        assert with_it.run(*words, flags=flags).stdout.startswith("speedrun, version ")


def test_a_generation_of_cuda_without_a_lock_is_refused(engine: Any, repository: Path) -> None:
    words = [
        "docker",
        "build",
        "--progress=plain",
        "--network=host",
        "--build-arg=BASE_IMAGE=local/python:3.11-slim-bookworm",
    ]
    ended = engine.run([*words, "--target=locked", "--build-arg=TORCH=cu126", str(repository)])
    assert ended.returncode != 0
    assert (
        "TORCH=cu126 has no requirements-cu126.lock: say cpu or cuda, or make it first: make lock CUDA=cu126"
        in ended.stderr
    )


def test_the_sky_target_is_what_skypilot_works_with(sky_image: Any) -> None:
    engine, name = sky_image.engine, sky_image.name
    # as SkyPilot starts it: a shell that stays, its commands by exec as root, its jobs as the image's user
    container = engine.docker(
        "run", "--detach", "--tty", "--interactive", "--network=none", "--entrypoint=/bin/bash", name
    )
    assert engine.docker("exec", container, "whoami") == "speedrun"
    assert engine.docker("exec", container, "printenv", "HOME") == "/home/speedrun"
    assert engine.docker("exec", container, "sudo", "id", "-u") == "0"
    for program in ("rsync", "curl", "wget", "patch", "fusermount", "sshd", "pip3"):
        assert engine.docker("exec", "--user=0", container, "bash", "-lc", f"command -v {program}")
    assert engine.docker("exec", container, "bash", "-c", "ls /etc/ssh | grep -c ssh_host_ || true") == "0"
    engine.docker("exec", "--user=0", container, "bash", "--login", "-c", "-i", "service ssh start")
    assert "ssh_host_ed25519_key" in engine.docker("exec", container, "ls", "/etc/ssh")
    assert engine.docker("exec", container, "bash", "-lc", "speedrun --version").startswith("speedrun, version")
    engine.docker("rm", "--force", container)
    # as RunPod starts it: its command behind the image's entrypoint, which must be none
    assert sky_image.run("bash", "-c", "pwd; speedrun --version").stdout.startswith("/home/speedrun\nspeedrun, version")
