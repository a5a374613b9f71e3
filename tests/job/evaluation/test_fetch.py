from __future__ import annotations

import base64
import errno
import hashlib
import http.client
import http.server
import io
import ssl
import threading
import zipfile
from pathlib import Path

import pytest

from job.addresses import WHOLE, keep_whole
from job.errors import DataError, SpeedrunError
from job.evaluation import bundle as bundles
from job.evaluation import fetch
from job.evaluation.bundle import open_bundle
from job.reporter import Reporter


class Recorder(Reporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.shown: list[tuple] = []

    def emit(self, kind, **fields):
        assert kind == "warning"
        self.warnings.append(fields["text"])

    def progress(self, *shown):
        self.shown.append(shown)


class Server(http.server.ThreadingHTTPServer):
    """Gives `body`; `faults` are played first, one per request: "drop" half-way, "silent", or an HTTP status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.body, self.faults, self.requests, self.authorization = b"", [], 0, None

    def address(self, name: str = "eval_bundle.zip") -> str:
        return f"http://127.0.0.1:{self.server_port}/some/{name}?version=1"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.server.requests += 1
        self.server.authorization = self.headers["Authorization"]
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            self.send_error(fault)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        if fault == "silent":
            self.server.silence.wait(20)
        self.wfile.write(self.server.body[: len(self.server.body) // 2] if fault == "drop" else self.server.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("job.retry.time.sleep", lambda seconds: None)
    server = Server()
    server.silence = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.silence.set()
    server.shutdown()
    server.server_close()


def zipped(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, f"eval_bundle/{file.relative_to(folder)}")
    return buffer.getvalue()


@pytest.fixture
def small(make_bundle, server, monkeypatch):
    """A small bundle that the server gives and that passes for CORE."""
    folder = make_bundle()
    monkeypatch.setattr(bundles, "CORE_SHA256", dict(open_bundle(folder).files))
    server.body = zipped(folder)
    return folder


def test_it_is_fetched_once_checked_file_by_file_and_kept(small, server, tmp_path):
    seen = Recorder()
    found = fetch.open_core(server.address(), tmp_path / "bundles", seen)
    assert found.id == open_bundle(small).id and found.is_core
    assert found.path.read_bytes() == server.body and found.path.name == "eval_bundle.zip"
    assert seen.shown[-1] == ("fetch", len(server.body), len(server.body), "bytes")
    again = fetch.open_core(server.address(), tmp_path / "bundles", Recorder())
    assert again.path == found.path and server.requests == 1
    assert [p.name for p in found.path.parent.iterdir()] == ["eval_bundle.zip"]


def test_an_unknown_archive_of_cores_files_is_a_warning(small, server, tmp_path, monkeypatch):
    seen = Recorder()
    fetch.open_core(server.address(), tmp_path / "one", seen)
    assert len(seen.warnings) == 1 and hashlib.sha256(server.body).hexdigest() in seen.warnings[0]
    monkeypatch.setattr(fetch, "ZIP_SHA256", hashlib.sha256(server.body).hexdigest())
    seen = Recorder()
    fetch.open_core(server.address(), tmp_path / "two", seen)
    fetch.open_core(server.address("own.zip"), tmp_path / "two", seen)
    assert seen.warnings == []


@pytest.mark.parametrize("faults", [["drop"], [503, 429, "drop"], ["silent"]], ids=str)
def test_a_passing_fault_costs_another_attempt(small, server, tmp_path, faults, monkeypatch):
    monkeypatch.setattr(fetch, "SILENCE_SECONDS", 0.3)
    server.faults = list(faults)
    assert fetch.open_core(server.address(), tmp_path / "cache", Recorder()).is_core
    assert server.requests == len(faults) + 1


@pytest.mark.parametrize(
    ("faults", "requests"), [([404] * 9, 1), ([500] * 9, fetch.ATTEMPTS), (["drop"] * 9, fetch.ATTEMPTS)], ids=str
)
def test_what_cannot_be_had_is_an_error_that_says_why(small, server, tmp_path, faults, requests):
    server.faults = list(faults)
    with pytest.raises(
        DataError, match=r"cannot be fetched from http://127\.0\.0\.1.*(HTTP 404|HTTP 500|ended after \d+ of \d+ bytes)"
    ):
        fetch.open_core(server.address(), tmp_path / "cache", Recorder())
    assert server.requests == requests
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    "error", [ssl.SSLError(1, "[SSL] bad record mac"), OSError(errno.EHOSTUNREACH, "No route to host")], ids=repr
)
def test_what_tls_and_the_network_say_in_an_answer_is_no_fault_of_the_disk(small, server, tmp_path, monkeypatch, error):
    """The error of TLS has number 1, that of a disk that may not be written."""
    faults = [error]
    read = http.client.HTTPResponse.read

    def failing(answer, *size):
        if faults:
            raise faults.pop()
        return read(answer, *size)

    monkeypatch.setattr(http.client.HTTPResponse, "read", failing)
    assert fetch.open_core(server.address(), tmp_path / "cache", Recorder()).is_core
    assert server.requests == 2


def test_user_and_password_before_the_host_are_sent_and_said_nowhere(small, server, tmp_path, monkeypatch):
    monkeypatch.setenv(WHOLE, "")
    recorded = keep_whole(server.address().replace("//", "//me:HIDDEN@"))
    assert fetch.open_core(recorded, tmp_path / "cache", Recorder()).is_core
    assert server.authorization == f"Basic {base64.b64encode(b'me:HIDDEN').decode()}"
    with pytest.raises(DataError) as refused:
        fetch.open_core(keep_whole("http://me:HIDDEN@a..b/eval_bundle.zip?s=HIDDEN"), tmp_path / "cache", Recorder())
    assert "HIDDEN" not in str(refused.value)


@pytest.mark.parametrize(
    ("address", "code", "said"),
    [
        (
            "http://127.0.0.1:1/b\u00fcndel.zip",
            11,
            "cannot be fetched from .* \\(it is no address: it has characters that have",
        ),
        ("http://a..b/eval_bundle.zip", 11, "cannot be fetched from .* \\(it is no address: .*label empty"),
        ("http://127.0.0.1:x/eval_bundle.zip", 11, "it is no address: it has no host, or a port that is no number"),
        ("http://[::1/eval_bundle.zip", 2, "--core-bundle http://.* is no address \\(Invalid IPv6 URL\\)"),
    ],
)
def test_what_is_no_address_is_one_sentence(tmp_path, address, code, said):
    with pytest.raises(SpeedrunError, match=said) as refused:
        fetch.open_core(address, tmp_path / "cache", Recorder())
    assert refused.value.exit_code == code


def test_a_page_or_another_bundle_instead_of_core_is_refused_and_not_kept(small, server, tmp_path, make_bundle):
    server.body = b"<html>sign in</html>"
    with pytest.raises(DataError, match=r"is not the CORE bundle: .* neither a folder nor a readable \.zip"):
        fetch.open_core(server.address(), tmp_path / "cache", Recorder())
    server.body = zipped(make_bundle(next='{"context": "other", "continuation": "text"}\n'))
    with pytest.raises(
        DataError, match=r"another version than the published CORE bundle \(eval_data/next\.jsonl differs\)"
    ):
        fetch.open_core(server.address(), tmp_path / "cache", Recorder())
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_path_is_opened_where_it_is(small, tmp_path):
    assert fetch.open_core(str(small), tmp_path / "cache", Recorder()).is_core
    assert not (tmp_path / "cache").exists()
