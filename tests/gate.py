"""A gate between a client and a TCP server: open it forwards; shut it is a black hole, which keeps every connection
and answers nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Gate:
    """Listens on a free port of the loopback; `shut` is set by whoever likes, and before the first bytes to the
    server that hold `shut_on`."""

    def __init__(self, server_port: int, shut_on: bytes | None = None) -> None:
        self.shut = threading.Event()
        self._server_port, self._shut_on = server_port, shut_on
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                threading.Thread(target=self._forward, args=(client, server, self._shut_on), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client, None), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, shut_on: bytes | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if shut_on and shut_on in data:
                    self.shut.set()
                while self.shut.is_set():
                    time.sleep(0.05)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
