"""Several nodes on loopback: a supervisor each, folders of their own, ranks that talk through gloo. A folder stands for the bucket."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from pathlib import Path

import pytest

from job.attempt import read_events
from job.checkpoint_folder import folders
from job.errors import UsageError
from job.nodes import Nodes, Order
from job.processes import free_port
from job.sealed import open_sealed
from job.wire import Wire

TWO = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_TASK_ID": "sky-2026-11-24-06-00-00-000000_speedrun_1-0",
}


# ---- what the environment says -------------------------------------------------------------------------------------------------


def test_without_skypilot_this_is_the_only_node() -> None:
    assert Nodes.here(None, "t", {}) == Nodes(1)
    assert Nodes.here(3, "t", {"SKYPILOT_NUM_GPUS_PER_NODE": "8"}) == Nodes(3)
    assert Nodes.here(None, "t", {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}).world_size == 8
    assert Nodes.here(None, "t", {"SKYPILOT_NUM_GPUS_PER_NODE": "0"}, otherwise=2).world_size == 2


def test_skypilots_variables_are_understood() -> None:
    nodes = Nodes.here(None, "t", TWO)
    assert (nodes.count, nodes.number, nodes.ranks, nodes.world_size, nodes.is_first) == (2, 1, 8, 16, False)
    assert Order("pretrain", nodes=2).share(nodes) == (range(8, 16), 16)
    assert Order("prepare", nodes=2).share(nodes) == (range(1), 1)
    first = Nodes.here(None, "t", TWO | {"SKYPILOT_NODE_RANK": "0"})
    assert Order("evaluate").share(first) == (range(8), 8)
    assert first.secret == nodes.secret != Nodes.here(None, "other", TWO).secret


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"SKYPILOT_NODE_IPS": "10.0.0.1"}, "as many addresses in SKYPILOT_NODE_IPS (there are 1)"),
        ({"SKYPILOT_NODE_RANK": ""}, "(it is not set)"),
        ({"SKYPILOT_NODE_RANK": "2"}, "from 0 to 1 (it is 2)"),
        ({"SKYPILOT_NUM_NODES": "two"}, "SKYPILOT_NUM_NODES=two cannot be used: give a whole number"),
        ({"SKYPILOT_TASK_ID": ""}, "set SPEEDRUN_NODES_SECRET to the same text on all"),
    ],
)
def test_contradictions_are_said(changed: dict[str, str], said: str) -> None:
    environment = {key: value for key, value in (TWO | changed).items() if value}
    with pytest.raises(UsageError) as raised:
        Nodes.here(None, "t", environment)
    assert said in str(raised.value)


# ---- the connection ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def answered(listener: socket.socket, secret: bytes, into: list) -> threading.Thread:
    def answer() -> None:
        try:
            into.append(Wire.answer(listener.accept()[0], secret))
        except Exception as error:
            into.append(error)

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


def test_two_who_know_the_secret_talk_and_notice_the_others_end(listener: socket.socket) -> None:
    into: list = []
    thread = answered(listener, b"secret", into)
    mine = Wire.call("127.0.0.1", listener.getsockname()[1], b"secret")
    thread.join()
    (theirs,) = into
    mine.send({"a": ["ü", 1.5, None]})
    assert theirs.receive() == {"a": ["ü", 1.5, None]}
    assert not theirs.waiting()
    mine.close()
    with pytest.raises(EOFError):
        theirs.receive()
    theirs.send({"nobody": "hears"})


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", b"", b"\x00\x00\x00\x14#CHALLENGE#0123456789"])
def test_a_stranger_is_refused(listener: socket.socket, words: bytes) -> None:
    into: list = []
    thread = answered(listener, b"secret", into)
    with socket.create_connection(listener.getsockname()) as stranger:
        stranger.sendall(words)
        stranger.shutdown(socket.SHUT_WR)
        thread.join(20)
    assert isinstance(into[0], Exception)


def test_another_secret_is_refused_on_both_sides(listener: socket.socket) -> None:
    into: list = []
    thread = answered(listener, b"secret", into)
    with pytest.raises(AuthenticationError):
        Wire.call("127.0.0.1", listener.getsockname()[1], b"other")
    thread.join()
    assert isinstance(into[0], AuthenticationError)


# ---- runs ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Cluster:
    """`count` nodes with `ranks` processes each, whose folders are `base`/n0, n1 ...; `base`/bucket is what they share."""

    speedrun: object
    base: Path
    count: int = 2
    ranks: int = 1
    port: int = 0
    variables: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port = self.port or free_port()
        self.variables = {"SPEEDRUN_BUCKET": str(self.base / "bucket")} | self.variables
        self.started: list[subprocess.Popen] = []

    def out(self, number: int) -> Path:
        return self.base / f"n{number}"

    def start(self, number: int, command: str, *more: str, **changed: str) -> subprocess.Popen[str]:
        environment = self.speedrun.environment() | {
            "SKYPILOT_NUM_NODES": str(self.count),
            "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * self.count),
            "SKYPILOT_NODE_RANK": str(number),
            "SKYPILOT_TASK_ID": "a-task",
            "SPEEDRUN_NODES_PORT": str(self.port),
            "SPEEDRUN_NODES_WAIT": "120",
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
        return [int(child) for child in children if b"job.worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


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


def test_two_nodes_train_what_one_node_trains_to_the_last_bit(cluster, speedrun, tmp_path: Path) -> None:
    nodes = cluster()
    second = nodes.start(1, "pretrain", *SHORT)  # before the first node listens
    speedrun(speedrun.tiny("pretrain", tmp_path / "one", "--ranks", "2", *SHORT))
    said = nodes.wait([nodes.start(0, "pretrain", *SHORT), second], [0, 0])
    assert "waiting for 1 more of 2 nodes" in said[0]
    for run in (nodes.out(0) / "runs" / "t", tmp_path / "bucket" / "runs" / "t"):
        assert weights(run) == weights(tmp_path / "one" / "runs" / "t")
    assert len(weights(tmp_path / "one" / "runs" / "t")) == 2
    assert [e["step"] for e in nodes.events("train.step")] == [0, 1, 2]
    assert [e["step"] for e in nodes.events("checkpoint.sealed")] == [2, 3]
    assert not (nodes.out(1) / "runs" / "t" / "attempts").exists(), "the first node alone claims"
    assert not list(nodes.out(1).glob("runs/t/checkpoints/*")), "what is in the bucket is not kept"


def test_whoever_does_not_belong_is_sent_away(cluster) -> None:
    nodes = cluster()
    first = nodes.start(0, "pretrain", *SHORT)
    stranger = nodes.start(1, "pretrain", *SHORT, SKYPILOT_TASK_ID="another-task")
    (said,) = nodes.wait([stranger], [2])
    assert "its secret is another one" in said
    assert first.poll() is None, "the first node goes on waiting"
    other = nodes.start(1, "pretrain", *SHORT, "-o", "train.seed=1")
    for said in nodes.wait([first, other], [2, 2]):
        assert "was started with another command than the first node" in said
        assert "Traceback" not in said


def test_folders_of_their_own_need_a_bucket(cluster) -> None:
    nodes = cluster(variables={"SPEEDRUN_BUCKET": ""})
    for said in nodes.wait(nodes.start_all("pretrain", *SHORT), [2, 2]):
        assert said.rstrip().endswith("give --bucket, or an --out that all nodes share")


def test_a_node_that_does_not_come_is_named(cluster) -> None:
    nodes = cluster(variables={"SPEEDRUN_NODES_WAIT": "1"})
    (said,) = nodes.wait([nodes.start(0, "pretrain", *SHORT)], [75])
    assert "node 1 (127.0.0.1) did not call within 1 s" in said
    (said,) = nodes.wait([nodes.start(1, "pretrain", *SHORT)], [75])
    assert "node 0 (127.0.0.1) did not answer" in said
