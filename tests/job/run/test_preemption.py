"""Clouds that announce that a machine goes away: servers that answer as AWS's and Google's documents say."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar

import pytest

from job.errors import UsageError
from job.machine import cloud
from job.run import preemption
from job.run.preemption import Preemption
from job.run.supervise import Interrupts, stop_seconds


class Metadata(BaseHTTPRequestHandler):
    """Both clouds' services; nothing is told without AWS's token, or without Google's header."""

    takes_it = False
    asked: ClassVar[list[str]] = []

    def _answer(self, code: int, text: str = "") -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self) -> None:
        given = self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200 if self.path == "/latest/api/token" and given else 400, "a-token")

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != "a-token":
                self._answer(401)
            elif self.takes_it:
                self._answer(200, json.dumps({"action": "terminate", "time": "2026-11-26T08:22:00Z"}))
            else:
                self._answer(404)
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self._answer(200, "TRUE" if self.takes_it else "FALSE")
        else:
            self._answer(403)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def metadata() -> Iterator[str]:
    Metadata.takes_it, Metadata.asked = False, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


NOWHERE = "127.0.0.1:9"


@pytest.mark.parametrize(("cloud", "seconds"), [("AWS", 120.0), ("Google", 30.0)])
def test_an_announcement_is_a_signal(
    metadata: str, monkeypatch: pytest.MonkeyPatch, cloud: str, seconds: float
) -> None:
    monkeypatch.setattr(preemption, "POLL", 0.05)
    addresses = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{metadata if cloud == 'AWS' else NOWHERE}"}
    addresses |= {"GCE_METADATA_HOST": metadata if cloud == "Google" else NOWHERE}
    monkeypatch.setenv("http_proxy", f"http://{NOWHERE}")
    wishes = Interrupts()
    with Preemption(wishes, addresses).watched():
        until = time.monotonic() + 10
        while len(Metadata.asked) < 3 and time.monotonic() < until:
            time.sleep(0.02)
        assert wishes.count == 0 and len(Metadata.asked) >= 3
        Metadata.takes_it = True
        while not wishes.count and time.monotonic() < until:
            time.sleep(0.02)
    assert (wishes.count, wishes.seconds) == (1, seconds)
    assert wishes.name == f"{cloud}'s announcement that it takes this machine back"


def test_what_answers_in_another_protocol_is_no_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"SSH-2.0-x\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=answer, args=(server,), daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        said = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{address}", "GCE_METADATA_HOST": address}
        assert cloud.aws("spot/instance-action", said) is None
        assert cloud.google("preempted", said) is None
        server.shutdown(socket.SHUT_RDWR)


def test_where_no_cloud_answers_nobody_is_asked_again(metadata: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "POLL", 0.02)
    wishes = Interrupts()
    watch = Preemption(wishes, {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{NOWHERE}", "GCE_METADATA_HOST": NOWHERE})
    watch._watch()
    assert wishes.count == 0


def test_on_a_machine_that_skypilot_did_not_start_no_cloud_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Preemption, "_watch", lambda self: pytest.fail("asked"))
    with Preemption(Interrupts(), {}).watched():
        pass


def test_the_time_that_a_signal_gives_can_be_said() -> None:
    assert stop_seconds({}) == 120 and stop_seconds({"SPEEDRUN_STOP_SECONDS": "25"}) == 25
    for text in ("0", "-1", "soon"):
        with pytest.raises(UsageError, match=f"SPEEDRUN_STOP_SECONDS={text} cannot be used"):
            stop_seconds({"SPEEDRUN_STOP_SECONDS": text})
