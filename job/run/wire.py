"""The connection between the supervisors of two nodes: JSON objects, in order, between two who know the same secret.

Python's own `multiprocessing.connection` makes the frames and the challenge (an HMAC both ways; the secret itself never travels). Only
bytes are sent, never pickles: who is on the other side can say things, not run them. A machine that vanishes without a word is noticed
by the kernel's keepalive, within about half a minute.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

HANDSHAKE_SECONDS = 10
"""that a caller has to prove that it knows the secret"""
IDLE, EVERY, TIMES = 10, 5, 3
"""the kernel asks after IDLE silent seconds, EVERY seconds, and gives up after TIMES unanswered"""


class Wire:
    """One end. Sending never fails: a lost connection is what `receive` says."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    @classmethod
    def answer(cls, called: socket.socket, secret: bytes) -> Wire:
        """The first node's end of an accepted socket. Raises AuthenticationError for a stranger, OSError or EOFError for a silent one."""
        return cls._prove(called, secret, (deliver_challenge, answer_challenge))

    @classmethod
    def call(cls, address: str, port: int, secret: bytes) -> Wire:
        """Another node's end. Raises OSError or EOFError while nobody answers there, AuthenticationError when strangers do."""
        return cls._prove(
            socket.create_connection((address, port), HANDSHAKE_SECONDS), secret, (answer_challenge, deliver_challenge)
        )

    @classmethod
    def _prove(cls, raw: socket.socket, secret: bytes, steps: tuple) -> Wire:
        _keep_alive(raw)
        raw.setblocking(True)
        patience = struct.pack("ll", HANDSHAKE_SECONDS, 0)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        copy = raw.dup()
        connection = Connection(raw.detach())
        try:
            for step in steps:
                step(connection, secret)
            copy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
        except BaseException:
            connection.close()
            raise
        finally:
            copy.close()
        return cls(connection)

    def fileno(self) -> int:
        return self._connection.fileno()

    def waiting(self) -> bool:
        """Whether `receive` would return, or raise, at once."""
        try:
            return self._connection.poll()
        except OSError:
            return True

    def send(self, message: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._connection.send_bytes(json.dumps(message).encode())

    def receive(self) -> dict[str, Any]:
        """The next message; EOFError when the other side is gone."""
        try:
            return json.loads(self._connection.recv_bytes())
        except OSError as error:
            raise EOFError from error

    def close(self) -> None:
        """Wake up whoever waits in `receive`, on both sides."""
        with contextlib.suppress(OSError):
            end = socket.socket(fileno=self._connection.fileno())
            try:
                end.shutdown(socket.SHUT_RDWR)
            finally:
                end.detach()


def _keep_alive(raw: socket.socket) -> None:
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (
        ("TCP_KEEPIDLE", IDLE),
        ("TCP_KEEPINTVL", EVERY),
        ("TCP_KEEPCNT", TIMES),
        ("TCP_USER_TIMEOUT", 1000 * (IDLE + EVERY * TIMES)),
    ):
        if hasattr(socket, name):
            raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
