"""Several machines, one run: what each of them is told, and who decides.

    node 0 (the first)                          node 1, 2 ...
    supervisor: claims the attempt, records,  <-- one connection each -->  supervisor: starts ranks, passes on what they say
    decides borders, seals, ends                                            and what they are told (job/run/follow.py)
      ranks 0 .. n-1                            ranks n .. 2n-1
           \\_______________ collectives, meeting at the first node's address _______________/

The same command is given on every node. Which node it is on it reads from the environment, as SkyPilot sets it:

    SKYPILOT_NODE_IPS            one address a line, the first node's first
    SKYPILOT_NUM_NODES           how many
    SKYPILOT_NODE_RANK           which one this is
    SKYPILOT_NUM_GPUS_PER_NODE   processes on each, unless --ranks says so
    SKYPILOT_TASK_ID             the same on all nodes and nowhere else: what the secret is made from
    SPEEDRUN_NODES_PORT          where the first node listens (29461), open between the nodes as all ports are in a SkyPilot cluster
    SPEEDRUN_NODES_SECRET        instead of SKYPILOT_TASK_ID where there is none
    SPEEDRUN_NODES_WAIT          seconds that nodes wait for each other at the start (600)

On one node none of this happens: no socket is opened.

**One place decides.** The first node's supervisor runs `supervise` over all ranks; those of other nodes are objects like its own
(job/run/crew.py). So a border, a failure and an exit code are the same thing on one node and on many. All nodes end with its exit code. A
signal that any node gets is a signal to the run: it stops at a shared border with a checkpoint. A node that is lost ends the run with
75 on all others, and the same command goes on from the newest checkpoint, on as many nodes as there are then.

**Disks differ.** Every node makes or finds its own prepared set: equal inputs give equal bytes, so nothing is sent. A checkpoint's parts
lie where their ranks wrote them; see job/store/checkpoint_folder.py for how they become one. Evaluation and report happen on the first node
alone while the others wait: what they would save is minutes, and would cost every node all weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

from job.errors import UsageError
from job.machine import host
from job.recipe.config import Recipe, preset_header
from job.store.sealed import content_id

PORT = 29461
WAIT = 600.0


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Where the run's processes are; by default one node with one of them."""

    ranks: int = 1
    """processes on each node"""
    addresses: tuple[str, ...] = ("127.0.0.1",)
    number: int = 0
    """which node this is"""
    port: int = PORT
    secret: bytes = b""
    wait: float = WAIT

    @classmethod
    def here(
        cls, ranks: int | None, run_id: str, environment: Mapping[str, str] = os.environ, *, otherwise: int = 1
    ) -> Nodes:
        """What the environment says. `ranks` processes on each node; None: a GPU each, or `otherwise` where it names none.

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
                f" and a SKYPILOT_NODE_RANK from 0 to {count - 1} (it is {environment.get('SKYPILOT_NODE_RANK', 'not set')})"
            )
        known = environment.get("SPEEDRUN_NODES_SECRET") or environment.get("SKYPILOT_TASK_ID")
        if not known:
            raise UsageError(
                "several nodes need a secret in common, so that no stranger joins the run: set SPEEDRUN_NODES_SECRET to the same text on all"
            )
        secret = hashlib.sha256(f"{known}\n{run_id}".encode()).digest()
        port, wait = (
            _number(environment, "SPEEDRUN_NODES_PORT", PORT),
            _number(environment, "SPEEDRUN_NODES_WAIT", int(WAIT)),
        )
        return cls(ranks, addresses, number, port, secret, float(wait))

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
class Order:
    """What every node is told alike when a stage starts; the rest (folders, threads) each node knows of itself."""

    stage: str
    nodes: int = 1
    """how many have part in it, the first ones"""
    attempt: int = 0
    prepared: str = ""
    """id of the prepared set that the stage works on"""
    resume: int | None = None
    """rows of the checkpoint that training goes on from"""
    port: int = 0
    """of the first node, where the ranks meet"""
    split: bool = False
    """whether a checkpoint's parts come together in the store, because the nodes' disks differ"""

    def share(self, nodes: Nodes) -> tuple[range, int]:
        """This node's ranks, and how many there are in all. A prepare is one process on each node, which knows of no other."""
        if self.stage == "prepare":
            return range(1), 1
        return nodes.ranks_of(nodes.number), self.nodes * nodes.ranks

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def nodes_here(ranks: int | None, run_id: str, preset: str = "") -> Nodes:
    """The nodes of a run as the environment has them, and how many processes each has: one a GPU, one where the preset is for a CPU."""
    if ranks is None and preset and preset_header(preset).machine == "cpu":
        ranks = 1
    return Nodes.here(ranks, run_id, otherwise=max(1, host.gpu_count()))


def same_command(recipe: Recipe, nodes: Nodes) -> str:
    """What the nodes of a run must agree in."""
    return f"recipe {content_id('recipe', recipe.values())} with {nodes.ranks} processes on each node"


def _number(environment: Mapping[str, str], name: str, otherwise: int) -> int:
    text = environment.get(name, "").strip()
    try:
        return int(text) if text else otherwise
    except ValueError:
        raise UsageError(f"{name}={text} cannot be used: give a whole number") from None
