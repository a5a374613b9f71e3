"""Runs on several nodes of loopback: a supervisor each, folders of their own, ranks that talk through gloo. A folder
stands for the bucket."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from job.run.processes import free_port
from job.store.attempt import fold, read_events
from job.store.checkpoint_folder import folders
from job.store.sealed import open_sealed


@dataclasses.dataclass
class Cluster:
    """`count` nodes with `ranks` processes each, whose folders are `base`/n0, n1 ...; `base`/bucket is what they
    share, and `prepared` what each of them has."""

    speedrun: object
    base: Path
    count: int = 2
    ranks: int = 1
    port: int = 0
    shared: bool = False
    prepared: Path | None = None
    variables: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port = self.port or free_port()
        self.variables = {"SPEEDRUN_BUCKET": str(self.base / "bucket")} | self.variables
        self.started: list[subprocess.Popen] = []
        for number in range(self.count if self.prepared else 0):
            shutil.copytree(self.prepared, self.out(number) / "prepared")

    def out(self, number: int) -> Path:
        return self.base / ("all" if self.shared else f"n{number}")

    def start(self, number: int, command: str, *more: str, **changed: str) -> subprocess.Popen[str]:
        environment = self.speedrun.environment() | {
            "SKYPILOT_NUM_NODES": str(self.count),
            "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * self.count),
            "SKYPILOT_NODE_RANK": str(number),
            "SKYPILOT_TASK_ID": "a-task",
            "SPEEDRUN_NODES_PORT": str(self.port),
            "SPEEDRUN_NODES_WAIT": "600",
        }
        words = self.speedrun.tiny(command, self.out(number), "--ranks", str(self.ranks), *more)
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment | self.variables | changed
        )
        self.started.append(process)
        return process

    def start_all(self, command: str, *more: str) -> list[subprocess.Popen[str]]:
        return [self.start(number, command, *more) for number in range(self.count)]

    def wait(self, processes: list[subprocess.Popen[str]], codes: list[int]) -> list[str]:
        """What each said on stderr, when all have ended with these codes."""
        said = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == codes, "\n---\n".join(said)
        return said

    def events(self, kind: str) -> list[dict]:
        return [e for e in read_events(self.out(0) / "runs" / "t") if e["kind"] == kind]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            for process in self.started:
                assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ranks_of(self, process: subprocess.Popen[str]) -> list[int]:
        """Process ids of the ranks below a supervisor."""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(child) for child in children if b"job.run.rank" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.fixture
def cluster(speedrun, tmp_path: Path):
    made: list[Cluster] = []

    def make(**options) -> Cluster:
        made.append(Cluster(speedrun, tmp_path, **options))
        return made[-1]

    yield make
    for process in (p for c in made for p in c.started):
        process.kill()
        process.communicate()


SHORT = ("-o", "train.steps=3", "-o", "train.checkpoint_every=2", "-o", "train.val_every=0")


def weights(run: Path) -> dict[str, str]:
    """SHA-256 by file of the newest checkpoint's weights, every file of which is looked at."""
    sealed = open_sealed(folders(run)[0], kind="checkpoint")
    return {name: entry["sha256"] for name, entry in sealed.files.items() if name.startswith("weights-")}


@pytest.mark.slow
def test_two_nodes_train_what_one_node_trains_to_the_last_bit(cluster, speedrun, tmp_path: Path) -> None:
    nodes = cluster()
    speedrun(speedrun.tiny("pretrain", tmp_path / "one", "--ranks", "2", *SHORT))
    second = nodes.start(1, "pretrain", *SHORT)  # before the first node listens
    said = nodes.wait([nodes.start(0, "pretrain", *SHORT), second], [0, 0])
    assert "waiting for 1 more of 2 nodes" in said[0]
    for run in (nodes.out(0) / "runs" / "t", tmp_path / "bucket" / "runs" / "t"):
        assert weights(run) == weights(tmp_path / "one" / "runs" / "t")
    assert len(weights(tmp_path / "one" / "runs" / "t")) == 2
    assert [e["step"] for e in nodes.events("train.step")] == [0, 1, 2]
    assert [e["step"] for e in nodes.events("checkpoint.sealed")] == [2, 3]
    assert not (nodes.out(1) / "runs" / "t" / "attempts").exists(), "the first node alone claims"
    assert not list(nodes.out(1).glob("runs/t/checkpoints/*")), "what is in the bucket is not kept"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, speedrun) -> Path:
    """One node with four processes."""
    out = tmp_path_factory.mktemp("one")
    speedrun(speedrun.tiny("run", out, "--ranks", "4", *LONG))
    return out


@pytest.fixture(scope="module")
def pair(undisturbed: Path, tmp_path_factory, speedrun) -> Path:
    """One node with two processes, trained."""
    out = tmp_path_factory.mktemp("pair")
    shutil.copytree(undisturbed / "prepared", out / "prepared")
    speedrun(speedrun.tiny("pretrain", out, "--ranks", "2", *LONG))
    return out


LONG = ("-o", "train.total_batch_size=1024", "-o", "train.steps=12", "-o", "train.checkpoint_every=3")
NAMES = ("val_bpb", "bigram_bpb", "tokens", "steps")


def result(out: Path) -> dict:
    return json.loads((out / "runs" / "t" / "report" / "result.json").read_text())


def check_trained(nodes: Cluster, other: Path) -> None:
    """The run trained as `other` did, to the last bit."""
    runs = [out / "runs" / "t" for out in (nodes.out(0), other)]
    assert weights(runs[0]) == weights(runs[1])
    losses = [{step: event["loss"] for step, event in fold(run).steps.items()} for run in runs]
    assert len(losses[0]) == 12 and losses[0] == losses[1]


def check_finished(nodes: Cluster, undisturbed: Path) -> None:
    """The run has ended as the undisturbed one did, to the last bit."""
    check_trained(nodes, undisturbed)
    mine, other = result(nodes.out(0)), result(undisturbed)
    assert {name: mine[name] for name in NAMES} == {name: other[name] for name in NAMES}
    assert [t["accuracy"] for t in mine["smoke_score"]["tasks"]] == [
        t["accuracy"] for t in other["smoke_score"]["tasks"]
    ]


@pytest.mark.slow
def test_a_whole_run_on_two_nodes_is_the_run_of_one(cluster, undisturbed: Path) -> None:
    nodes = cluster(ranks=2)
    nodes.wait(nodes.start_all("run", *LONG), [0, 0])
    check_finished(nodes, undisturbed)
    stored = nodes.base / "bucket" / "runs" / "t"
    assert weights(stored) == weights(undisturbed / "runs" / "t")
    assert result(nodes.base / "bucket")["steps"] == 12


@pytest.mark.slow
def test_nodes_with_one_folder_in_common_need_no_bucket(cluster, undisturbed: Path) -> None:
    nodes = cluster(ranks=2, shared=True, variables={"SPEEDRUN_BUCKET": ""})
    nodes.wait(nodes.start_all("run", *LONG), [0, 0])
    check_finished(nodes, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["the second node", "the first node", "a rank of the second node"])
def test_a_loss_ends_all_with_75_and_the_same_command_goes_on(cluster, pair: Path, victim: str) -> None:
    nodes = cluster(prepared=pair / "prepared")
    processes = nodes.start_all("pretrain", *LONG)
    nodes.wait_for(lambda: len(nodes.events("checkpoint.sealed")) >= 1)
    ranks = [rank for process in processes for rank in nodes.ranks_of(process)]
    assert len(ranks) == 2
    lost, codes = {"the second node": (processes[1].pid, [75, -9]), "the first node": (processes[0].pid, [-9, 75])}.get(
        victim, (nodes.ranks_of(processes[1])[0], [75, 75])
    )
    os.kill(lost, signal.SIGKILL)
    said = nodes.wait(processes, codes)
    assert not any("Traceback" in words for words in said)
    if victim == "a rank of the second node":
        assert "rank 1 on node 1 of pretrain was killed by SIGKILL" in said[0]
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline, "a rank outlived its supervisor"
        time.sleep(0.1)
    nodes.wait(nodes.start_all("pretrain", *LONG), [0, 0])
    check_trained(nodes, pair)
    assert [e["step"] for e in nodes.events("train.start")][1] >= 3, "it went on from a checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_signal_to_one_node_or_to_all_stops_both_at_a_border(cluster, pair: Path, everywhere: bool) -> None:
    nodes = cluster(prepared=pair / "prepared")
    processes = nodes.start_all("pretrain", *LONG)
    nodes.wait_for(lambda: len(nodes.events("train.step")) >= 1)
    ranks = [rank for process in processes for rank in nodes.ranks_of(process)]
    for process in [*ranks, *(p.pid for p in processes)] if everywhere else [processes[1].pid]:
        os.kill(process, signal.SIGTERM)
    for words in nodes.wait(processes, [75, 75]):
        assert "with a checkpoint; the same command goes on" in words
    steps = len(nodes.events("train.step"))
    assert nodes.events("checkpoint.sealed")[-1]["step"] == steps < 12
    shutil.rmtree(nodes.out(1))  # a machine that is new
    nodes.wait(nodes.start_all("pretrain", *LONG), [0, 0])
    check_trained(nodes, pair)
    assert len(nodes.events("train.step")) == 12, "no step was done twice"


@pytest.mark.slow
def test_a_rank_of_another_node_that_dies_at_every_start_ends_all_with_15(cluster, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os\n"
        "if 'pretrain' in open('/proc/self/cmdline').read() and os.environ.get('RANK') == '1':\n"
        "    os.kill(os.getpid(), 11)\n"
    )
    nodes = cluster(variables={"PYTHONPATH": f"{Path(__file__).parents[3]}:{tmp_path / 'site'}"})
    for code in (75, 75, 15):
        said = nodes.wait(nodes.start_all("pretrain", *SHORT), [code, code])
    for words in said:
        assert (
            "rank 1 on node 1 of pretrain was killed by SIGSEGV, in the third attempt in a row"
            in words.splitlines()[-1]
        )


@pytest.mark.slow
def test_other_numbers_of_nodes_go_on(cluster, pair: Path) -> None:
    """Four steps on two nodes, four on one, the rest on two: the same rows, and the first losses of each part agree."""
    nodes = cluster(prepared=pair / "prepared")
    for count in (2, 1, 2):
        nodes.count = count
        nodes.started.clear()
        processes = nodes.start_all("pretrain", *LONG)
        before = len(nodes.events("train.step"))
        nodes.wait_for(lambda before=before: len(nodes.events("train.step")) >= before + 3)
        if len(nodes.events("train.start")) < 3:
            processes[-1].send_signal(signal.SIGTERM)
            nodes.wait(processes, [75] * count)
    nodes.wait(processes, [0, 0])
    steps = nodes.events("train.step")
    assert [e["step"] for e in steps] == list(range(12))
    assert [e["world_size"] for e in nodes.events("train.start")] == [2, 1, 2]
    other = [e["loss"] for e in read_events(pair / "runs" / "t") if e["kind"] == "train.step"]
    assert [e["loss"] for e in steps] == pytest.approx(other, abs=0.05)
