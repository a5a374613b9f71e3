"""What this machine costs: as given, by SkyPilot's variable and the cloud's own answer, or at most."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from job.errors import UsageError
from job.machine import cloud
from job.plan.cap import Limits
from job.plan.prices import price_here
from job.store.attempt import fold
from job.store.bill import billed

SPOT = {"/latest/meta-data/instance-life-cycle": "spot", "/computeMetadata/v1/instance/scheduling/preemptible": "TRUE"}


class Metadata(BaseHTTPRequestHandler):
    """Both clouds' services, as their documents say, of spot machines."""

    def do_PUT(self) -> None:
        self._answer("a-token")

    def do_GET(self) -> None:
        self._answer(SPOT.get(self.path, ""))

    def _answer(self, text: str) -> None:
        self.send_response(200 if text else 404)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def metadata() -> Iterator[dict[str, str]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    yield {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{address}", "GCE_METADATA_HOST": address}
    server.shutdown()


NOWHERE = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:9", "GCE_METADATA_HOST": "127.0.0.1:9"}


def on(name: str, region: str = "r") -> dict[str, str]:
    """As SkyPilot 0.14.1 sets it (sky/backends/cloud_vm_ray_backend.py)."""
    return {cloud.CLUSTER: json.dumps({"cluster_name": "c", "cloud": name, "region": region, "zone": None})}


def test_a_given_price_counts_before_all_others() -> None:
    assert price_here(24.0, 33.0, gpus=8, environment=on("Lambda")).hour == 24.0


@pytest.mark.parametrize(
    ("environment", "gpus", "nodes", "hour"),
    [
        (on("Lambda"), 8, 1, 31.92),
        (on("Lambda"), 8, 2, 63.84),
        (on("Lambda"), 1, 1, 4.29),
        (on("Nebius", "eu-north1"), 8, 1, 23.60),
        (on("AWS", "us-east-2") | NOWHERE, 8, 1, 55.04),
        (on("Lambda"), 4, 1, 33.0),
        (on("Slurm"), 8, 1, 33.0),
        (on("AWS", "eu-west-1") | NOWHERE, 8, 1, 33.0),
        ({}, 8, 1, 33.0),
        ({cloud.CLUSTER: "not json"}, 8, 1, 33.0),
    ],
)
def test_by_what_skypilot_says_else_at_most(environment: dict[str, str], gpus: int, nodes: int, hour: float) -> None:
    assert price_here(None, 33.0, gpus=gpus, nodes=nodes, environment=environment).hour == hour


@pytest.mark.parametrize(("name", "region"), [("AWS", "us-east-2"), ("GCP", "europe-north1")])
def test_a_machine_that_its_cloud_calls_spot_costs_what_the_file_allows(
    name: str, region: str, metadata: dict[str, str]
) -> None:
    assert price_here(None, 33.0, gpus=8, environment=on(name, region) | metadata).hour == 16


def test_nothing_known_is_no_price() -> None:
    assert price_here(None, None, gpus=8, environment={}) is None


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        (Limits(usd=80), "--max-usd needs a price, and nobody says what this machine costs: give --price"),
        (Limits(usd=0, price=3), "--max-usd 0 cannot be used: give a positive number"),
        (Limits(hours=-1), "--max-hours -1 cannot be used: give a positive number"),
        (Limits(usd=float("nan"), price=3), "--max-usd nan cannot be used"),
        (Limits(price=0), "--price 0 cannot be used"),
        (Limits(price_at_most=-3), "--price-at-most -3 cannot be used: .*, e\\.g\\. --price-at-most 24$"),
    ],
)
def test_limits_that_cannot_be_used(limits: Limits, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cloud.CLUSTER, raising=False)
    with pytest.raises(UsageError, match=f"^{sentence}"):
        limits.here(0, 1)


def attempt(run: Path, number: int, start: float, end: float, ended: bool = True, **first: object) -> None:
    (run / "events").mkdir(parents=True, exist_ok=True)
    lines = [{"kind": "attempt.started", "t": start, "rented": True, **first}]
    lines += [{"kind": "attempt.ended", "t": end, "exit_code": 75, "reason": ""} if ended else {"kind": "x", "t": end}]
    text = "".join(json.dumps({**line, "attempt": number, "seq": seq}) + "\n" for seq, line in enumerate(lines))
    (run / "events" / f"{number}.jsonl").write_text(text)


def test_each_attempt_is_billed_from_its_boot_to_its_teardown(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 1000, 1600, boot={"id": "a", "up_s": 500.0}, price={"hour": 36.0})
    attempt(tmp_path, 2, 1700, 2000, boot={"id": "a", "up_s": 1200.0}, price={"hour": 36.0})  # the same machine
    attempt(tmp_path, 3, 9000, 9100, ended=False, boot={"id": "b", "up_s": 90_000.0}, price={"hour": 16.0})
    attempt(tmp_path, 4, 9900, 9950, price={"hour": 16.0})
    attempt(tmp_path, 5, 9990, 9999, rented=False)
    found = [(bill.before, bill.running, bill.after, bill.known) for bill in billed(fold(tmp_path))]
    assert found == [
        (500.0, 600.0, 0.0, True),
        (100.0, 300.0, 120.0, True),
        (720.0, 100.0, 0.0, False),
        (720.0, 50.0, 120.0, False),
        (0.0, 9.0, 0.0, False),
    ]


def test_this_machine_says_since_when_it_is_up(tmp_path: Path) -> None:
    assert cloud.boot()["up_s"] > 0 and len(cloud.boot()["id"]) == 36
    assert cloud.boot(tmp_path) is None
