"""Several nodes, part by part: what the environment says, the records of nodes, the meeting, checkpoints from parts."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import PrefixStore, TCPStore

from job.console import Console
from job.errors import DataError, ExitCode, InterruptedRun, SpeedrunError, StorageError, UsageError
from job.run import node_link
from job.run.join import announced, current_attempt
from job.run.node_checkpoints import PartUploader, SplitCheckpointManager, fetch
from job.run.node_link import NodeLink, first_link, other_link
from job.run.nodes import LaunchSpec, NodeContext, Nodes
from job.run.processes import free_port
from job.run.supervise import Interrupts
from job.store.attempt import Attempt
from job.store.checkpoint_folder import KIND, CheckpointManager, folders, parts_folder, write_part
from job.store.sealed import MANIFEST, open_sealed, sha256_file
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
    assert nodes.ranks_of(nodes.number) == range(8, 16)
    first = Nodes.here(None, "t", TWO | {"SKYPILOT_NODE_RANK": "0"})
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


@pytest.mark.parametrize(
    ("stage", "world_size", "ranks"),
    [("prepare", "1", ["0"]), ("pretrain", "4", ["2", "3"]), ("evaluate", "2", ["0", "1"])],
)
def test_ranks_are_numbered_across_nodes_where_all_have_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, world_size: str, ranks: list[str]
) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr(
        "job.run.processes.LocalRank", lambda name, arguments, environment, log: started.append(environment)
    )
    NodeContext(tmp_path, tmp_path, Nodes(2, ("10.0.0.1", "10.0.0.2"), 1)).start(LaunchSpec(stage, port=7))
    assert [rank["RANK"] for rank in started] == ranks
    assert {rank["WORLD_SIZE"] for rank in started} == {world_size}
    assert [rank["LOCAL_RANK"] for rank in started] == [str(local) for local in range(len(ranks))]
    if stage == "pretrain":
        assert {(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in started} == {("10.0.0.1", "7")}


# ---- the meeting


@dataclasses.dataclass
class Meeting:
    """Two nodes that meet in threads of this process; `hold` gives what each of both raised, or None."""

    base: Path
    outs: tuple[str, str] = ("n0", "n1")
    sames: tuple[str, str] = ("a command", "a command")
    secrets: tuple[str, str] = ("secret", "secret")
    store: FolderStore | None = None
    present: tuple[int, ...] = (0, 1)
    wait: float = 20.0
    split: bool | None = None
    read: LaunchSpec | None = None
    port: int = dataclasses.field(default_factory=free_port)

    def hold(self) -> list[BaseException | None]:
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(self.attend, number) for number in self.present]
            return [future.exception() for future in futures]

    def attend(self, number: int) -> None:
        nodes = Nodes(1, ("127.0.0.1", "127.0.0.1"), number, self.port, self.secrets[number], self.wait)
        run = self.base / self.outs[number] / "runs" / "t"
        node = NodeContext(run.parents[1], run, nodes, store=self.store)
        (self.first if number == 0 else self.other)(node, Interrupts(), Console(-1))

    def first(self, node: NodeContext, interrupts: Interrupts, console: Console) -> None:
        attempt = Attempt.claim(node.run, node.store, same=self.sames[0])
        with first_link(node.nodes, interrupts, console, attempt.number) as link:
            link.meet()
            self.split = link.split
            self.lead(node, link, attempt)

    def other(self, node: NodeContext, interrupts: Interrupts, console: Console) -> None:
        with other_link(node.nodes, interrupts, console) as link:
            link.call()
            attempt, shares = current_attempt(node, link, self.sames[1])
            link.say(joined=attempt, shares=shares)
            self.follow(node, link, attempt)

    def lead(self, node: NodeContext, link: NodeLink, attempt: Attempt) -> None:
        LaunchSpec("pretrain", attempt.number, "rows", 80).write(node)
        link.say(launched="pretrain")
        link.wait("the other one had it", lambda record: record.get("ready") == "pretrain")

    def follow(self, node: NodeContext, link: NodeLink, attempt: int) -> None:
        self.read = announced(node, link, attempt, "")
        link.say(ready="pretrain")
        link.wait("the run ended", lambda record: record.get("end"))


def test_nodes_find_out_whether_they_share_a_folder_and_read_what_was_decided(tmp_path: Path) -> None:
    for meeting in (
        Meeting(tmp_path, outs=("n0", "n0")),
        Meeting(tmp_path, outs=("n2", "n3"), store=FolderStore(tmp_path / "bucket")),
    ):
        assert meeting.hold() == [None, None]
        assert meeting.split is (meeting.store is not None)
        assert meeting.read and (meeting.read.prepared, meeting.read.resume) == ("rows", 80)


def test_folders_of_their_own_need_a_bucket(tmp_path: Path) -> None:
    for error in Meeting(tmp_path).hold():
        assert isinstance(error, UsageError)
        assert str(error).endswith("give --bucket, or an --out that all nodes share")


def test_another_command_ends_both(tmp_path: Path) -> None:
    for error in Meeting(tmp_path, outs=("n0", "n0"), sames=("recipe 1", "recipe 2")).hold():
        assert isinstance(error, UsageError)
        assert (
            str(error)
            == "node 1 (127.0.0.1) was started with another command than the first node: recipe 2, not recipe 1"
        )


def test_a_stranger_is_sent_away_and_the_first_node_goes_on_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_link, "ANSWER", 3.0)
    first, stranger = Meeting(tmp_path, secrets=("secret", "another"), wait=8).hold()
    assert isinstance(stranger, UsageError) and "its secret is another one" in str(stranger)
    assert isinstance(first, InterruptedRun) and "node 1 (127.0.0.1) did not call within 8 s" in str(first)


def test_a_first_node_that_does_not_answer_is_named(tmp_path: Path) -> None:
    (error,) = Meeting(tmp_path, present=(1,), wait=0.5).hold()
    assert isinstance(error, InterruptedRun) and "node 0 (127.0.0.1) did not answer" in str(error)


def test_a_node_that_meets_an_attempt_that_is_over_tries_again(tmp_path: Path) -> None:
    class Late(Meeting):
        def other(self, node: NodeContext, interrupts: Interrupts, console: Console) -> None:
            Attempt.claim(self.base / "n2" / "runs" / "t", node.store)  # as a first node that was started anew does
            super().other(node, interrupts, console)

    meeting = Late(tmp_path, store=FolderStore(tmp_path / "bucket"))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meeting.attend, 0)
        while not meeting.store.list("runs/t/attempts"):
            time.sleep(0.01)
        for error in (pool.submit(meeting.attend, 1).exception(), first.exception()):
            assert isinstance(error, InterruptedRun) and "attempt 2 took over" in str(error)


def test_a_stranger_on_the_port_can_change_neither_recipe_nor_resume_point(tmp_path: Path) -> None:
    """One who even knows the secret, and sets the first node's record whenever a node may look."""

    class Watched(Meeting):
        def follow(self, node: NodeContext, link: NodeLink, attempt: int) -> None:
            stranger = PrefixStore("secret", TCPStore("127.0.0.1", self.port, wait_for_workers=False))
            forged = {"id": link.records[0]["id"], "attempt": attempt, "launched": "pretrain", "beat": 0}
            forged |= {"resume": 0, "prepared": "others", "recipe": {}, "same": "recipe 3"}
            for beat in range(2000):
                stranger.set("0", json.dumps(forged | {"beat": beat}))
            super().follow(node, link, attempt)

    meeting = Watched(tmp_path, store=FolderStore(tmp_path / "bucket"))
    outcome = meeting.hold()
    if meeting.read:
        assert (meeting.read.prepared, meeting.read.resume) == ("rows", 80)
    else:
        assert all(isinstance(error, InterruptedRun) for error in outcome)


@pytest.mark.parametrize("forged", [{"attempt": 7}, {"attempt": "x"}, {"launched": "evaluate"}, {"launched": 3}])
def test_what_a_stranger_announces_and_no_document_confirms_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forged: dict
) -> None:
    monkeypatch.setattr("job.run.join.SILENCE", 0.5)
    nodes = Nodes(1, ("127.0.0.1", "127.0.0.1"), 1)
    node = NodeContext(tmp_path, tmp_path / "runs" / "t", nodes, store=FolderStore(tmp_path / "bucket"))
    Attempt.claim(node.run, node.store, same="a command")
    link = NodeLink(nodes, Interrupts(), Console(-1))
    link.records[0] = {"attempt": 1} | forged
    with pytest.raises(InterruptedRun, match="does not know"):
        announced(node, link, current_attempt(node, link, "a command")[0], "")


# ---- failures and silence


def test_a_silent_node_is_lost_in_whatever_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Meeting):
        def lead(self, node: NodeContext, link: NodeLink, attempt: Attempt) -> None:
            monkeypatch.setattr(node_link, "SILENCE", 0.5)  # the meeting itself may take a busy machine longer
            link.wait("the run ended", lambda record: False)

        def follow(self, node: NodeContext, link: NodeLink, attempt: int) -> None:
            while link._written is not link._record:  # that it has joined
                time.sleep(0.01)
            link._closed.set()  # as a machine that vanishes
            link._thread.join()

    first, _ = Silent(tmp_path, outs=("n0", "n0")).hold()
    assert isinstance(first, InterruptedRun) and str(first).startswith("node 1 (127.0.0.1) was lost")


@pytest.mark.parametrize(("raised", "code"), [(DataError("bad rows"), 11), (RuntimeError("gloo"), 1)])
def test_a_failure_of_one_node_ends_both_alike(tmp_path: Path, raised: Exception, code: int) -> None:
    class Failing(Meeting):
        def follow(self, node: NodeContext, link: NodeLink, attempt: int) -> None:
            raise raised

    for error in Failing(tmp_path, outs=("n0", "n0")).hold():
        assert isinstance(error, SpeedrunError) and error.exit_code == ExitCode(code)
        assert str(error).startswith("node 1 (127.0.0.1): ")


def test_an_unexplained_end_of_ranks_is_explained_by_another_nodes_failure(tmp_path: Path) -> None:
    class Failing(Meeting):
        def lead(self, node: NodeContext, link: NodeLink, attempt: Attempt) -> None:
            raise link.cause(RuntimeError("connection closed by peer"))

        def follow(self, node: NodeContext, link: NodeLink, attempt: int) -> None:
            time.sleep(0.5)
            raise StorageError("the bucket is gone")

    for error in Failing(tmp_path, outs=("n0", "n0")).hold():
        assert isinstance(error, StorageError) and str(error) == "node 1 (127.0.0.1): the bucket is gone"


# ---- checkpoints from parts


def write_checkpoint_part(run: Path, rank: int, rows: int = 80) -> None:
    folder = parts_folder(run, rows, 1)
    folder.mkdir(parents=True, exist_ok=True)
    files, slices = {}, []
    for prefix in ("weights-", "optimizer-"):
        file = folder / f"{prefix}{rank:05d}.safetensors"
        file.write_text(f"{prefix}{rank}")
        files[file.name] = {"size": file.stat().st_size, "sha256": sha256_file(file)}
        slices.append((f"{prefix}a", file.name, rank, rank + 1))
    part = {"rows": rows, "step": 2, "files": files, "slices": slices, "made_from": {"rows": rows}}
    write_part(folder, rank, part | {"seconds": 1, "stall": 1})


def test_a_checkpoint_exists_when_the_parts_of_all_nodes_are_in_the_store(tmp_path: Path) -> None:
    runs = [tmp_path / name / "runs" / "t" for name in ("n0", "n1")]
    store, manifest = FolderStore(tmp_path / "bucket"), "runs/t/checkpoints/000000000000080/manifest.json"
    attempt = Attempt.claim(runs[0], store)
    others_ended = threading.Event()
    given = {"world_size": 2, "final_rows": 80, "minutes": 0}
    with SplitCheckpointManager(runs[0], attempt, store, others_ended.is_set, **given):
        write_checkpoint_part(runs[0], 0)
        while not store.list("runs/t/parts"):
            time.sleep(0.05)
        time.sleep(0.5)
        assert not store.get(manifest)
        with PartUploader(runs[1], 1, store):
            write_checkpoint_part(runs[1], 1)
        others_ended.set()
    assert store.get(manifest)
    assert not folders(runs[0]), "what is in the bucket is not kept"
    fetch(store, tmp_path / "n2" / "runs" / "t", 80)
    assert len(list((tmp_path / "n2" / "runs" / "t").glob("checkpoints/*/*.safetensors"))) == 4
    assert not store.list("runs/t/parts")


def test_on_a_shared_folder_the_first_node_seals(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "t"
    with CheckpointManager(run, Attempt.claim(run), world_size=2, final_rows=80, minutes=0) as manager:
        write_checkpoint_part(run, 0)
        manager.check()
        assert not folders(run)
        write_checkpoint_part(run, 1)
    (folder,) = folders(run)
    names = {path.name for path in open_sealed(folder, kind=KIND).path.iterdir()}
    assert names == {MANIFEST} | {
        f"{kind}-0000{rank}.safetensors" for kind in ("weights", "optimizer") for rank in (0, 1)
    }


def test_parts_of_a_node_that_ended_without_its_own_are_given_up(tmp_path: Path) -> None:
    run, store = tmp_path / "runs" / "t", FolderStore(tmp_path / "bucket")
    given = {"world_size": 2, "final_rows": 80, "minutes": 0}
    with SplitCheckpointManager(run, Attempt.claim(run, store), store, lambda: True, **given):
        write_checkpoint_part(run, 0)
    assert not store.get("runs/t/checkpoints/000000000000080/manifest.json")
    assert not list(run.glob("checkpoints/.*"))


def test_a_part_that_cannot_be_put_ends_the_stage(tmp_path: Path) -> None:
    class Gone(FolderStore):
        def put_file(self, key: str, path: Path, sha256: str) -> None:
            raise StorageError("the bucket is gone")

    uploader = PartUploader(tmp_path / "runs" / "t", 1, Gone(tmp_path / "bucket"))
    write_checkpoint_part(uploader.run, 0)
    with pytest.raises(StorageError):
        while True:
            uploader.check()
            time.sleep(0.05)
