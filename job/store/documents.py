"""Stored JSON, read in one place: what is not as it was written is a DataError with the remedy, never a traceback.

A document outside of sealed folders (a recipe, a claim) and a manifest carry a hash of themselves; those of earlier
versions do not, and are taken as they are. An event has a checksum of its own (job/store/attempt.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.errors import DataError, UsageError

HASH = "sha256"


def canonical_json(value: Any) -> str:
    """One spelling per value (sorted keys, no spaces), so that equal values have equal hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def hashed(document: Mapping[str, Any]) -> dict[str, Any]:
    """`document` with the hash of all else in it."""
    rest = {key: value for key, value in document.items() if key != HASH}
    return {**rest, HASH: hashlib.sha256(canonical_json(rest).encode("utf-8", "surrogatepass")).hexdigest()}


def read_document(data: bytes, name: object, remedy: str, shape: Mapping[str, type]) -> dict[str, Any]:
    """The JSON object in `data`; DataError unless its hash is right and it has each key of `shape`, of that type."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} cannot be read ({error}); {remedy}") from None
    if not isinstance(document, dict):
        raise DataError(f"{name} holds no JSON object; {remedy}")
    if HASH in document and hashed(document)[HASH] != document[HASH]:
        raise DataError(f"{name} is not what was written (its hash differs); {remedy}")
    for key, kind in shape.items():
        if type(document.get(key)) is not kind:
            raise DataError(f"{name} has no {key} that can be used; {remedy}")
    return document


RECIPE = {"preset": str, "evidence": str, "recipe": dict, "sources": dict, "derived": dict}


def read_recipe(data: bytes, name: object) -> dict[str, Any]:
    """A run's `recipe.json`."""
    remedy = "restore it from the bucket or a copy, or begin the run anew with --fresh"
    document = read_document(data, name, remedy, RECIPE)
    if not all(isinstance(part, dict) for part in (*document["recipe"].values(), *document["derived"].values())):
        raise DataError(f"{name} has sections that are no tables; {remedy}")
    return document


def recipe_of(run: Path) -> dict[str, Any]:
    """The document `recipe.json` of `run`; UsageError where there is none."""
    try:
        return read_recipe((run / "recipe.json").read_bytes(), run / "recipe.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"no run at {run} (it has no recipe.json); start one, or give the --out and --run-id of one that is there"
        ) from None
