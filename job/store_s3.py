"""The store over S3 (boto3), whatever server stands behind it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError

from job.errors import DataError, UsageError
from job.sealed import sha256_file
from job.store import Store, check_key, missing

URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?")
PART = 64 << 20
"""bytes of a part of a multipart upload"""


class S3Store(Store):
    """`s3://bucket/prefix` at the endpoint and with the credentials of the usual AWS variables and files."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self._client, self._bucket, self._prefix = client, bucket, prefix
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._transfer = TransferConfig(
            multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=4, preferred_transfer_client="classic"
        )

    @classmethod
    def at(cls, url: str) -> S3Store:
        match = URL.fullmatch(url)
        if not match:
            raise UsageError(f"--bucket {url} cannot be used: write s3://bucket/prefix")
        config = Config(retries={"mode": "standard", "max_attempts": 5}, connect_timeout=10, read_timeout=30)
        return cls(boto3.session.Session().client("s3", config=config), match[1], (match[2] or "").strip("/"))

    def get(self, key: str) -> bytes | None:
        try:
            return self._client.get_object(Bucket=self._bucket, Key=self._key(key))["Body"].read()
        except ClientError as error:
            if code_of(error) in ("NoSuchKey", "404"):
                return None
            raise

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        self._client.put_object(Bucket=self._bucket, Key=self._key(key), Body=data, ContentType=content_type)

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._client.put_object(Bucket=self._bucket, Key=self._key(key), Body=data, IfNoneMatch="*")
        except ClientError as error:
            if code_of(error) not in ("PreconditionFailed", "412"):
                raise
            return self.get(key) == data
        return True

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        self._client.upload_file(str(path), self._bucket, self._key(key), Config=self._transfer)

    def get_file(self, key: str, path: Path, size: int, sha256: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._client.download_file(self._bucket, self._key(key), str(path), Config=self._transfer)
        except ClientError as error:
            if code_of(error) in ("NoSuchKey", "404"):
                raise missing(self, key) from None
            raise
        if os.stat(path).st_size != size or sha256_file(path) != sha256:
            raise DataError(f"{self.url}/{key} is not the file that was sealed; delete its folder there and run again")

    def list(self, prefix: str) -> dict[str, int]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._key(prefix) + "/")
        cut = len(self._prefix) + 1 if self._prefix else 0
        return {entry["Key"][cut:]: entry["Size"] for page in pages for entry in page.get("Contents", [])}

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._client.delete_object(Bucket=self._bucket, Key=self._key(key))

    def prepare(self) -> None:
        self._client.head_bucket(Bucket=self._bucket)

    def link(self, key: str, seconds: int) -> str | None:
        return self._client.generate_presigned_url(
            "get_object", Params={"Bucket": self._bucket, "Key": self._key(key)}, ExpiresIn=seconds
        )

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{check_key(key)}" if self._prefix else check_key(key)


def code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
