"""The image at work in a real engine: hardened, of any user, stopped, starved of memory, disk and rights. Each ends
as the table says."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from helpers import wait_for

pytestmark = pytest.mark.slow


def events(out: Path, kind: str, run: str = "t") -> list[dict]:
    files = sorted((out / "runs" / run / "events").glob("*.jsonl"), key=lambda path: int(path.stem))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [event for event in map(json.loads, (line for line in lines if line.endswith("}"))) if event["kind"] == kind]


def wait_for_step(image: Any, container: str, out: Path, step: int) -> None:
    def found() -> bool:
        state = image.engine.docker("inspect", "--format={{.State.Status}} {{.State.ExitCode}}", container)
        assert state.startswith("running"), f"{state}\n{image.engine.run(['docker', 'logs', container]).stderr}"
        return any(event["step"] == step for event in events(out, "train.step"))

    wait_for(found, 240, "no such step within four minutes", every=0.1)


def exit_code(image: Any, container: str) -> int:
    return int(image.engine.docker("wait", container))


def test_the_smoke_run_hardened_and_without_a_network(image: Any, out: Path) -> None:
    ended = image.run("smoke", out=out, timeout=900)
    assert "The model has learned." in ended.stdout
    result = json.loads((out / "runs/smoke/report/result.json").read_text())
    assert result["val_bpb"] < result["bigram_bpb"]
    assert {path.lstat().st_uid for path in out.rglob("*")} == {10001}


def test_a_user_that_nobody_knows_and_a_login_shell(image: Any, out: Path) -> None:
    os.chown(out, 54321, 54321)
    program = " ".join(f"'{word}'" for word in image.tiny())
    ended = image.run("-lc", f"speedrun {program}", out=out, user="54321:54321", flags=("--entrypoint=bash",))
    assert "t/report/report.html" in ended.stdout
    again = image.run(*image.tiny(), out=out, user="54321:54321")
    assert "evaluate: done already" in again.stderr


def test_torch_compile_has_what_it_needs(image: Any) -> None:
    code = "import torch; f = torch.compile(lambda x: (x * 2).sin().sum()); print(float(f(torch.zeros(64))))"
    ended = image.run("-c", code, user="54321:54321", flags=("--entrypoint=/opt/speedrun/bin/python",))
    assert ended.stdout.strip() == "0.0"


def test_sigterm_in_mid_training_and_the_same_command_again(image: Any, out: Path) -> None:
    words = image.tiny("run", "train.steps=4000")
    container = image.start(*words, out=out)
    wait_for_step(image, container, out, step=3)
    assert image.engine.docker("exec", container, "python", "-m", "job.machine.health") == ""
    quiet = ["docker", "exec", "--env=SPEEDRUN_QUIET_SECONDS=-1", container, "python", "-m", "job.machine.health"]
    assert "the run may hang; its logs are in /out/runs/t/logs" in image.engine.run(quiet).stderr
    began = time.monotonic()
    image.engine.docker("stop", "--time=30", container)
    assert time.monotonic() - began < 20
    assert exit_code(image, container) == 75, image.engine.run(["docker", "logs", container]).stderr
    stopped_after = len(events(out, "train.step"))
    checkpoint = max(int(path.name) for path in (out / "runs/t/checkpoints").iterdir())
    assert checkpoint == stopped_after * 8, "the checkpoint is the last step's"


def test_after_sigterm_the_second_docker_run_finishes_the_run(image: Any, out: Path) -> None:
    container = image.start(*image.tiny(), out=out)
    wait_for_step(image, container, out, step=1)
    image.engine.docker("stop", "--time=30", container)
    assert exit_code(image, container) == 75
    image.run(*image.tiny(), out=out)
    steps = [event["step"] for event in events(out, "train.step")]
    assert steps == list(range(12)), "no step was done twice"


def test_out_of_memory_ends_with_14_and_names_the_flag(image: Any, out: Path) -> None:
    greedy = image.tiny("run", "train.device_batch_size=1024", "train.total_batch_size=65536", "model.depth=12")
    ended = image.run(*greedy, out=out, flags=("--memory=1g", "--memory-swap=1g"), code=14)
    assert "pretrain ran out of memory: the kernel killed one of its processes at the limit of 1.07 GB" in ended.stderr
    assert "docker run --memory" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_full_disk_ends_with_12(image: Any) -> None:
    ended = image.run(*image.tiny(), flags=("--tmpfs=/out:size=4m,mode=1777",), code=12)
    assert "the disk is full: writing " in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("kind", "owner", "remedy"),
    [
        ("read-only", 10001, "mount it without :ro"),
        (
            "of another user",
            0,
            "on the host, give the mounted folder to this user (chown 10001 DIR), or start the container as its owner",
        ),
    ],
)
def test_an_output_folder_that_cannot_be_written(image: Any, out: Path, kind: str, owner: int, remedy: str) -> None:
    os.chown(out, owner, owner)
    flags = (f"--volume={out}:/out:ro",) if kind == "read-only" else (f"--volume={out}:/out",)
    ended = image.run(*image.tiny(), flags=flags, code=2)
    assert ended.stderr.startswith("speedrun: --out /out cannot be written (")
    assert remedy in ended.stderr


def test_without_a_mounted_folder_the_flag_is_named(image: Any) -> None:
    ended = image.run("smoke", code=2)
    assert "mount a folder that user 10001 may write: docker run --volume DIR:/out ..." in ended.stderr


def test_a_preset_for_gpus_names_the_flags_that_give_them(image: Any, out: Path) -> None:
    ended = image.run("run", "--preset", "run6", out=out, code=10)
    assert ended.stderr.startswith(
        "speedrun: preset run6 is made for 8xh100 and this container sees no GPU; start it with: docker run --gpus all"
    )
    assert not (out / "runs").exists()


def test_without_a_temporary_folder_the_flag_is_named(image: Any, out: Path) -> None:
    words = ["docker", "run", "--rm", "--network=none", "--read-only", f"--volume={out}:/out", image.name, "smoke"]
    ended = image.engine.run(words)
    assert ended.returncode == 10, ended.stderr
    assert "start it with: docker run --tmpfs /tmp:rw,exec,size=4g" in ended.stderr


def test_the_processors_of_a_container_are_its_quota(image: Any) -> None:
    code = "from job.machine.host import usable_cores; print(usable_cores())"
    python = "--entrypoint=/opt/speedrun/bin/python"
    assert image.run("-c", code, flags=(python, "--cpus=1")).stdout.strip() == "1"
    assert int(image.run("-c", code, flags=(python,)).stdout) == len(os.sched_getaffinity(0))


def test_the_smoke_run_through_compose_and_a_real_s3_server(image: Any, tmp_path: Path, repository: Path) -> None:
    report = tmp_path / "report"
    report.mkdir()
    os.chown(report, 10001, 10001)
    compose = ["docker", "compose", "--file", str(repository / "docker/compose.yaml")]
    variables = {
        "IMAGE": image.name,
        "OUT": str(report),
        "S3_IMAGE": "speedrun:test-s3",
        "OPTIONS": "-o train.steps=40 -o eval.cap=20",
    }
    image.engine.build(repository, "speedrun:test-s3", "--target=s3")
    environment = image.engine.environment | variables
    try:
        ended = subprocess.run(
            [*compose, "run", "--rm", "fetch"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        result = json.loads((report / "smoke/result.json").read_text())
        assert (result["run_id"], result["steps"]) == ("smoke", 40)
        assert {path.name for path in (report / "smoke").iterdir()} >= {"report.html", "report.md", "manifest.json"}
    finally:
        subprocess.run([*compose, "down", "--volumes"], env=environment, capture_output=True, check=True)
