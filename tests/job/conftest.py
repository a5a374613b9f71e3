"""A small wandb server, for the real client to talk to."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_POST(self) -> None:
        server, body = self.server.wandb, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if server.hangs:
            server.stopped.wait()
            return
        self._answer(server.take(self.path, body))

    do_GET = do_PUT = do_POST

    def _answer(self, document: object) -> None:
        data = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)


class Http(ThreadingHTTPServer):
    daemon_threads = True
    wandb: WandbServer

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no news."""


class WandbServer:
    """As much of wandb's server as a run asks for: it keeps history lines by offset, and says at a resume how many it
    has."""

    def __init__(self) -> None:
        self.hangs = self.answers_nonsense = False
        self.lines: dict[str, list[dict]] = {}
        self.summaries: dict[str, dict] = {}
        self.runs: dict[str, dict] = {}
        self.alerts: list[dict] = []
        self.stopped = threading.Event()
        self._http = Http(("127.0.0.1", 0), Handler)
        self._http.wandb = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()

    def take(self, path: str, body: bytes) -> object:
        if self.answers_nonsense:
            return {"data": {}}
        if path.endswith("/file_stream"):
            return self._stream(path.split("/")[-2], json.loads(body))
        if path != "/graphql":
            return {}
        asked = json.loads(body)
        match asked["operationName"]:
            case "Viewer":
                return {
                    "data": {
                        "viewer": {"id": "u", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}}
                    }
                }
            case "RunResumeStatus":
                return {"data": {"model": self._resume(asked["variables"]["name"])}}
            case "NotifyScriptableRunAlert":
                self.alerts.append(asked["variables"])
            case "UpsertBucket":
                return {"data": {"upsertBucket": self._upsert(asked["variables"])}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in asked["variables"]["files"]]
                return {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def _resume(self, name: str) -> dict:
        bucket = None
        if name in self.runs:
            lines = self.lines.get(name, [])
            counts = {"logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(lines)}
            tails = {"historyTail": json.dumps([json.dumps(line) for line in lines[-1:]]), "eventsTail": "[]"}
            bucket = {
                "id": name,
                "name": name,
                "displayName": name,
                "summaryMetrics": json.dumps(self.summaries.get(name, {})),
                "config": self.runs[name].get("config") or "{}",
                "tags": [],
                "notes": None,
                "wandbConfig": json.dumps({"t": 1}),
            }
            bucket |= counts | tails
        return {"id": "p", "name": "p", "entity": {"id": "e", "name": "us"}, "bucket": bucket}

    def _upsert(self, asked: dict) -> dict:
        name = asked["name"] or asked["id"]
        inserted = name not in self.runs
        self.runs.setdefault(name, {}).update({key: value for key, value in asked.items() if value is not None})
        project = {"id": "p", "name": asked["project"] or "p", "entity": {"id": "e", "name": "us"}}
        bucket = {"id": name, "name": name, "displayName": asked["displayName"], "project": project, "config": "{}"}
        return {"bucket": bucket | {"historyLineCount": len(self.lines.get(name, []))}, "inserted": inserted}

    def _stream(self, name: str, sent: dict) -> dict:
        for file, part in (sent.get("files") or {}).items():
            if file == "wandb-history.jsonl":
                lines = self.lines.setdefault(name, [])
                lines[part["offset"] :] = [json.loads(line) for line in part["content"]]
            elif file == "wandb-summary.json":
                self.summaries[name] = json.loads(part["content"][-1])
        return {}

    @property
    def steps(self) -> list[int]:
        """The steps of the only run that was sent, in the order of their lines."""
        ((_, lines),) = self.lines.items()
        return [line["_step"] for line in lines]


@pytest.fixture
def wandb_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server of our own, named to wandb by the environment, which has nothing else of wandb's."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "0.5")
    yield server
    server.stop()
