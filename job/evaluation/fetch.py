"""The bundle that a recipe names: a folder or archive on disk, or an address it is published at.

A fetched archive is kept below --out and used again. Each of its files is checked (`core_v1.py`); the SHA-256 of the
whole zip was never verified, so another one is a warning.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from job.addresses import request, whole_address
from job.data.prepare import Prepared
from job.errors import DataError, UsageError
from job.evaluation.bundle import Bundle, check_size, open_bundle
from job.evaluation.core_v1 import PUBLISHED_URL, ZIP_SHA256
from job.recipe.config import Recipe
from job.reporter import Reporter
from job.retry import attempts
from job.store.sealed import sha256_file, storage_errors

ATTEMPTS = 4
SILENCE_SECONDS = 30.0
CHUNK = 1 << 18
SMOKE_BUNDLE = "smoke_bundle"


def eval_bundle(out: Path, recipe: Recipe, prepared: Prepared, reporter: Reporter) -> Bundle:
    """CORE where the recipe's eval.core_bundle says it is (an address is fetched once), or else the smoke bundle."""
    if recipe.eval.core_bundle:
        return open_core(recipe.eval.core_bundle, out / "bundles", reporter)
    return open_bundle(prepared.path / SMOKE_BUNDLE)


def open_core(where: str, cache: Path, reporter: Reporter) -> Bundle:
    """CORE itself, from the folder, archive or http(s) address `where`; a fetched archive is kept in `cache`.

    Raises DataError when it cannot be had, is damaged, or is another bundle than CORE.
    """
    if not where.startswith(("http://", "https://")):
        return open_bundle(where, only_core=True)
    file = kept_archive(where, cache)
    if file.is_file():
        return open_bundle(file, only_core=True)
    name = file.name
    part = file.with_name(f".{name}.part-{os.getpid()}")
    with storage_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            _download(where, whole_address(where), part, reporter)
            try:
                open_bundle(part, only_core=True)
            except DataError as error:
                raise DataError(f"what {where} gave is not the CORE bundle: {error}") from error
            if name == PurePosixPath(PUBLISHED_URL).name and (found := sha256_file(part)) != ZIP_SHA256:
                changed = f"{where} is not the archive seen before (SHA-256 {found})"
                reporter.emit("warning", text=f"{changed}; every file in it is CORE's, so it is used")
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
    return open_bundle(file, only_core=True)


def kept_archive(where: str, cache: Path) -> Path:
    """Where in `cache` the archive of the address `where` is kept once it is fetched; UsageError where it is none."""
    try:
        name = PurePosixPath(urlsplit(where).path).name or "bundle"
    except ValueError as error:
        raise UsageError(f"--core-bundle {where} is no address ({error}); check its spelling") from None
    return cache / hashlib.sha256(where.encode()).hexdigest()[:16] / name


def _download(where: str, url: str, part: Path, reporter: Reporter) -> None:
    """Write what `url`, which is called `where`, gives to `part`, whole; DataError after ATTEMPTS or where another one
    is no use."""
    problem = ""
    for _ in attempts(ATTEMPTS):
        try:
            return _copy(where, url, part, reporter)
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        except ValueError as error:  # a port that is no number, a space
            problem = f"it is no address: {error}"
            break
    remedy = "check the network, or get the file and name it with --core-bundle"
    raise DataError(f"the CORE bundle cannot be fetched from {where} ({problem}); {remedy}")


def _copy(where: str, url: str, part: Path, reporter: Reporter) -> None:
    """One attempt; ConnectionError when the answer ends before the length that the server stated."""
    with urllib.request.urlopen(request(url), timeout=SILENCE_SECONDS) as answer, open(part, "wb") as file:
        total = answer.length or 0  # counts down as the answer is read
        while piece := _piece(answer):
            file.write(piece)
            done = file.tell()
            check_size(where, done, "gives")
            reporter.progress("fetch", done, max(total, done), "bytes")
        if file.tell() < total:
            raise ConnectionError(f"the answer ended after {file.tell()} of {total} bytes")


def _piece(answer: http.client.HTTPResponse) -> bytes:
    """The next bytes; ConnectionError for what TLS and the network say, whose numbers are also those of a disk."""
    try:
        return answer.read(CHUNK)
    except OSError as error:
        raise ConnectionError(str(error) or type(error).__name__) from error
