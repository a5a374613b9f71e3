"""Small corpora of real text, written once a session from what the Python installation carries."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job.data import hub as hubs
from job.data import prepare as preparing
from job.recipe.config import DataConfig
from job.reporter import Reporter


class Recorder(Reporter):
    """Keeps what a stage reports."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict]] = []
        self.shown: list[tuple[str, float, float, str]] = []

    def emit(self, kind, **fields):
        self.events.append((kind, fields))

    def progress(self, stage, done, total, unit):
        self.shown.append((stage, done, total, unit))


def write_jsonl(file: Path, texts) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def prose() -> list[str]:
    """About 400 paragraphs-and-pages of the language reference, none twice."""
    draw = random.Random(7)
    pieces: list[str] = []
    for name in sorted(topics):
        lines = topics[name].splitlines(keepends=True)
        while lines:
            size = draw.choice([3, 8, 20, 60])
            pieces.append("".join(lines[:size]))
            lines = lines[size:]
    distinct = sorted({piece for piece in pieces if len(piece) > 40})
    draw.shuffle(distinct)
    return distinct[:400]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, prose) -> Path:
    """A folder of three jsonl shards."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(3):
        write_jsonl(folder / f"{index}.jsonl", prose[index::3])
    return folder


@pytest.fixture
def one_file_shards(monkeypatch) -> None:
    """Every file a shard of its own, however small."""
    monkeypatch.setattr("job.data.documents.SHARD_BYTES", 1)


def config(*paths: Path, **changes) -> DataConfig:
    values = {"source": "local", "vocab_size": 400, "tokenizer_chars": 200_000, "val_fraction": 0.1, "split_long": True}
    return DataConfig(paths=tuple(map(str, paths)), **(values | changes))


def small_prepare(
    out: Path, data: DataConfig, *, seq_len: int = 32, workers: int = 1, reporter: Reporter | None = None, **options
):
    return preparing.prepare(out, data, seq_len, reporter or Recorder(), workers, **options)


@pytest.fixture(scope="session")
def helpers():
    """The functions above, for tests in other files (test folders are not packages)."""

    class Helpers:
        pass

    for item in (Recorder, write_jsonl, config, small_prepare, of_the_hub, parquet):
        setattr(Helpers, item.__name__, staticmethod(item) if not isinstance(item, type) else item)
    return Helpers


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, corpus):
    """The corpus prepared once, for tests that only read."""
    return small_prepare(tmp_path_factory.mktemp("out"), config(corpus))


# ---- a hub on loopback

REPO = "karpathy/climbmix-400b-shuffle"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HTML = b"<!doctype html><title>Please log in</title>"


def parquet(texts, **options) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer, **options)
    return buffer.getvalue()


class FakeHub:
    """The hub's three answers about a dataset: its commit, its files' sizes and hashes, and their bytes (with ranges).

    `faults[name]` is a list of faults for the next requests of that file: a status, (429, seconds), "truncated",
    "html", "stalled".
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.stated: dict[str, dict] = {}
        self.faults: dict[str, list] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.times: list[float] = []
        self.gate: Callable[[str], None] = lambda name: None
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                hub.answer(self)

            do_POST = do_GET

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def serve(self, name: str, content: bytes, **stated) -> None:
        self.files[name] = content
        self.stated[name] = {
            "size": len(content),
            "oid": hashlib.sha256(content).hexdigest(),
            "pointerSize": 130,
        } | stated

    def fetched(self) -> list[str]:
        """Names of the files that were asked for, in order."""
        return [path.rsplit("/", 1)[1] for _, path, _ in self.requests if "/resolve/" in path]

    def answer(self, request) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path, wanted = request.path, request.headers.get("Range")
        self.requests.append((request.command, path, wanted))
        self.times.append(time.monotonic())
        name = path.rsplit("/", 1)[1]
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        if isinstance(fault, int | tuple):
            status, retry = fault if isinstance(fault, tuple) else (fault, None)
            self.send(request, status, b"no", **({"Retry-After": str(retry)} if retry is not None else {}))
        elif fault == "html":
            self.send(request, 200, HTML, **{"Content-Type": "text/html"})
        elif path == f"/api/datasets/{REPO}/revision/main":
            self.send(request, 200, json.dumps({"sha": COMMIT}).encode())
        elif path == f"/api/datasets/{REPO}/paths-info/{COMMIT}":
            names = [name for name in json.loads(body)["paths"] if name in self.stated]
            answers = [
                {"type": "file", "path": n, "size": self.stated[n]["size"], "lfs": self.stated[n]} for n in names
            ]
            self.send(request, 200, json.dumps(answers).encode())
        elif path == f"/datasets/{REPO}/resolve/{COMMIT}/{name}" and name in self.files:
            self.gate(name)
            self.send_file(request, self.files[name], int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted else 0, fault)
        else:
            self.send(request, 404, b"not here")

    def send(self, request, status: int, body: bytes, **headers: str) -> None:
        request.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(body)

    def send_file(self, request, content: bytes, start: int, fault: str | None) -> None:
        rest = content[start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(rest)))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.end_headers()
        request.wfile.write(rest[: len(rest) // 2] if fault else rest)
        request.wfile.flush()
        if fault == "stalled":
            time.sleep(3)
        request.close_connection = fault is not None


@pytest.fixture
def hub(monkeypatch, prose) -> Iterator[FakeHub]:
    """Six shards of prose, the last for validation, in the place of climbmix; three training documents also occur in
    it."""
    hub = FakeHub()
    for index in range(5):
        hub.serve(f"shard_{index:05d}.parquet", parquet([*prose[index:150:5], None, ""], row_group_size=16))
    hub.serve("shard_00005.parquet", parquet(prose[150:170] + prose[:3]))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    monkeypatch.setattr("job.data.tokenizer.SAMPLE_CHARS", 10_000)
    monkeypatch.setitem(hubs.DATASETS, "climbmix", hubs.Dataset(REPO, 6, sum(map(len, prose[:150])) // 5))
    yield hub
    hub.close()


def of_the_hub(**changes) -> DataConfig:
    return DataConfig(
        **({"source": "climbmix", "vocab_size": 400, "tokenizer_chars": 40_000, "split_long": True} | changes)
    )
