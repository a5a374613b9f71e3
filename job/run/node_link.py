"""Heartbeats, failures and the exit code between the supervisors of a run on several nodes, in a
torch.distributed.TCPStore.

The first node's supervisor hosts the store. Each node has one record in it, which a thread writes and reads others' by,
five times a second: so neither a blocked store nor a silent machine delays the supervisor. A record that stays as it is
for SILENCE seconds is a lost node's; other nodes look at the first one's alone.

    first     {"beat": 17, "id": .., "attempt": 3, "launched": "pretrain", "failed": {..}, "end": [75, "why"]}
    others    {"beat": 17, "id": .., "joined": 3, "shares": true, "ready": "pretrain", "done": "prepare", "failed": ..}

Whoever reaches the port can end the run. What is trained, and from which checkpoint, is read from the bucket or the
shared folder, never from here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from job.console import Console
from job.errors import ExitCode, InterruptedRun, SpeedrunError, UsageError, error_for
from job.run.fruitless import GOES_ON, Death, RankDied
from job.run.nodes import Nodes
from job.run.processes import GRACE
from job.run.supervise import Interrupts

SILENCE = 15.0
"""seconds after which a node that says nothing is lost"""
ANSWER = 60.0
"""seconds that a listening first node has to answer: until then it imports torch, perhaps from a cold disk"""
POLL = 0.2
LAST_WORD = 4 * GRACE
"""seconds that the first node has to end the run after a failure on another"""


class NodeLink:
    """This node's record and those it looks at; on one node there are no others, and nothing is opened."""

    def __init__(self, nodes: Nodes, interrupts: Interrupts, console: Console) -> None:
        self.nodes, self._interrupts, self._console = nodes, interrupts, console
        self.records: dict[int, dict[str, Any]] = {n: {} for n in (range(1, nodes.count) if nodes.is_first else [0])}
        self._record: dict[str, Any] = {"beat": 0, "id": secrets.token_hex(8)}
        self._heard: dict[int, float] = {}
        self._failed: dict[int, float] = {}
        self._written: dict[str, Any] = {}
        self._warnings: list[str] = []
        self._closed = threading.Event()
        self._store: Any = None
        self._thread: threading.Thread | None = None

    @property
    def split(self) -> bool:
        """On the first node: whether others have disks of their own."""
        return not all(record.get("shares") for record in self.records.values())

    # ---- the thread

    def open(self, listener: socket.socket | None = None) -> None:
        """Begin: with `listener` as the store's host, else as its client."""
        self._thread = threading.Thread(target=self._exchange, args=(listener,), daemon=True)
        self._thread.start()

    def _exchange(self, listener: socket.socket | None) -> None:
        try:
            self._store = self._connect(listener)
            if listener:
                for number in range(self.nodes.count):
                    self._store.set(str(number), "{}")
            while not self._closed.is_set():
                self._exchange_once()
                self._closed.wait(POLL)
        except RuntimeError:  # torch's errors: the other side is gone, or does not answer
            self._heard |= dict.fromkeys(self._heard, float("-inf"))
        finally:
            self._store = None

    def _connect(self, listener: socket.socket | None) -> Any:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        from torch.distributed import PrefixStore, TCPStore

        address = "127.0.0.1" if listener else self.nodes.addresses[0]
        hosted = {"is_master": True, "master_listen_fd": listener.detach()} if listener else {"is_master": False}
        timeout = datetime.timedelta(seconds=2 * ANSWER)  # so that `call` is the one that gives up
        store = TCPStore(address, self.nodes.port, wait_for_workers=False, timeout=timeout, **hosted)
        return PrefixStore(self.nodes.secret, store)

    def _exchange_once(self) -> None:
        self._record["beat"] += 1
        record = self._record
        self._store.set(str(self.nodes.number), json.dumps(record))
        self._written = record
        answers = self._store.multi_get([str(number) for number in self.records])
        for number, answer in zip(list(self.records), answers, strict=True):
            with contextlib.suppress(ValueError):
                record, before = dict(json.loads(answer)), self.records[number]
                if before.get("joined") and before["id"] != record.get("id"):
                    self._heard[number] = float("-inf")  # another process of that node, which has no ranks of ours
                elif record != before and self._heard.get(number) != float("-inf"):
                    self.records[number], self._heard[number] = record, time.monotonic()

    # ---- what the supervisor says and asks

    def say(self, **fields: Any) -> None:
        self._record = self._record | fields

    def is_lost(self, number: int) -> bool:
        return number in self._heard and time.monotonic() - self._heard[number] > SILENCE

    def all_others(self, met: Callable[[dict[str, Any]], Any]) -> bool:
        """Whether the record of every node that this one looks at, and that is not lost, meets `met`."""
        return all(met(record) or self.is_lost(number) for number, record in list(self.records.items()))

    def check(self, patience: float = 0.0) -> None:
        """Raise what a lost or failed node means; `patience` seconds later where it may have stopped as it should."""
        for number in self.records:
            if error := self._trouble(number):
                since = self._failed.setdefault(number, time.monotonic())
                stopped = not isinstance(error, RankDied) and error.exit_code in (ExitCode.BUG, ExitCode.RESUME)
                if not stopped or self.is_lost(number) or time.monotonic() - since >= patience:
                    raise error

    def wait(self, until: str, met: Callable[[dict[str, Any]], Any], seconds: float = float("inf")) -> bool:
        """Until all records that this node looks at meet `met`; False when `seconds` pass first."""
        end = time.monotonic() + seconds
        while not self.all_others(met):
            self._interrupts.check(until)
            self.check()
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        self.check()
        return True

    def fail(self, error: BaseException) -> None:
        """Tell the others that this node's part has failed."""
        expected = isinstance(error, SpeedrunError)
        code = int(error.exit_code if isinstance(error, SpeedrunError) else ExitCode.BUG)
        death = dataclasses.asdict(error.death) if isinstance(error, RankDied) else None
        self.say(failed={"code": code, "text": str(error) if expected else repr(error), "death": death})

    def _trouble(self, number: int) -> SpeedrunError | None:
        name = self.nodes.name(number)
        if self.is_lost(number):
            return InterruptedRun(f"{'' if number else 'the first node, '}{name} was lost; {GOES_ON}")
        match self.records[number].get("failed"):
            case {"text": text, "death": dict(death)}:
                return RankDied(text, Death(**death), f"its log on {name}")
            case {"code": code, "text": text}:
                return error_for(code, text if text.startswith("node ") else f"{name}: {text}")
        return None

    def new_warnings(self) -> list[str]:
        """What ranks of other nodes have warned of since the last call."""
        told = [text for record in list(self.records.values()) for text in record.get("warnings", [])]
        new = [text for text in told if text not in self._warnings]
        self._warnings += new
        return new

    def cause(self, error: Exception) -> Exception:
        """On the first node, whose ranks ended without a word: the loss or failure elsewhere that explains it."""
        self.fail(error)
        until = time.monotonic() + SILENCE + GRACE
        while time.monotonic() < until and not self.all_others(lambda record: record.get("failed")):
            time.sleep(POLL)
        causes = filter(None, (self._trouble(number) for number in self.records))
        return next((cause for cause in causes if cause.exit_code != ExitCode.BUG), error)

    def last_word(self) -> SpeedrunError | None:
        """On another node that fails: how the first one ends the run; None where that is not to be learnt."""
        until, signals = time.monotonic() + LAST_WORD, self._interrupts.count
        while self._heard and time.monotonic() < until and self._interrupts.count <= max(1, signals):
            if self.is_lost(0):
                return self._trouble(0)
            if end := self.records[0].get("end"):
                return error_for(*end) if end[0] else None
            time.sleep(0.02)
        return None

    # ---- the beginning and the end

    def meet(self) -> None:
        """On the first node: until all others have joined. InterruptedRun when one is late, or a signal comes."""
        if self.nodes.count == 1:
            return
        until = time.monotonic() + self.nodes.wait
        self.open(self._listen(until))
        self._console.say(f"waiting for {len(self.records)} more of {self.nodes.count} nodes on port {self.nodes.port}")
        if not self.wait("all nodes were there", lambda record: record.get("joined"), until - time.monotonic()):
            missing = [self.nodes.name(n) for n, record in self.records.items() if not record.get("joined")]
            raise InterruptedRun(
                f"{', '.join(missing)} did not call within {self.nodes.wait:.0f} s; the same command on all nodes tries"
                " again"
            )
        if len({record.get("shares") for record in self.records.values()}) > 1:
            raise UsageError(
                "some nodes write to the first node's --out and some do not; give all the same kind of folder"
            )

    def _listen(self, until: float) -> socket.socket:
        while True:
            try:
                return socket.create_server(("", self.nodes.port), backlog=64)
            except OSError as error:
                self._interrupts.check("all nodes were there")
                if time.monotonic() > until:
                    raise UsageError(
                        f"port {self.nodes.port} cannot be listened on ({error.strerror}); set SPEEDRUN_NODES_PORT to"
                        " a free one on all nodes"
                    ) from error
                time.sleep(0.2)

    def call(self) -> None:
        """On another node: until the first one answers. UsageError when something else does."""
        until, first = time.monotonic() + self.nodes.wait, self.nodes.name(0)
        self._console.say(
            f"this is {self.nodes.name(self.nodes.number)} of {self.nodes.count} nodes; calling {first} on port"
            f" {self.nodes.port}"
        )
        while time.monotonic() < until:
            self._interrupts.check("the first node answered")
            with contextlib.suppress(OSError):
                socket.create_connection((self.nodes.addresses[0], self.nodes.port), 1.0).close()
                self.open()
                if not self.wait("the first node answered", self._answered, ANSWER):
                    raise UsageError(
                        f"{first} runs something else on port {self.nodes.port} (its secret is another one): give all"
                        " nodes the same command and SKYPILOT_TASK_ID, or set SPEEDRUN_NODES_PORT to a free port on all"
                    )
                if self.records[0]:
                    return
            time.sleep(0.2)
        raise InterruptedRun(
            f"{first} did not answer on port {self.nodes.port} within {self.nodes.wait:.0f} s; the same command on all"
            " nodes tries again"
        )

    def _answered(self, record: dict[str, Any]) -> bool:
        return bool(record) or self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        """When the others have read this node's record, or are lost."""
        until = time.monotonic() + SILENCE
        while self._thread and self._thread.is_alive() and time.monotonic() < until:
            if self._written is self._record and (not self.nodes.is_first or self.all_others(_is_over)):
                break
            time.sleep(0.02)
        self._closed.set()
        if self._thread:  # what it holds of torch must not outlive the interpreter
            self._thread.join(2.0)


def _is_over(record: dict[str, Any]) -> bool:
    return not record or bool(record.get("over"))


@contextlib.contextmanager
def first_link(nodes: Nodes, interrupts: Interrupts, console: Console, attempt: int) -> Iterator[NodeLink]:
    """The first node's link, still to meet; at the end the others are told how the run ended."""
    link = NodeLink(nodes, interrupts, console)
    link.say(attempt=attempt)
    code, reason = int(ExitCode.BUG), "the first node failed unexpectedly: its output says how"
    try:
        yield link
        code, reason = int(ExitCode.DONE), "done"
    except SpeedrunError as error:
        code, reason = int(error.exit_code), str(error)
        raise
    finally:
        link.say(end=[code, reason])
        link.close()


@contextlib.contextmanager
def other_link(nodes: Nodes, interrupts: Interrupts, console: Console) -> Iterator[NodeLink]:
    """Another node's link, still to call; what fails here ends as the first node says, if it does."""
    link = NodeLink(nodes, interrupts, console)
    try:
        yield link
    except Exception as error:
        link.fail(error)
        if said := link.last_word():
            raise said from None
        raise
    finally:
        link.say(over=True)
        link.close()
