"""What a run notes of its program and machine, so that its figures can be told from others."""

from __future__ import annotations

import hashlib
import subprocess
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


def test_the_repository_that_an_environment_lies_in_is_not_the_program_s(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(host.REVISION, raising=False)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@example.com"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "mine"], check=True)
    installed = tmp_path / "venv/lib/python3.11/site-packages/job/machine/host.py"
    installed.parent.mkdir(parents=True)
    monkeypatch.setattr(host, "__file__", str(installed))
    assert host.revision() is None
    clone = tmp_path / "job/machine/host.py"
    clone.parent.mkdir(parents=True)
    monkeypatch.setattr(host, "__file__", str(clone))
    assert len(host.revision() or "") == 12


def test_an_nvidia_smi_that_says_nothing_names_no_driver(tmp_path: Path, monkeypatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert host.driver() is None
