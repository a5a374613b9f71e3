"""A checkpoint of exactly 1 GiB to a real S3 server: ours beside plain `upload_file` of the same bytes, in turns.

pytest tests/bench/bench_store.py --override-ini "python_files=bench_*.py" --capture=no
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from job.store import open_store
from job.store.s3 import S3Store
from job.store.sealed import sealing
from job.store.stores import push_sealed

FILES, SIZE = 16, 64 << 20
TURNS = 3


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def test_upload_against_upload_file(s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.enter(monkeypatch)
    with sealing(tmp_path / "checkpoint", kind="checkpoint", made_from={}) as folder:
        for number in range(FILES):
            (folder.path / f"{number:05d}.safetensors").write_bytes(os.urandom(SIZE))
    files = sorted((tmp_path / "checkpoint").glob("*.safetensors"))
    whole = tmp_path / "whole"
    with open(whole, "wb") as file:
        for part in files:
            file.write(part.read_bytes())

    client, store = s3.client(), open_store(s3.url)
    assert isinstance(store, S3Store)
    number = 0

    def name() -> str:
        nonlocal number
        number += 1
        return f"runs/t/checkpoints/{number}"

    def each() -> None:
        prefix = name()
        for path in files:
            client.upload_file(str(path), s3.bucket, f"{s3.prefix}/{prefix}/{path.name}")

    ways = {
        "push_sealed, 16 files of 64 MiB": lambda: push_sealed(store, name(), tmp_path / "checkpoint"),
        "upload_file, 16 files one by one": each,
        "upload_file, one file of 1 GiB": lambda: client.upload_file(str(whole), s3.bucket, f"{s3.prefix}/{name()}"),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(TURNS):
        for way, work in ways.items():
            times[way].append(seconds(work))
            print(f"turn {turn + 1}: {way:<34} {times[way][-1]:6.2f} s", flush=True)
            store.delete(store.list("runs/t/checkpoints"))
    ours = times["push_sealed, 16 files of 64 MiB"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"\n\n{FILES * SIZE >> 20} MiB to a server on this machine, {TURNS} turns; "
        f"this process never held more than {peak:.0f} MiB"
    )
    print(f"{'':<34} {'seconds':>24} {'median':>8} {'ours takes':>11}")
    for way, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(ours, taken, strict=True))
        print(f"{way:<34} {'  '.join(f'{t:6.2f}' for t in taken):>24} {statistics.median(taken):>8.2f} {ratio:>10.2f}x")
