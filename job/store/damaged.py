"""Sealed folders that are not what their manifests say any more: moved aside with a warning, so that what can be made
or pulled again is, and a job that nobody watches goes on.

    rows/00002   ->   rows/.00002.damaged-<time>      hidden: neither sealed nor mirrored; delete it after a look
"""

from __future__ import annotations

import contextlib
import platform
import time
from pathlib import Path

from job.errors import DataError
from job.reporter import Reporter
from job.store.sealed import (
    MANIFEST,
    Sealed,
    atomic_write,
    is_sealed,
    open_sealed,
    read_manifest,
    sha256_file,
    storage_errors,
)


def usable(folder: Path, *, kind: str, reporter: Reporter) -> Sealed | None:
    """The sealed `folder`, every byte verified; None where there is none, or none any more."""
    if not is_sealed(folder):
        return None
    try:
        return open_sealed(folder, kind=kind)
    except DataError as error:
        aside = folder.with_name(f".{folder.name}.damaged-{time.time_ns()}")
        with storage_errors(folder):
            folder.rename(aside)
        reporter.emit("warning", text=f"{error.args[0]}; it is made again, and what was there is in {aside}")
        return None


def verify_once(root: Path, reporter: Reporter) -> None:
    """Verify every sealed folder below `root` that this machine has not verified yet; what is damaged is moved aside.

    Which were is noted in a file of this machine's beside `root`, by the hash of each manifest.
    """
    noted = root.with_name(f"{root.name}.verified-{platform.node()}")
    before = set(noted.read_text().splitlines()) if noted.is_file() else set()
    now = set()
    for manifest in sorted(root.rglob(MANIFEST)):
        folder = manifest.parent
        name = folder.relative_to(root)
        if any(part.startswith(".") for part in name.parts):
            continue
        line = f"{sha256_file(manifest)} {name}"
        if line not in before:
            kind = ""
            with contextlib.suppress(DataError):
                kind = read_manifest(manifest.read_bytes(), manifest, "")["kind"]
            if not usable(folder, kind=kind, reporter=reporter):
                continue
        now.add(line)
    if now != before:
        atomic_write(noted, "".join(f"{line}\n" for line in sorted(now)).encode())
