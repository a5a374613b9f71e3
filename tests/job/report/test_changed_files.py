"""Every kind of stored file, changed at random: it is noticed or without effect, never a traceback, never another
result."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from job.errors import SpeedrunError
from job.evaluation.ledger import LEDGER
from job.report.result import build_result
from job.store.fence import read_claim
from job.store.sealed import MANIFEST, open_sealed

CHANGES = 400


def change_bytes(data: bytes, draw: random.Random) -> bytes:
    at, until = sorted((draw.randrange(len(data)), draw.randrange(len(data) + 1)))
    match draw.choice(["flip", "truncate", "duplicate", "zeros"]):
        case "flip":
            return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        case "truncate":
            return data[:at]
        case "duplicate":
            return data[:until] + data[at:]
        case _:
            return data[:at] + bytes(until - at) + data[until:]


def change_value(value: Any, draw: random.Random) -> Any:
    """`value` with one value somewhere in it dropped, doubled or replaced."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        if draw.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: change_value(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        if draw.random() < 0.3:
            return [*value[:at], value[at], *value[at:]]
        return [*value[:at], change_value(value[at], draw), *value[at + 1 :]]
    if isinstance(value, float) and draw.random() < 0.5:
        return value * 2
    return draw.choice([None, 0, -1, 10**30, "", "x", [], {}, True, float("nan")])


def changed(file: Path, draw: random.Random) -> bytes:
    data = file.read_bytes()
    if draw.random() < 0.5 or file.suffix not in (".json", ".jsonl", ""):
        return change_bytes(data, draw)
    lines = data.splitlines() if file.suffix == ".jsonl" else [data]
    at = draw.randrange(len(lines))
    lines[at] = json.dumps(change_value(json.loads(lines[at]), draw)).encode()
    return b"\n".join(lines) + b"\n"


def outcome(run: Path) -> Any:
    """What the run's files say: its result, or the sentence that refuses."""
    try:
        result = build_result(run)
        for manifest in sorted([*run.rglob(MANIFEST), *(run.parents[1] / "prepared").rglob(MANIFEST)]):
            kind = {"000000000000960": "checkpoint", "bpb": "bpb", "tokenizer": "tokenizer", "ledger": LEDGER}
            if name := kind.get(manifest.parent.name):
                open_sealed(manifest.parent, kind=name)
        return result
    except SpeedrunError as error:
        return str(error)


def test_whatever_is_changed_the_result_is_the_same_or_the_change_is_said(make_run) -> None:
    run = make_run(steps=30).whole().path
    whole = outcome(run)
    assert whole["state"] == "complete" and whole["unusable_events"] == 0
    files = [file for folder in (run, run.parents[1] / "prepared") for file in sorted(folder.rglob("*"))]
    files = [file for file in files if file.is_file()]
    noticed = 0
    for seed in range(CHANGES):
        draw = random.Random(seed)
        file = files[seed % len(files)]
        before = file.read_bytes()
        file.write_bytes(changed(file, draw))
        found = outcome(run)
        said = isinstance(found, str) or found["unusable_events"] > 0 or bool(found["unhashed"])
        assert said or found == whole, f"seed {seed}, {file.relative_to(run.parents[1])}: {found}"
        noticed += said
        file.write_bytes(before)
    assert outcome(run) == whole and noticed > CHANGES / 2


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"nonce": 1', b'{"nonce": "a", "sha256": "b"}'])
def test_a_claim_that_cannot_be_read_says_nothing(data: bytes) -> None:
    assert read_claim(data) == {}
