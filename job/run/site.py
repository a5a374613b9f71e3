"""One node's own part in a run: its folders, and how ranks are started in them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

from job.run.nodes import Nodes, Order
from job.run.processes import LocalRank, Rank, start_ranks
from job.run.relay import PublishingRank
from job.store.checkpoint_folder import folder_of
from job.store.fence import Fenced
from job.store.stores import Store
from job.train.split_checkpoint import publish


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a run is on this node, and how many CPU threads a rank has (0: the cores, divided)."""

    out: Path
    run: Path
    threads: int = 0
    store: Store | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """variables that its ranks are given beside those that all processes have"""
    asked: Path | None = None
    """the document of an evaluation that is asked for, where it is not the run's recipe.json"""

    def fenced(self, attempt: int) -> Store:
        """The store for the writes of `attempt`."""
        return Fenced(self.store, self.run.name, attempt)

    def start(self, order: Order, nodes: Nodes) -> list[Rank]:
        """This node's ranks of the stage that is ordered."""
        ranks = self._start(order, nodes)
        if order.stage != "pretrain" or not order.split:
            return ranks
        store = self.fenced(order.attempt)
        return [PublishingRank(rank, functools.partial(publish, store, self.run, order.attempt)) for rank in ranks]

    def _start(self, order: Order, nodes: Nodes) -> list[LocalRank]:
        here, world_size = order.share(nodes)
        resume = "" if order.resume is None else str(folder_of(self.run, order.resume))
        document = self.asked or self.run / "recipe.json"
        alone = nodes.count == 1 or order.stage == "prepare"
        return start_ranks(
            [order.stage, str(self.out), str(document), str(self.run), str(order.attempt), resume, order.prepared],
            world_size=world_size,
            threads=self.threads,
            environment=self.environment,
            logs=self.run / "logs",
            label=f"{order.attempt}.{order.stage}",
            here=here,
            node=None if nodes.count == 1 else nodes.number,
            master=("127.0.0.1" if alone else nodes.addresses[0], order.port),
        )
