"""An HTTP proxy between a client and an S3 server that does to chosen requests what networks and servers do.

with Faults(s3) as faults:
    faults.on("UploadPart", lost, times=1)      the server does it, the client never hears of it
    open_store(faults.s3.url)                   with faults.s3.environment()
    faults.seen                                 the requests by S3's names, in order
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import re
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>a fault of the test</Message></Error>'


@dataclasses.dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


Fault = Callable[["Exchange"], None]
"""Takes over one request: reads what it likes of it, passes it on or not, answers or not."""


class Faults:
    """The proxy, before `s3`'s server, with the faults that are set; `s3` is the same place behind it."""

    def __init__(self, s3: Any) -> None:
        self.target = urlsplit(s3.endpoint)
        self.seen: list[str] = []
        self.over = threading.Event()
        self._rules: list[list[Any]] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundExchange", (Exchange,), {"faults": self}))
        self._server.daemon_threads = True
        self.s3 = dataclasses.replace(s3, endpoint=f"http://127.0.0.1:{self._server.server_port}")

    def __enter__(self) -> Faults:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()

    def on(self, operation: str, fault: Fault, times: float = 1, skip: int = 0) -> None:
        """Do `fault` to the next `times` requests whose name matches the pattern, after `skip` that pass."""
        self._rules.append([re.compile(operation), fault, times, skip])

    def left(self) -> float:
        """How often the faults that are set will yet happen."""
        return sum(rule[2] for rule in self._rules)

    def clear(self) -> None:
        """No more faults, also of requests that are being stalled."""
        self._rules.clear()
        self.over.set()

    def fault_for(self, operation: str) -> Fault | None:
        with self._lock:
            self.seen.append(operation)
            for rule in self._rules:
                if rule[0].fullmatch(operation) and rule[2] > 0:
                    if rule[3] > 0:
                        rule[3] -= 1
                        return None
                    rule[2] -= 1
                    return rule[1]
        return None


class Exchange(BaseHTTPRequestHandler):
    """One connection of a client; `handle_request` runs for each request on it."""

    protocol_version = "HTTP/1.1"
    faults: Faults

    def handle_request(self) -> None:
        self.length = int(self.headers.get("Content-Length", 0))
        with contextlib.suppress(ConnectionError):
            if fault := self.faults.fault_for(self.operation()):
                fault(self)
            else:
                self.answer(self.forward(self.read()))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request

    def operation(self) -> str:
        """S3's name of what is asked."""
        url = urlsplit(self.path)
        query, of_object = parse_qs(url.query, keep_blank_values=True), url.path.strip("/").count("/") > 0
        if self.command == "PUT":
            conditional = "PutObjectIfNone" if "If-None-Match" in self.headers else "PutObject"
            return "UploadPart" if "partNumber" in query else conditional
        if self.command == "POST":
            return "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload"
        if self.command == "DELETE":
            return "AbortMultipartUpload" if "uploadId" in query else "DeleteObject"
        if self.command == "HEAD":
            return "HeadObject" if of_object else "HeadBucket"
        return "GetObject" if of_object else "ListMultipartUploads" if "uploads" in query else "ListObjects"

    def read(self, size: int | None = None) -> bytes:
        return self.rfile.read(self.length if size is None else size)

    def forward(self, body: bytes) -> Answer:
        """What the server says to this request with `body`."""
        connection = http.client.HTTPConnection(self.faults.target.hostname, self.faults.target.port)
        with contextlib.closing(connection):
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        connection.putheader(name, value)
                connection.endheaders(body)
                response = connection.getresponse()
                return Answer(response.status, response.getheaders(), response.read())
            except (OSError, http.client.HTTPException) as error:
                self.hang_up()
                raise ConnectionAbortedError from error

    def answer(self, answer: Answer, part: float = 1.0) -> None:
        """Answer, or begin to: `part` of the body is sent."""
        self.send_response_only(answer.status)
        lengths = ("content-length", "transfer-encoding")
        stated = (
            dict(answer.headers).get("Content-Length", len(answer.body)) if self.command == "HEAD" else len(answer.body)
        )
        for name, value in [
            *((n, v) for n, v in answer.headers if n.lower() not in lengths),
            ("Content-Length", str(stated)),
        ]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body[: int(len(answer.body) * part)])
        self.wfile.flush()

    def hang_up(self) -> None:
        """Reset the connection."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


def error(status: int, code: str) -> Fault:
    """The server refuses."""

    def fault(exchange: Exchange) -> None:
        exchange.read()
        exchange.answer(Answer(status, [("Content-Type", "application/xml")], ERROR.format(code).encode()))

    return fault


def in_region(name: str) -> Fault:
    """The bucket is in that region, as Amazon says it of its own."""

    def fault(exchange: Exchange) -> None:
        exchange.answer(Answer(200, [("x-amz-bucket-region", name)], b""))

    return fault


def reset(exchange: Exchange) -> None:
    """The connection is reset in the middle of the body."""
    exchange.read(exchange.length // 2)
    exchange.hang_up()


def stall(exchange: Exchange) -> None:
    """Half of the body is taken, or half of the answer given, and then nothing more."""
    if exchange.length:
        exchange.read(exchange.length // 2)
    else:
        exchange.answer(exchange.forward(b""), part=0.5)
    black_hole(exchange)


def black_hole(exchange: Exchange) -> None:
    """Nothing is ever answered."""
    exchange.faults.over.wait()
    exchange.close_connection = True


def lost(exchange: Exchange) -> None:
    """The server does it, and the answer does not arrive."""
    exchange.forward(exchange.read())
    exchange.hang_up()


def flipped(data: bytes) -> bytes:
    """`data` with a bit in its middle changed."""
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 1 for byte in data[middle : middle + 1]) + data[middle + 1 :]


def flip_up(exchange: Exchange) -> None:
    """A bit of the body arrives as another one."""
    exchange.answer(exchange.forward(flipped(exchange.read())))


def flip_down(exchange: Exchange) -> None:
    """A bit of the answer arrives as another one."""
    answer = exchange.forward(exchange.read())
    exchange.answer(dataclasses.replace(answer, body=flipped(answer.body)))


def truncate(exchange: Exchange) -> None:
    """The connection is closed in the middle of the answer."""
    exchange.answer(exchange.forward(exchange.read()), part=0.5)
    exchange.close_connection = True


def expired(user: str) -> Fault:
    """The credentials of `user` have expired; others have not."""

    def fault(exchange: Exchange) -> None:
        if user in exchange.headers.get("Authorization", ""):
            error(400, "ExpiredToken")(exchange)
        else:
            exchange.answer(exchange.forward(exchange.read()))

    return fault
