"""Ranks whose messages do not come straight from a pipe: they are put by threads, where `supervise` looks for them."""

from __future__ import annotations

import collections
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from job.errors import ExitCode, SpeedrunError
from job.run.processes import LocalRank, Rank

PUBLISH_SECONDS = 90.0
"""that parts of a checkpoint, written before their rank ended, have to reach the store"""


class RelayedRank(Rank):
    """Messages in a queue, and a pipe that becomes readable when there are some."""

    def __init__(self, name: str, log: str) -> None:
        super().__init__()
        self.name, self.log = name, log
        self.pipe, self._bell = os.pipe()
        for end in (self.pipe, self._bell):
            os.set_blocking(end, False)
        self.failed: int | None = None
        """exit code of what ended it for us, though its process may run"""
        self.over = threading.Event()
        """set when nothing more will be put"""
        self._queue: collections.deque[dict[str, Any]] = collections.deque()
        self._lock = threading.Lock()

    def put(self, message: dict[str, Any]) -> None:
        self._queue.append(message)
        self._ring()

    def fail(self, code: int, text: str) -> None:
        self.error = self.error or (code, text)
        self.failed = code
        self._ring()

    def end(self) -> None:
        self.over.set()
        self._ring()

    def messages(self) -> Iterator[dict[str, Any]]:
        over = self.over.is_set()
        if not over:
            os.read(self.pipe, 1 << 16)
        while self._queue:
            yield self._queue.popleft()
        if over:
            with self._lock:
                self.closed = True
                os.close(self._bell)
            raise EOFError

    def _ring(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError, BrokenPipeError):
            if not self.closed:
                os.write(self._bell, b".")


class PublishingRank(RelayedRank):
    """A rank of this machine whose parts of checkpoints are published before anybody hears of them.

    `publish(part)` runs in a thread of its own, so that nothing else the rank says waits for it.
    """

    def __init__(self, rank: LocalRank, publish: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(rank.name, rank.log)
        self._rank, self._publish = rank, publish
        os.set_blocking(rank.pipe, True)
        threading.Thread(target=self._listen, daemon=True).start()

    def tell(self, message: dict[str, Any]) -> None:
        self._rank.tell(message)

    def poll(self) -> int | None:
        return self.failed or self._rank.poll()

    def ended(self) -> int | None:
        return self.failed or self._rank.ended()

    def kill(self) -> None:
        self._rank.kill()
        self.over.wait(PUBLISH_SECONDS)

    def tail(self) -> str:
        return self._rank.tail()

    def _listen(self) -> None:
        publishing = []
        with contextlib.suppress(EOFError):
            while True:
                for message in self._rank.messages():
                    if "part" in message:
                        publishing.append(threading.Thread(target=self._pass_on, args=(message,), daemon=True))
                        publishing[-1].start()
                    else:
                        self.put(message)
        os.close(self._rank.pipe)
        for thread in publishing:
            thread.join()
        self.end()

    def _pass_on(self, message: dict[str, Any]) -> None:
        try:
            self._publish(message["part"])
        except SpeedrunError as error:
            self.fail(int(error.exit_code), str(error))
        except Exception as error:
            self.fail(int(ExitCode.BUG), f"publishing a part of a checkpoint failed: {error!r}")
            raise
        else:
            self.put(message)
