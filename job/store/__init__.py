"""What is kept: sealed folders, folders and S3 buckets behind one interface, attempts and their fences, checkpoints.

In: files. Out: the same bytes, or an error that says what is wrong. It may not know what the files mean.
"""

from __future__ import annotations

import os
from pathlib import Path

from job.errors import UsageError
from job.store.stores import PATIENCE, FolderStore, Store

VARIABLE = "SPEEDRUN_BUCKET"
"""the environment variable in which a supervisor names the store to its children"""


def open_store(url: str, patience: float = PATIENCE) -> Store:
    """The store at `url`: `s3://bucket/prefix`, or a folder. Nothing is asked of it yet."""
    if url.startswith("s3://"):
        from job.store.s3 import S3Store  # boto3 takes a second to import

        return S3Store.at(url, patience=patience)
    if "://" in url:
        raise UsageError(f"--bucket {url} cannot be used: write s3://bucket/prefix, or a folder")
    return FolderStore(Path(url))


def store_of_environment() -> Store | None:
    """The store that the supervisor named to this process; None where the run has none."""
    url = os.environ.get(VARIABLE)
    return open_store(url) if url else None
