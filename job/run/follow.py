"""The supervisor of a node that is not the first (job/run/nodes.py): it decides nothing.

It calls the first node, starts the ranks it is told to, passes on what they say and what they are told, and ends as the first node says.
Of what its ranks report it passes on what only they can know (borders, parts of checkpoints, errors, warnings); steps and curves come
from rank 0. When the first node is lost, or this process is killed, its ranks end with it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Any

from job.console import Console
from job.errors import DataError, InterruptedRun, SpeedrunError, UsageError, error_for
from job.recipe.config import Recipe
from job.reporter import Reporter
from job.run.bucket import Bucket
from job.run.nodes import Nodes, Order, same_command
from job.run.processes import GRACE, LocalRank
from job.run.site import Site
from job.run.supervise import GOES_ON, Interrupts
from job.run.wire import Wire
from job.store.checkpoint_folder import sweep_parts
from job.train.compile_cache import Caches
from job.train.split_checkpoint import fetch

LAST_WORD = 4 * GRACE
"""seconds that the first node has to end the run after a signal"""


def join(
    out: Path, run_id: str, recipe: Recipe, *, fresh: bool, console: Console, nodes: Nodes, bucket: Bucket | None = None
) -> None:
    """On every node but the first: take part in the run until the first one ends it, and end as it does."""
    from job.run.launch import open_run, run_folder

    def begin(shared: bool) -> None:
        if not shared:
            open_run(out, run_id, recipe, fresh=fresh, ranks=nodes.world_size)

    site = Site(out, run_folder(out, run_id), recipe.train.threads, bucket and bucket.store)
    with Interrupts() as interrupts:
        caches = Caches("pretrain", site, recipe, nodes, console, Reporter())
        try:
            follow(nodes, caches.site, same_command(recipe, nodes), begin=begin, interrupts=interrupts, console=console)
        finally:
            caches.end(interrupted=interrupts.count > 0)


def follow(
    nodes: Nodes, site: Site, same: str, *, begin: Callable[[bool], None], interrupts: Interrupts, console: Console
) -> None:
    """Until the run has ended: returns when it is done, raises what the first node raised otherwise.

    `same` is compared with the first node's. `begin(shared)` makes the run's folder here when that is known: `shared` is whether the
    first node's folder is this one's too.
    """
    wire = _call(nodes, interrupts, console)
    wire.send({"node": nodes.number, "same": same})
    follower = _Follower(nodes, site, wire, interrupts, begin, console)
    try:
        code, reason = follower.serve()
    except SpeedrunError as error:
        wire.send({"failed": [int(error.exit_code), str(error)]})
        raise
    finally:
        follower.kill()
        wire.close()
    if code:
        raise error_for(code, reason)


def _call(nodes: Nodes, interrupts: Interrupts, console: Console) -> Wire:
    until = time.monotonic() + nodes.wait
    first = nodes.name(0)
    console.say(f"this is {nodes.name(nodes.number)} of {nodes.count} nodes; calling {first} on port {nodes.port}")
    while time.monotonic() < until:
        interrupts.check("the first node answered")
        try:
            return Wire.call(nodes.addresses[0], nodes.port, nodes.secret)
        except AuthenticationError:
            raise UsageError(
                f"{first} runs something else on port {nodes.port} (its secret is another one): give all nodes the same command and"
                " SKYPILOT_TASK_ID, or set SPEEDRUN_NODES_PORT to a free port on all"
            ) from None
        except (OSError, EOFError):
            time.sleep(0.2)
    raise InterruptedRun(
        f"{first} did not answer on port {nodes.port} within {nodes.wait:.0f} s; the same command on all nodes tries again"
    )


class _Fetch(threading.Thread):
    """Pulls a checkpoint while the node goes on listening."""

    def __init__(self, site: Site, rows: int) -> None:
        super().__init__(daemon=True)
        self.site, self.rows = site, rows
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            fetch(self.site.store, self.site.run, self.rows)
        except BaseException as error:
            self.error = error


class _Follower:
    def __init__(
        self,
        nodes: Nodes,
        site: Site,
        wire: Wire,
        interrupts: Interrupts,
        begin: Callable[[bool], None],
        console: Console,
    ) -> None:
        self.nodes, self.site, self.wire, self.interrupts, self.console = nodes, site, wire, interrupts, console
        self._begin = begin
        self._ranks: list[LocalRank] = []
        self._open: set[int] = set()
        self._reported: set[int] = set()
        self._shares = self._split = False
        self._prepared = ""
        self._fetch: _Fetch | None = None
        self._signals = 0
        self._patience: float | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(wire, selectors.EVENT_READ, None)

    def serve(self) -> tuple[int, str]:
        """Obey until the first node says how the run ended: exit code and reason."""
        while True:
            for key, _ in self._selector.select(timeout=0.2):
                if key.data is not None and key.data in self._open:
                    self._relay(key.data)
                while key.data is None and self.wire.waiting():
                    if ended := self._obey(self._receive()):
                        return ended
            self._report_fetch()
            self._report_ends()
            self._pass_on_signals()

    def kill(self) -> None:
        """End the ranks, and say so; parts that nobody will seal are removed."""
        for rank in self._ranks:
            rank.kill()
        for local in sorted(self._open):
            with contextlib.suppress(BlockingIOError):
                while local in self._open:
                    self._relay(local)
            self._close(local)
        self._report_ends()
        if self._split:
            sweep_parts(self.site.run)

    def _receive(self) -> dict[str, Any]:
        try:
            return self.wire.receive()
        except EOFError:
            raise InterruptedRun(f"the first node, {self.nodes.name(0)}, was lost; {GOES_ON}") from None

    def _obey(self, message: dict[str, Any]) -> tuple[int, str] | None:
        match message:
            case {"do": "look", "sign": name}:
                self._shares = (self.site.run / name).is_file()
                self._begin(self._shares)
                self.wire.send({"shares": self._shares})
            case {"do": "fetch", "rows": rows}:
                self._fetch = _Fetch(self.site, rows)
                self._fetch.start()
            case {"do": "start", "order": order}:
                self._start(Order(**order))
            case {"do": "tell", "rank": local, "message": told}:
                self._ranks[local].tell(told)
            case {"do": "kill"}:
                self.kill()
            case {"do": "end", "code": code, "reason": reason}:
                return code, reason
        return None

    def _start(self, order: Order) -> None:
        if order.stage != "prepare" and not self._shares and order.prepared != self._prepared:
            raise DataError(
                f"this node prepared other rows ({self._prepared or 'none'}) than the first one ({order.prepared}): give all nodes the same text"
            )
        self.console.say(f"{order.stage}: {len(order.share(self.nodes)[0])} of its ranks start here")
        self._split = order.split
        self._ranks = self.site.start(order, self.nodes)
        self._reported.clear()
        self._open = set(range(len(self._ranks)))
        for local, rank in enumerate(self._ranks):
            self._selector.register(rank.pipe, selectors.EVENT_READ, local)

    def _relay(self, local: int) -> None:
        """Pass on what a rank has said."""
        try:
            for message in self._ranks[local].messages():
                self._pass_on(local, message)
        except EOFError:
            self._close(local)

    def _close(self, local: int) -> None:
        if local in self._open:
            self._open.remove(local)
            self._selector.unregister(self._ranks[local].pipe)
            os.close(self._ranks[local].pipe)
            self.wire.send({"rank": local, "closed": True})

    def _pass_on(self, local: int, message: dict[str, Any]) -> None:
        match message:
            case {"progress": shown}:
                self.console.progress(*shown)
                return
            case {"error": [code, text]}:
                message = {"error": [code, f"node {self.nodes.number}: {text}"]}
            case {"kind": "warning", "text": text}:
                self.console.say(f"warning: {text}")
                message = message | {"text": f"node {self.nodes.number}: {text}"}
            case {"kind": kind}:
                if kind == "prepare.done":
                    self._prepared = message["id"]
                return
        self.wire.send({"rank": local, "line": message})

    def _report_fetch(self) -> None:
        if self._fetch and not self._fetch.is_alive():
            fetch, self._fetch = self._fetch, None
            if fetch.error:
                raise fetch.error
            self.wire.send({"fetched": fetch.rows})

    def _report_ends(self) -> None:
        for local, rank in enumerate(self._ranks):
            code = rank.poll()
            if code is not None and local not in self._reported:
                self._reported.add(local)
                if rank.error:
                    self._pass_on(local, {"error": list(rank.error)})
                self.wire.send({"rank": local, "exit": code, "tail": rank.tail() if code else ""})

    def _pass_on_signals(self) -> None:
        if self.interrupts.count > self._signals:
            self._signals = self.interrupts.count
            self.wire.send({"signals": self._signals, "name": self.interrupts.name})
            self.console.say(f"{self.interrupts.name}: the first node stops the run ...")
            self._patience = self._patience or time.monotonic() + LAST_WORD
        if self._patience and time.monotonic() > self._patience:
            raise InterruptedRun(f"{self.interrupts.name} came and the first node did not end the run; {GOES_ON}")
