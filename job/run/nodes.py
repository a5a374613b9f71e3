"""Several machines, one run: each starts its own ranks, and what decides is read from the bucket or the folder that all
share.

    node 0 (the first)                                         node 1, 2 ...
    claims the attempt; writes launches/<N>.<stage>.json  -->  checks the claim, reads the launch (job/run/join.py)
    supervises ranks 0 .. n-1                                  supervises ranks n .. 2n-1

Which node this is the environment says, as SkyPilot sets it:

    SKYPILOT_NODE_IPS            one address a line, the first node's first
    SKYPILOT_NUM_NODES           how many
    SKYPILOT_NODE_RANK           which one this is
    SKYPILOT_NUM_GPUS_PER_NODE   processes on each, unless --ranks says so
    SKYPILOT_TASK_ID             the same on all nodes and nowhere else: it tells one run's nodes from another's
    SPEEDRUN_NODES_PORT          where the first node listens (29461); a SkyPilot cluster has it open
    SPEEDRUN_NODES_SECRET        instead of SKYPILOT_TASK_ID where there is none
    SPEEDRUN_NODES_WAIT          seconds that nodes wait for each other at the start (600)

Heartbeats, failures and the exit code travel through torch's TCPStore (job/run/node_link.py). All nodes end with the
first one's exit code; a lost node ends the run with 75. Where disks differ, every node makes or pulls its own prepared
set, and a checkpoint's parts come together in the bucket (job/run/node_checkpoints.py). Evaluation and report happen
on the first node while the others wait.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from job.errors import UsageError
from job.machine import host
from job.recipe.config import Recipe, preset_header
from job.run.processes import PACKAGES, LocalRank, environment_for, start_ranks
from job.store.checkpoint_folder import folder_of
from job.store.fence import Fenced, run_key
from job.store.sealed import content_id, is_sealed, sha256_file
from job.store.stores import FolderStore, Store

PORT = 29461
WAIT = 600


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Where the run's processes are; by default one node with one of them."""

    ranks: int = 1
    """processes on each node"""
    addresses: tuple[str, ...] = ("127.0.0.1",)
    number: int = 0
    """which node this is"""
    port: int = PORT
    secret: str = ""
    wait: float = WAIT
    """seconds that nodes wait for each other at the start"""

    @classmethod
    def here(
        cls, ranks: int | None, run_id: str, environment: Mapping[str, str] = os.environ, *, otherwise: int = 1
    ) -> Nodes:
        """What the environment says. `ranks` processes on each node; None: a GPU each, or `otherwise` where it names
        none.

        UsageError when the variables contradict each other.
        """
        count = _number(environment, "SKYPILOT_NUM_NODES", 1)
        ranks = ranks or _number(environment, "SKYPILOT_NUM_GPUS_PER_NODE", 0) or otherwise
        if count <= 1:
            return cls(ranks)
        number = _number(environment, "SKYPILOT_NODE_RANK", -1)
        addresses = tuple(environment.get("SKYPILOT_NODE_IPS", "").split())
        if len(addresses) != count or not 0 <= number < count:
            raise UsageError(
                f"SKYPILOT_NUM_NODES={count} needs as many addresses in SKYPILOT_NODE_IPS (there are {len(addresses)})"
                f" and a SKYPILOT_NODE_RANK from 0 to {count - 1}"
                f" (it is {environment.get('SKYPILOT_NODE_RANK', 'not set')})"
            )
        known = environment.get("SPEEDRUN_NODES_SECRET") or environment.get("SKYPILOT_TASK_ID")
        if not known:
            raise UsageError(
                "several nodes need a secret in common, so that no stranger joins the run: set SPEEDRUN_NODES_SECRET"
                " to the same text on all"
            )
        secret = hashlib.sha256(f"{known}\n{run_id}".encode()).hexdigest()
        port = _number(environment, "SPEEDRUN_NODES_PORT", PORT)
        return cls(ranks, addresses, number, port, secret, _number(environment, "SPEEDRUN_NODES_WAIT", WAIT))

    @property
    def count(self) -> int:
        return len(self.addresses)

    @property
    def world_size(self) -> int:
        return self.count * self.ranks

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def alone(self) -> Nodes:
        """This node without the others."""
        return Nodes(self.ranks)

    def ranks_of(self, number: int) -> range:
        """The ranks of node `number`."""
        return range(number * self.ranks, (number + 1) * self.ranks)

    def name(self, number: int) -> str:
        return f"node {number} ({self.addresses[number]})"


@dataclasses.dataclass(frozen=True)
class LaunchSpec:
    """What the first node decides for a stage, written once as a document that every other node reads."""

    stage: str
    attempt: int = 0
    prepared: str = ""
    """id of the prepared set that the stage works on"""
    resume: int | None = None
    """rows of the checkpoint that training goes on from"""
    port: int = 0
    """of the first node, where the ranks meet"""
    split: bool = False
    """whether the nodes' disks differ, so that a checkpoint's parts come together in the store"""

    @staticmethod
    def key(run: Path, attempt: int, stage: str) -> str:
        return f"{run_key(run.name)}/launches/{attempt}.{stage}.json"

    def write(self, node: NodeContext) -> None:
        data = json.dumps(dataclasses.asdict(self)).encode()
        node.fenced(self.attempt).create(self.key(node.run, self.attempt, self.stage), data)

    @classmethod
    def read(cls, node: NodeContext, attempt: int, stage: str) -> LaunchSpec | None:
        data = node.documents.get(cls.key(node.run, attempt, stage))
        return cls(**json.loads(data)) if data else None


@dataclasses.dataclass(frozen=True)
class NodeContext:
    """One node's own part in a run: its folders, and how ranks are started in them."""

    out: Path
    run: Path
    nodes: Nodes = dataclasses.field(default_factory=Nodes)
    threads: int = 0
    """CPU threads that a rank has; 0: the cores, divided"""
    store: Store | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """variables that its ranks are given beside those that all processes have"""
    asked: Path | None = None
    """the document of an evaluation that is asked for, where it is not the run's recipe.json"""

    @property
    def documents(self) -> Store:
        """Where nodes read what was decided: the bucket, else the folder that they must share."""
        return self.store or FolderStore(self.out)

    def fenced(self, attempt: int) -> Store:
        """The store for the writes of `attempt`."""
        return Fenced(self.documents, self.run.name, attempt)

    def start(self, spec: LaunchSpec) -> list[LocalRank]:
        """This node's ranks of a stage. Only training has ranks on all nodes; a prepare is one process."""
        nodes, split = self.nodes, self.nodes.count > 1
        local = 1 if spec.stage == "prepare" else nodes.ranks
        trains = spec.stage == "pretrain"
        resume = "" if spec.resume is None else str(folder_of(self.run, spec.resume))
        document = self.asked or self.run / "recipe.json"
        arguments = [str(self.out), str(document), str(self.run), str(spec.attempt), resume, spec.prepared]
        ranks = start_ranks(
            [spec.stage, *arguments],
            world_size=nodes.world_size if trains else local,
            threads=self.threads,
            environment=self.environment,
            logs=self.run / "logs",
            label=f"{spec.attempt}.{spec.stage}",
            here=nodes.ranks_of(nodes.number) if trains else range(local),
            node=nodes.number if split else None,
            master=(nodes.addresses[0], spec.port) if split and trains else None,
        )
        prepared = self.out / "prepared" / spec.prepared
        if trains and is_sealed(prepared / "begun") and not is_sealed(prepared / "set"):
            ranks.append(self.start_background(arguments, spec.attempt))
        return ranks

    def start_background(self, arguments: list[str], attempt: int) -> LocalRank:
        """The process that makes the rest of the prepared set while training consumes its beginning."""
        nodes = self.nodes
        log = f"{attempt}.background.log" if nodes.count == 1 else f"{attempt}.background.node{nodes.number}.log"
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(nodes.ranks + 1)}
        environment = {**environment_for("background", os.environ), **alone, "PYTHONUNBUFFERED": "1"}
        name = "the process that prepares rows" + ("" if nodes.count == 1 else f" on node {nodes.number}")
        process = LocalRank(name, ["background", *arguments], environment, self.run / "logs" / log)
        process.apart = True
        return process


def nodes_here(ranks: int | None, run_id: str, preset: str = "") -> Nodes:
    """The nodes as the environment has them, a process for each GPU, one where the preset is for a CPU."""
    if ranks is None and preset and preset_header(preset).machine == "cpu":
        ranks = 1
    return Nodes.here(ranks, run_id, otherwise=max(1, host.gpu_count()))


def same_command(recipe: Recipe, nodes: Nodes) -> str:
    """What the nodes of a run must agree in."""
    root = Path(PACKAGES)
    files = sorted([*root.glob("job/**/*.py"), *root.glob("model/*.py")])
    sources = {str(file.relative_to(root)): sha256_file(file) for file in files}
    code = content_id("sources", sources)
    return f"recipe {content_id('recipe', recipe.values())} with {nodes.ranks} processes on each node, code {code}"


def _number(environment: Mapping[str, str], name: str, otherwise: int) -> int:
    text = environment.get(name, "").strip()
    try:
        return int(text) if text else otherwise
    except ValueError:
        raise UsageError(f"{name}={text} cannot be used: give a whole number") from None
