"""`speedrun prepare` by itself: what was sealed is in the bucket, also where the command ended before its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.console import Console
from job.errors import InterruptedRun
from job.recipe.config import resolve
from job.reporter import Reporter
from job.run import prepare_alone
from job.run.bucket import Bucket
from job.store.sealed import sealing
from job.store.stores import FolderStore, sealed_names


def test_what_an_interrupted_prepare_has_sealed_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, store = tmp_path / "out", FolderStore(tmp_path / "bucket")
    monkeypatch.setattr(prepare_alone, "start_ranks", lambda *_, **__: [])

    def interrupted(*_: Any, reporter: Reporter, **__: Any) -> None:
        reporter.emit("prepare.started", id="p")
        with sealing(out / "prepared" / "p" / "tokenizer", kind="tokenizer", made_from={}):
            pass
        raise InterruptedRun("prepare was interrupted")

    monkeypatch.setattr(prepare_alone, "supervise", interrupted)
    with pytest.raises(InterruptedRun, match="prepare was interrupted"):
        prepare_alone.prepare_alone(out, resolve("smoke"), console=Console(-1), bucket=Bucket(store, 60.0))
    assert sealed_names(store, "prepared/p") == ["tokenizer"]
