"""Whole runs whose rows are still being prepared: the background process fails, is killed, and ends with its run."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from helpers import command_line, events, free_ports, ranks_of, wait_for, wait_for_event, weights
from job.data.hub import DATASETS, Dataset
from job.recipe.config import resolve

pytestmark = pytest.mark.slow
SHARD = "shard_{:05d}.parquet".format
KEYS = (
    "model.depth=2",
    "model.seq_len=64",
    "data.source=climbmix",
    "data.vocab_size=512",
    "data.tokenizer_chars=20000",
    "train.steps=80",
    "train.total_batch_size=512",
    "train.device_batch_size=4",
    "train.val_every=0",
    "train.val_tokens=4096",
    "train.threads=1",
)
PROCESS = "the process that prepares rows of pretrain"


@pytest.fixture
def fetching(hub, monkeypatch):
    """A hub that keeps its second shard and those after it back until this is set."""
    released = threading.Event()
    monkeypatch.setitem(DATASETS, "climbmix", Dataset("karpathy/climbmix-400b-shuffle", 6543))
    hub.serve(SHARD(6542), hub.files[SHARD(5)])
    hub.gate = lambda name: name in (SHARD(0), SHARD(6542)) or released.wait(120)
    yield released
    released.set()


@pytest.fixture
def begun(fetching, helpers):
    """Prepares the beginning of the runs' rows below a folder, with fewer shards than a process of its own would."""
    data = resolve("smoke", {key: ("-o", value) for key, _, value in (key.partition("=") for key in KEYS)}).data
    return lambda out: helpers.small_prepare(out, data, seq_len=64, rows=640, whole=False)


@pytest.fixture
def pretrain(speedrun):
    """Starts `speedrun pretrain` below a folder, with more words and variables."""
    started: list[subprocess.Popen[str]] = []

    def start(out: Path, *more: str, **variables: str) -> subprocess.Popen[str]:
        words = ["pretrain", "--preset", "smoke", "--out", str(out), "--run-id", "t", *more]
        words += [word for key in KEYS for word in ("-o", key)]
        environment = speedrun.environment() | variables
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(speedrun.command(*words), env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def background_of(process: subprocess.Popen[str]) -> int:
    return next(pid for pid in ranks_of(process.pid) if "job.run.rank background" in command_line(pid))


def ends_with(code: int, *processes: subprocess.Popen[str]) -> list[str]:
    """What each said on stderr."""
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), "\n---\n".join(said)
    return said


def test_a_signal_to_the_run_ends_it_and_the_same_command_goes_on(pretrain, begun, fetching, tmp_path: Path) -> None:
    begun(tmp_path)
    process = pretrain(tmp_path)
    wait_for_event(tmp_path, process, "train.step", step=0)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2 and background_of(process) == ranks[1]
    process.send_signal(signal.SIGTERM)
    ends_with(75, process)
    assert not any("job.run.rank" in command_line(pid) for pid in ranks)
    fetching.set()
    ends_with(0, pretrain(tmp_path))
    assert {event["step"] for event in events(tmp_path, "train.step")} == set(range(80))


def test_it_never_outlives_a_supervisor_that_is_killed(pretrain, begun, fetching, tmp_path: Path) -> None:
    begun(tmp_path)
    process = pretrain(tmp_path)
    wait_for_event(tmp_path, process, "train.step", step=0)
    ranks = ranks_of(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not any("job.run.rank" in command_line(p) for p in ranks), 10, "one outlived its supervisor")


def test_one_that_is_killed_is_a_dead_rank_and_one_that_fails_ends_the_run_at_once(
    pretrain, begun, fetching, hub, tmp_path: Path
) -> None:
    begun(tmp_path)
    process = pretrain(tmp_path)
    wait_for_event(tmp_path, process, "train.step", step=0)
    os.kill(background_of(process), signal.SIGKILL)
    assert f"{PROCESS} was killed by SIGKILL" in ends_with(75, process)[0]
    died = {"stage": "pretrain", "rank": PROCESS.removesuffix(" of pretrain"), "signal": "SIGKILL"}
    died |= {"device": False}
    assert [event["died"] for event in events(tmp_path, "attempt.ended")] == [died]
    del hub.files[SHARD(1)]
    assert (
        f"{SHARD(1)} of karpathy/climbmix-400b-shuffle cannot be fetched: HTTP 404"
        in ends_with(11, pretrain(tmp_path))[0]
    )
    assert not ranks_of(os.getpid())


def test_several_nodes_with_folders_of_their_own_or_one_in_common(pretrain, begun, fetching, tmp_path: Path) -> None:
    """Each node makes, pulls or waits for its rows; the weights are those of one node with as many ranks."""
    fetching.set()

    def on_two_nodes(outs: list[Path], **variables: str) -> None:
        common = {
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
            "SKYPILOT_TASK_ID": "a-task",
            "SPEEDRUN_NODES_PORT": str(free_ports(1)[0]),
        }
        ends_with(
            0,
            *(
                pretrain(out, "--ranks", "1", **common, **variables, SKYPILOT_NODE_RANK=str(number))
                for number, out in enumerate(outs)
            ),
        )

    for out in ("one", "shared", "n0", "n1"):
        begun(tmp_path / out)
    ends_with(0, pretrain(tmp_path / "one", "--ranks", "2"))
    on_two_nodes([tmp_path / "shared"] * 2)
    on_two_nodes([tmp_path / "n0", tmp_path / "n1"], SPEEDRUN_BUCKET=str(tmp_path / "bucket"))
    for out in ("shared", "n0"):
        assert weights(tmp_path / out) == weights(tmp_path / "one")
        assert len(list((tmp_path / out / "runs" / "t" / "logs").glob("*.background.node*.log"))) == (
            2 if out == "shared" else 1
        )
