"""What a control group allows, what a container lacks, and whether its run is well: read from files laid out as the
kernel does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.errors import PreflightError
from job.machine import cgroup, container, health
from job.recipe.config import resolve


def group(tmp_path: Path, monkeypatch, own: str, files: dict[str, str]) -> None:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "tree")
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text)


V1 = "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n"
V2 = "0::/user.slice/run-1\n"


@pytest.mark.parametrize(
    ("own", "file"),
    [
        (V2, "user.slice/run-1/memory.max"),
        ("0::/\n", "memory.max"),
        (V2, "memory.max"),
        (V1, "memory/docker/abc/memory.limit_in_bytes"),
        (V1, "memory/memory.limit_in_bytes"),
    ],
    ids=["unit", "container", "container that sees the host's path", "first generation", "first generation, container"],
)
def test_the_own_group_is_found_in_both_generations(tmp_path: Path, monkeypatch, own: str, file: str) -> None:
    group(tmp_path, monkeypatch, own, {file: "1000\n", "cpuset/cpuset.cpus": "0-1"})
    assert (cgroup.memory_limit(), cgroup.cpu_quota()) == (1000, None)


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        (
            V2,
            {"cpu.max": "150000 100000\n", "memory.max": "max\n", "memory.events": "low 0\noom 3\noom_kill 2\n"},
            (1.5, None, 2),
        ),
        (V2, {"cpu.max": "max 100000\n", "memory.max": "1073741824\n"}, (None, 1 << 30, None)),
        (
            V1,
            {
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n",
            },
            (None, None, 7),
        ),
        (
            "0::/slurm/job_7/step_0/task_0\n",
            {
                "slurm/job_7/cpu.max": "400000 100000\n",
                "slurm/job_7/step_0/cpu.max": "200000 100000\n",
                "slurm/job_7/step_0/task_0/cpu.max": "max 100000\n",
                "slurm/job_7/memory.max": "1073741824\n",
                "slurm/job_7/step_0/memory.max": "max\n",
                "slurm/job_7/step_0/task_0/memory.max": "max\n",
                "slurm/job_7/memory.events": "oom_kill 9\n",
                "slurm/job_7/step_0/task_0/memory.events": "oom_kill 1\n",
            },
            (2.0, 1 << 30, 1),
        ),
        (
            "4:memory:/slurm/job_7/task_0\n",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/slurm/job_7/memory.limit_in_bytes": "1000\n",
                "memory/slurm/job_7/task_0/memory.limit_in_bytes": "9223372036854771712\n",
            },
            (None, 1000, None),
        ),
        ("", {}, (None, None, None)),
    ],
)
def test_limits_and_kills(tmp_path: Path, monkeypatch, own: str, files: dict[str, str], expected: tuple) -> None:
    group(tmp_path, monkeypatch, own, files)
    assert (cgroup.cpu_quota(), cgroup.memory_limit(), cgroup.oom_kills()) == expected


@pytest.fixture
def in_container(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mark").touch()
    monkeypatch.setattr(container, "MARKS", (tmp_path / "mark",))


def test_outside_a_container_nothing_is_asked(monkeypatch) -> None:
    monkeypatch.setattr(container, "MARKS", ())
    container.check(resolve("run6"))


def test_a_gpu_preset_without_a_gpu_names_the_flags(in_container, monkeypatch) -> None:
    monkeypatch.setattr(container, "GPU_DEVICES", ())
    container.check(resolve("smoke"))
    with pytest.raises(
        PreflightError, match=r"preset try is made for 1xh100 and this container sees no GPU; .* --gpus all"
    ):
        container.check(resolve("try"))


def test_health_is_the_age_of_the_event_file_that_a_process_holds_open(tmp_path: Path) -> None:
    events = tmp_path / "runs/mine/events"
    events.mkdir(parents=True)
    code = "import sys, time; file = open(sys.argv[1], 'a'); print('open', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(events / "2.jsonl")], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        mine = [path for path in health.open_event_files() if path.is_relative_to(tmp_path)]
        assert mine == [events / "2.jsonl"]
        assert health.complaint(60, iter(mine)) is None
        old = time.time() - 1000
        os.utime(events / "2.jsonl", (old, old))
        assert health.complaint(60, iter(mine)) == (
            f"no event for 1000 s in {events}/2.jsonl: the run may hang; its logs are in {tmp_path}/runs/mine/logs"
        )
    finally:
        holder.kill()
        holder.wait()
    assert health.complaint(60, iter([])) is None, "a container without a run is well"
