"""The first node's side of a run on several (job/run/nodes.py): meets the others, starts ranks on all, and sees theirs as its own.

    with crew_of(nodes, ...) as crew:
        crew.meet(...)
        supervise(stage, crew.start(crew.order(stage, ...), site), ...)

What another node says arrives in a thread per connection and is put where `supervise` looks. A lost connection is an error of every
rank of that node, with exit code 75.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from job.console import Console
from job.errors import ExitCode, InterruptedRun, SpeedrunError, UsageError, error_for
from job.run.nodes import Nodes, Order
from job.run.processes import GRACE, Rank, free_port
from job.run.relay import PUBLISH_SECONDS, RelayedRank
from job.run.site import Site
from job.run.supervise import GOES_ON, Interrupts
from job.run.wire import Wire

KILL_SECONDS = PUBLISH_SECONDS + 10.0
"""that a node has to say that its ranks are dead and what they wrote is in the store"""


class RemoteRank(RelayedRank):
    """A rank on another node."""

    remote = True

    def __init__(self, member: Member, local: int, name: str) -> None:
        super().__init__(name, f"its log on {member.name}")
        self._member, self._local = member, local
        self._code: int | None = None
        self._tail = ""
        self._dead = threading.Event()

    def hear(self, message: dict[str, Any]) -> None:
        """From the connection's thread: what the other node says of this rank."""
        match message:
            case {"line": line}:
                self.put(line)
            case {"exit": code, "tail": tail}:
                self._code, self._tail = code, tail
                self._dead.set()
            case {"closed": True}:
                self.end()

    def lose(self, code: int, text: str) -> None:
        """From the connection's thread: its node can say no more of it."""
        if not self._dead.is_set():
            self.fail(code, text)
        self._dead.set()
        self.end()

    def tell(self, message: dict[str, Any]) -> None:
        self._member.wire.send({"do": "tell", "rank": self._local, "message": message})

    def poll(self) -> int | None:
        return self.failed or self._code

    def ended(self) -> int | None:
        self._dead.wait(GRACE if self.closed else 0)
        return self.poll()

    def kill(self) -> None:
        if not (self._dead.is_set() and self.over.is_set()):
            self._member.wire.send({"do": "kill"})
            until = time.monotonic() + KILL_SECONDS
            for event in (self._dead, self.over):
                if not event.wait(max(0.0, until - time.monotonic())):
                    self._member.lose(f"{self._member.name} does not end its ranks; {GOES_ON}")

    def tail(self) -> str:
        return self._tail


class Member:
    """Another node, from its first word to the run's last."""

    def __init__(self, number: int, name: str, wire: Wire, interrupts: Interrupts) -> None:
        self.number, self.name, self.wire = number, name, wire
        self.failure: tuple[int, str] | None = None
        """why it takes part no more: exit code and sentence"""
        self.shares: bool | None = None
        """whether its --out is the first node's"""
        self.has: int | None = None
        """rows of the checkpoint that it has pulled"""
        self._interrupts = interrupts
        self._ranks: list[RemoteRank] = []
        self._lock = threading.Lock()
        self._listener = threading.Thread(target=self._listen, daemon=True)

    def begin(self) -> None:
        self._listener.start()

    def start(self, order: Order, ranks: range) -> list[RemoteRank]:
        self._ranks = [
            RemoteRank(self, local, f"rank {rank} on node {self.number}") for local, rank in enumerate(ranks)
        ]
        with self._lock:
            if self.failure:
                raise error_for(*self.failure)
            self.wire.send({"do": "start", "order": order.as_dict()})
        return self._ranks

    def lose(self, why: str, code: int = ExitCode.RESUME) -> None:
        """It takes part no more; its ranks fail for that."""
        with self._lock:
            self.failure = self.failure or (int(code), why)
        for rank in self._ranks:
            rank.lose(*self.failure)

    def check(self) -> None:
        if self.failure:
            raise error_for(*self.failure)

    def _listen(self) -> None:
        try:
            while True:
                self._hear(self.wire.receive())
        except EOFError:
            self.lose(f"{self.name} was lost; {GOES_ON}")

    def _hear(self, message: dict[str, Any]) -> None:
        match message:
            case {"rank": local, **said}:
                self._ranks[local].hear(said)
            case {"signals": count, "name": name}:
                self._interrupts.heard(self.number, count, name)
            case {"shares": shares}:
                self.shares = shares
            case {"fetched": rows}:
                self.has = rows
            case {"failed": [code, text]}:
                self.lose(f"{self.name}: {text}", code)


class Crew:
    """All nodes of the run; on one node, that one."""

    def __init__(self, nodes: Nodes, interrupts: Interrupts, console: Console) -> None:
        self.nodes, self._interrupts, self._console = nodes, interrupts, console
        self.members: dict[int, Member] = {}

    @property
    def split(self) -> bool:
        """Whether nodes see only what their own ranks write."""
        return not all(member.shares for member in self.members.values())

    def check(self) -> None:
        """Between stages: raise why a node takes part no more, if one does."""
        for member in self.members.values():
            member.check()

    def start(self, order: Order, site: Site) -> list[Rank]:
        """The ranks of a stage, on every node that has part in it, in order."""
        self.check()
        ranks: list[Rank] = list(site.start(order, self.nodes))
        try:
            for number in range(1, order.nodes):
                theirs = range(1) if order.stage == "prepare" else self.nodes.ranks_of(number)
                ranks += self.members[number].start(order, theirs)
        except BaseException:
            for rank in ranks:
                rank.kill()
            raise
        return ranks

    def order(self, stage: str, **told: Any) -> Order:
        """What to tell for `stage`: evaluation is the first node's, and so is a prepared set on a disk that all share."""
        alone = stage == "evaluate" or (stage == "prepare" and not self.split)
        return Order(stage, nodes=1 if alone else self.nodes.count, port=free_port(), split=self.split, **told)

    def fetch(self, rows: int) -> None:
        """Have every other node pull a checkpoint from the store."""
        for member in self.members.values():
            member.has = None
            member.wire.send({"do": "fetch", "rows": rows})
        self._wait("all nodes had the checkpoint", lambda member: member.has == rows)

    def _wait(self, until: str, met: Callable[[Member], bool]) -> None:
        while not all(met(member) for member in self.members.values()):
            self._interrupts.check(until)
            self.check()
            time.sleep(0.01)

    # ---- the beginning and the end

    def meet(self, same: str, site: Site) -> None:
        """Until every other node has called; `same` is what all must have been started with.

        Raises InterruptedRun when one does not come in time or a signal does, UsageError when one was started differently.
        """
        if self.nodes.count == 1:
            return
        until = time.monotonic() + self.nodes.wait
        with self._listening(until) as listener:
            self._console.say(
                f"waiting for {self.nodes.count - 1} more of {self.nodes.count} nodes on port {self.nodes.port}"
            )
            while len(self.members) < self.nodes.count - 1:
                self._interrupts.check("all nodes were there")
                self.check()
                if time.monotonic() > until:
                    missing = [self.nodes.name(n) for n in range(1, self.nodes.count) if n not in self.members]
                    raise InterruptedRun(
                        f"{', '.join(missing)} did not call within {self.nodes.wait:.0f} s; the same command on all nodes tries again"
                    )
                with contextlib.suppress(TimeoutError):
                    called, address = listener.accept()
                    threading.Thread(target=self._welcome, args=(called, address[0], same), daemon=True).start()
        self.check()  # the last to come may have been started differently
        self._look_for_shared_disk(site)

    @contextlib.contextmanager
    def _listening(self, until: float) -> Iterator[socket.socket]:
        while True:
            try:
                listener = socket.create_server(("", self.nodes.port), backlog=64)
                break
            except OSError as error:
                self._interrupts.check("all nodes were there")
                if time.monotonic() > until:
                    raise UsageError(
                        f"port {self.nodes.port} cannot be listened on ({error.strerror}); set SPEEDRUN_NODES_PORT to a free one on all nodes"
                    ) from error
                time.sleep(0.2)
        with listener:
            listener.settimeout(0.2)
            yield listener

    def _welcome(self, called: socket.socket, address: str, same: str) -> None:
        """In a thread: a caller becomes a member, or is sent away."""
        try:
            wire = Wire.answer(called, self.nodes.secret)
            hello = wire.receive()
            number = int(hello["node"])
            member = Member(number, self.nodes.name(number), wire, self._interrupts)
        except Exception as error:
            self._console.say(
                f"a caller from {address} was sent away: it does not know this run's secret ({type(error).__name__})"
            )
            return
        if hello["same"] != same:
            member.lose(
                f"{member.name} was started with another command than the first node: {hello['same']}, not {same}",
                ExitCode.USAGE,
            )
        member.begin()
        before = self.members.get(number)
        self.members[number] = member
        if before:
            before.wire.close()

    def _look_for_shared_disk(self, site: Site) -> None:
        sign = site.run / f".seen-by-all-{secrets.token_hex(8)}"
        sign.touch()
        try:
            for member in self.members.values():
                member.wire.send({"do": "look", "sign": sign.name})
            self._wait("all nodes had answered", lambda member: member.shares is not None)
        finally:
            sign.unlink()
        if len({member.shares for member in self.members.values()}) > 1:
            raise UsageError(
                "some nodes write to the first node's --out and some do not; give all the same kind of folder"
            )
        if self.split and site.store is None:
            raise UsageError(
                "each node has an --out of its own, so checkpoints need a place where their parts come together: give --bucket,"
                " or an --out that all nodes share"
            )

    def dismiss(self, code: int, reason: str) -> None:
        """Tell every node how the run ended."""
        for member in self.members.values():
            member.wire.send({"do": "end", "code": code, "reason": reason})


@contextlib.contextmanager
def crew_of(nodes: Nodes, interrupts: Interrupts, console: Console) -> Iterator[Crew]:
    """The crew, still to meet; told at the end how it went."""
    crew = Crew(nodes, interrupts, console)
    code, reason = int(ExitCode.BUG), "the first node failed unexpectedly: its output says how"
    try:
        yield crew
        code, reason = int(ExitCode.DONE), "done"
    except SpeedrunError as error:
        code, reason = int(error.exit_code), str(error)
        raise
    finally:
        crew.dismiss(code, reason)
