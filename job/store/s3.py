"""The store over S3 (boto3), whatever server stands behind it.

boto3 moves the bytes: its classic transfer manager (the other one ignores the endpoint), parts of 64 MiB, a CRC32 with
each, which the server compares. `_call` stands around that, because boto3 gives up early on some errors and at once on
others (a flipped bit, expired credentials, a conflict of conditional writes): whatever fails is tried again, with fresh
credentials where they were the reason, until `patience` is over. One attempt ends by its timeouts, so no call waits for
ever. What an attempt left undone is found by looking, not by guessing:

    an upload whose acknowledgement was lost        the object is there, and its metadata has our SHA-256
    a claim whose acknowledgement was lost          it is refused the second time, and what is there has our nonce
    a download with wrong bytes                     our SHA-256 differs; twice more, then DataError

Refusals that no waiting heals (credentials, permissions, no such bucket) are UsageError in `prepare`, at the start;
later they are retried like all else: permissions are granted late, tokens renewed, buckets of a restarted server seen
again."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.credentials import RefreshableCredentials
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError

from job.errors import DataError, StorageError, UsageError
from job.retry import backoff
from job.store.s3_faults import ABSENT, DENIED, EXPIRED, NETWORK, cause_of, code_of, reason_of, refusal
from job.store.sealed import sha256_file, storage_errors
from job.store.stores import PARALLEL, PATIENCE, S3_URL, Store, check_key, missing, probe

PART = 64 << 20
"""bytes of a part of a multipart upload"""
PARTS_AT_ONCE = 4
"""parts of one file that are on their way at once"""
START_PATIENCE = 20.0
"""seconds after which `prepare` gives up a server that does not answer"""
READS = 3
"""how often an object is read before its wrong bytes are believed"""

T = TypeVar("T")


class WrongBytes(Exception):
    """What was read is not what was asked for."""


class Clients:
    """boto3's clients, made when first used, and made again from a fresh look at the credentials.

    `small` makes one attempt and leaves the rest to `_call`; `bulk` retries a part by itself.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._region: str | None = None
        self._lock = threading.Lock()
        self._made: dict[str, Any] = {}

    def get(self, kind: str) -> Any:
        with self._lock:
            self._made = self._made or self._make()
            return self._made[kind]

    def renew(self, stale: Any) -> None:
        """Forget the clients, unless another thread has replaced the `stale` one already."""
        with self._lock:
            if stale in self._made.values():
                self._made = {}

    def move_to(self, region: str) -> None:
        """Use clients of the bucket's region: a presigned address names it, and is refused with another."""
        if region != self.get("small").meta.region_name:
            with self._lock:
                self._region, self._made = region, {}

    def _make(self) -> dict[str, Any]:
        common = Config(
            signature_version="s3v4",
            connect_timeout=min(10.0, self._timeout),
            read_timeout=self._timeout,
            max_pool_connections=2 * PARALLEL * PARTS_AT_ONCE,
            tcp_keepalive=True,
            request_checksum_calculation="when_supported",  # whatever the environment says: it is what a flipped bit
            response_checksum_validation="when_supported",  # on the way is noticed by
        )
        small, bulk = (Config(retries={"mode": "standard", "total_max_attempts": n}) for n in (1, 3))
        try:
            session = boto3.session.Session()
            with contextlib.suppress(*NETWORK):  # which the first request meets again, and then knows what to say
                if credentials := session.get_credentials():
                    credentials.get_frozen_credentials()
            return {
                "small": session.client("s3", self._region, config=common.merge(small)),
                "bulk": session.client("s3", self._region, config=common.merge(bulk)),
            }
        except (BotoCoreError, ValueError, OSError) as error:  # OSError: a file of a token, say
            raise UsageError(
                f"the AWS settings cannot be used ({error}); correct the AWS_ variables or files"
            ) from error


class S3Store(Store):
    """`s3://bucket/prefix` at the endpoint and with the credentials of the usual AWS variables and files.

    `timeout`: seconds of silence after which a request is given up; `patience`: seconds for which a call is tried
    again."""

    def __init__(
        self, bucket: str, prefix: str, *, patience: float = PATIENCE, timeout: float = 30.0, part: int = PART
    ) -> None:
        self._bucket, self._prefix, self._part = bucket, prefix, part
        self._patience, self._at_start = patience, False
        self._clients = Clients(timeout)
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    @classmethod
    def at(cls, url: str, **settings: Any) -> S3Store:
        match = S3_URL.fullmatch(url)
        if not match:
            raise UsageError(f"--bucket {url} cannot be used: write s3://bucket/prefix")
        return cls(match[1], (match[2] or "").strip("/"), **settings)

    def get(self, key: str) -> bytes | None:
        return self._call("reading", key, lambda client: self._read(client, key))

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        named = {"Bucket": self._bucket, "Key": self._key(key)}
        self._call("storing", key, lambda client: client.put_object(**named, Body=data, ContentType=content_type))

    def create(self, key: str, data: bytes) -> bool:
        def attempt(client: Any) -> bool:
            try:
                client.put_object(Bucket=self._bucket, Key=self._key(key), Body=data, IfNoneMatch="*")
            except ClientError as error:
                if code_of(error) not in ("PreconditionFailed", "412"):
                    raise
                found = self._read(client, key)
                if found is None:
                    raise
                return found == data
            return True

        return self._call("claiming", key, attempt)

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        size, tries = path.stat().st_size, itertools.count()
        extra = {"Metadata": {"sha256": sha256}}

        def attempt(client: Any) -> None:
            worth_a_look = next(tries) > 0 or size >= self._part
            if not (worth_a_look and self._holds(client, key, size, sha256)):
                client.upload_file(str(path), self._bucket, self._key(key), ExtraArgs=extra, Config=self._transfer())

        self._call("storing", key, attempt, "bulk", safe=str(path))

    def get_file(self, key: str, path: Path, size: int, sha256: str) -> None:
        def attempt(client: Any) -> None:
            try:
                client.download_file(self._bucket, self._key(key), str(path), Config=self._transfer())
            except ClientError as error:
                if code_of(error) in ABSENT:
                    raise missing(self, key) from None
                raise
            if path.stat().st_size != size or sha256_file(path) != sha256:
                raise WrongBytes

        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._call("reading", key, attempt, "bulk")

    def list(self, prefix: str) -> dict[str, int]:
        cut = len(self._prefix) + 1 if self._prefix else 0

        def attempt(client: Any) -> dict[str, int]:
            named = {"Bucket": self._bucket, "Prefix": self._key(prefix) + "/"}
            pages = client.get_paginator("list_objects_v2").paginate(**named)
            return {entry["Key"][cut:]: entry["Size"] for page in pages for entry in page.get("Contents", [])}

        return self._call("listing", prefix, attempt)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._call("deleting", key, methodcaller("delete_object", Bucket=self._bucket, Key=self._key(key)))

    def sweep(self, prefix: str, older_than: float = 0.0) -> int:
        folder = self._key(prefix) + "/"

        def attempt(client: Any) -> int:
            aborted = 0
            try:
                for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=folder):
                    server_time = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
                    for upload in page.get("Uploads", []):
                        key, age = upload["Key"], (server_time - upload["Initiated"]).total_seconds()
                        if key.startswith(folder) and age >= older_than:
                            client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload["UploadId"])
                            aborted += 1
            except ClientError as error:
                if code_of(error) not in DENIED | {"NoSuchUpload", "NotImplemented"}:
                    raise
            return aborted

        return self._call("sweeping", prefix, attempt)

    def prepare(self) -> None:
        first = copy.copy(self)
        first._at_start, first._patience = True, min(START_PATIENCE, self._patience)
        named = {"Bucket": self._bucket, "Prefix": self._prefix, "MaxKeys": 1}
        first._call("listing", "", lambda client: client.list_objects_v2(**named))
        if region := first._call("looking at", "", self._region_of_bucket):
            self._clients.move_to(region)
        probe(first)

    def _region_of_bucket(self, client: Any) -> str:
        """As the store says it; "" where it does not, or may not: what it refuses here, a list has told better."""
        try:
            return client.head_bucket(Bucket=self._bucket).get("BucketRegion", "")
        except ClientError:
            return ""

    def link(self, key: str, seconds: int) -> str | None:
        named = {"Bucket": self._bucket, "Key": self._key(key)}
        return self._clients.get("small").generate_presigned_url("get_object", Params=named, ExpiresIn=seconds)

    def clock_ahead(self) -> float | None:
        def attempt(client: Any) -> float:
            began = time.time()
            answer = client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
            said = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
            return (began + time.time()) / 2 - (said + 0.5)  # whole seconds are said

        return self._call("listing", "", attempt)

    def credentials_left(self) -> float | None:
        """Those of environment variables are never renewed; where they are temporary, AWS_CREDENTIAL_EXPIRATION says
        their end."""
        credentials = boto3.session.Session().get_credentials()
        if credentials is None or not credentials.token:
            return math.inf
        if credentials.method != "env":
            return math.inf if isinstance(credentials, RefreshableCredentials) else None
        try:
            end = datetime.fromisoformat(os.environ["AWS_CREDENTIAL_EXPIRATION"])
        except (KeyError, ValueError):
            return None
        return (end if end.tzinfo else end.replace(tzinfo=UTC)).timestamp() - time.time()

    def _call(self, doing: str, key: str, attempt: Callable[[Any], T], kind: str = "small", safe: str = "") -> T:
        """What `attempt(client)` gives, tried again until it gives it.

        StorageError when patience is over, DataError when it has read wrong bytes for the last time.
        """
        began, wrong, pauses = time.monotonic(), 0, backoff(0.2, 10.0, spread=0.5)
        while True:
            client = self._clients.get(kind)
            try:
                return attempt(client)
            except (*NETWORK, WrongBytes) as error:
                cause = cause_of(error)
            wrong += isinstance(cause, (WrongBytes, FlexibleChecksumError))
            if wrong == READS:
                raise DataError(
                    f"{self.url}/{key} is not the file that was sealed; delete its folder there and run again"
                ) from cause
            endpoint = client.meta.endpoint_url
            if self._at_start and (sentence := refusal(cause, self._bucket, endpoint)):
                raise UsageError(f"--bucket {self.url} cannot be used: {sentence}") from cause
            if code_of(cause) in EXPIRED:
                self._clients.renew(client)
            passed = time.monotonic() - began
            if passed >= self._patience and self._at_start:
                raise StorageError(
                    f"{self.url} does not answer ({reason_of(cause, endpoint)}); check AWS_ENDPOINT_URL and the"
                    " network, and run the same command again"
                ) from cause
            if passed >= self._patience:
                raise StorageError(
                    f"{doing} {key} in {self.url} failed for {passed:.0f} s ({reason_of(cause, endpoint)});"
                    f" {safe or 'everything sealed'} is safe on the local disk: run the same command again"
                ) from cause
            time.sleep(min(next(pauses), self._patience - passed))

    def _read(self, client: Any, key: str) -> bytes | None:
        try:
            return client.get_object(Bucket=self._bucket, Key=self._key(key))["Body"].read()
        except ClientError as error:
            if code_of(error) in ABSENT:
                return None
            raise

    def _holds(self, client: Any, key: str, size: int, sha256: str) -> bool:
        """Whether the object is, by what its uploader noted, this file."""
        try:
            head = client.head_object(Bucket=self._bucket, Key=self._key(key))
        except ClientError as error:
            if code_of(error) in ABSENT:
                return False
            raise
        return head["ContentLength"] == size and head["Metadata"].get("sha256") == sha256

    def _transfer(self) -> TransferConfig:
        return TransferConfig(
            multipart_threshold=self._part,
            multipart_chunksize=self._part,
            max_concurrency=PARTS_AT_ONCE,
            max_io_queue=100,  # of 256 KiB: what a slow disk lets pile up in memory for each file that is read
            preferred_transfer_client="classic",
        )

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{check_key(key)}" if self._prefix else check_key(key)
