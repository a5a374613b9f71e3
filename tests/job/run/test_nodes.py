"""Several nodes, part by part: what the environment says, the connection, parts of checkpoints, the meeting."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError
from pathlib import Path

import pytest

from job.console import Console
from job.errors import InterruptedRun, StorageError, UsageError
from job.run.crew import crew_of
from job.run.follow import follow
from job.run.nodes import Nodes, Order
from job.run.processes import LocalRank, free_port
from job.run.relay import PublishingRank
from job.run.site import Site
from job.run.supervise import Interrupts
from job.run.wire import Wire
from job.store.stores import FolderStore

TWO = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_TASK_ID": "sky-2026-11-24-06-00-00-000000_speedrun_1-0",
}


# ---- what the environment says


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


# ---- the connection


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
        with contextlib.suppress(OSError):  # who was refused at once has nothing left to end
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


# ---- parts of checkpoints

CHILD = """
import os
pipe = os.fdopen(int(os.environ["SPEEDRUN_EVENTS_FD"]), "w")
pipe.write('{"part": {"rows": 8}}\\n{"boundary": 3}\\n')
"""


def said_until(rank: PublishingRank, over: Callable[[list], bool]) -> list[dict]:
    said: list[dict] = []
    with contextlib.suppress(EOFError):
        while not over(said):
            with contextlib.suppress(BlockingIOError):
                said += rank.messages()
            time.sleep(0.01)
    return said


@pytest.fixture
def child(tmp_path: Path) -> LocalRank:
    (tmp_path / "a_rank.py").write_text(CHILD)
    return LocalRank("rank 0", [], os.environ | {"PYTHONPATH": str(tmp_path)}, tmp_path / "log", module="a_rank")


def test_a_part_is_heard_of_when_it_is_published_and_nothing_waits_for_it(child: LocalRank) -> None:
    may = threading.Event()
    rank = PublishingRank(child, lambda part: may.wait())
    assert said_until(rank, over=bool) == [{"boundary": 3}]
    while rank.poll() is None:
        time.sleep(0.01)
    assert not rank.closed, "its process has ended, its part is still on its way"
    may.set()
    assert said_until(rank, over=lambda said: False) == [{"part": {"rows": 8}}]
    assert rank.closed and rank.poll() == 0 and rank.error is None


def test_a_part_that_cannot_be_published_fails_its_rank(child: LocalRank) -> None:
    def refuse(part: dict) -> None:
        raise StorageError("the bucket is gone")

    rank = PublishingRank(child, refuse)
    assert said_until(rank, over=lambda said: False) == [{"boundary": 3}]
    assert rank.error == (12, "the bucket is gone") and rank.poll() == 12


# ---- the meeting


@dataclasses.dataclass
class Meeting:
    """Two nodes that meet in threads of this process; `outcome` is what each of both raised, or None."""

    base: Path
    outs: tuple[str, str] = ("n0", "n1")
    sames: tuple[str, str] = ("a command", "a command")
    secrets: tuple[bytes, bytes] = (b"secret", b"secret")
    store: FolderStore | None = None
    present: tuple[int, ...] = (0, 1)
    wait: float = 20.0
    split: bool | None = None

    def hold(self) -> list[Exception | None]:
        port = free_port()
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(self._attend, number, port) for number in self.present]
            return [future.exception() for future in futures]

    def _attend(self, number: int, port: int) -> None:
        nodes = Nodes(1, ("127.0.0.1", "127.0.0.1"), number, port, self.secrets[number], self.wait)
        run = self.base / self.outs[number] / "runs" / "t"
        run.mkdir(parents=True, exist_ok=True)
        site = Site(run.parents[1], run, store=self.store)
        interrupts, console = Interrupts(), Console(-1)
        if number:
            follow(nodes, site, self.sames[1], begin=lambda shared: None, interrupts=interrupts, console=console)
            return
        with crew_of(nodes, interrupts, console) as crew:
            crew.meet(self.sames[0], site)
            self.split = crew.split


def test_nodes_find_out_whether_they_share_a_folder(tmp_path: Path) -> None:
    together = Meeting(tmp_path, outs=("n0", "n0"))
    assert together.hold() == [None, None] and together.split is False
    apart = Meeting(tmp_path, store=FolderStore(tmp_path / "bucket"))
    assert apart.hold() == [None, None] and apart.split is True
    assert not list(tmp_path.rglob(".seen-*"))


def test_folders_of_their_own_need_a_bucket(tmp_path: Path) -> None:
    for error in Meeting(tmp_path).hold():
        assert isinstance(error, UsageError)
        assert str(error).endswith("give --bucket, or an --out that all nodes share")


def test_another_command_ends_both(tmp_path: Path) -> None:
    for error in Meeting(tmp_path, sames=("recipe 1", "recipe 2")).hold():
        assert isinstance(error, UsageError)
        assert (
            str(error)
            == "node 1 (127.0.0.1) was started with another command than the first node: recipe 2, not recipe 1"
        )


def test_a_stranger_is_sent_away_and_the_first_node_goes_on_waiting(tmp_path: Path) -> None:
    first, stranger = Meeting(tmp_path, secrets=(b"secret", b"another"), wait=2).hold()
    assert isinstance(stranger, UsageError) and "its secret is another one" in str(stranger)
    assert isinstance(first, InterruptedRun) and "node 1 (127.0.0.1) did not call within 2 s" in str(first)


def test_a_first_node_that_does_not_answer_is_named(tmp_path: Path) -> None:
    (error,) = Meeting(tmp_path, present=(1,), wait=0.5).hold()
    assert isinstance(error, InterruptedRun) and "node 0 (127.0.0.1) did not answer" in str(error)
