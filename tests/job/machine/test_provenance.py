"""What a run notes of its program and machine, so that its figures can be told from others."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from job.machine import host
from job.recipe.config import resolve
from job.run.launch import recipe_document


def test_a_run_notes_commit_image_and_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv(host.REVISION, "12ab34")
    monkeypatch.delenv(host.IMAGE, raising=False)
    found = host.provenance()
    assert (found["commit"], found["image"], found["lock"]) == ("12ab34", None, None)
    (tmp_path / host.INSTALLED_LOCK).write_text("torch==2.13.0\n")
    monkeypatch.setenv(host.IMAGE, "ghcr.io/me/gpt2-speedrun@sha256:00ff")
    noted = recipe_document(resolve("smoke", {}, []), "r")["provenance"]
    assert noted["image"] == "ghcr.io/me/gpt2-speedrun@sha256:00ff"
    assert noted["lock"] == hashlib.sha256(b"torch==2.13.0\n").hexdigest()
    assert host.describe()["provenance"] == noted
