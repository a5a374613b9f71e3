"""What is damaged on this disk is moved aside, and made again by whoever makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job.reporter import Reporter
from job.store.damaged import usable, verify_once
from job.store.sealed import is_sealed, open_sealed, sealing


class Warnings(Reporter):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def emit(self, kind: str, **fields: Any) -> None:
        assert kind == "warning"
        self.texts.append(fields["text"])


def made(folder: Path) -> Path:
    with sealing(folder, kind="rows", made_from={"name": folder.name}) as unsealed:
        (unsealed.path / "rows.npy").write_bytes(b"some rows")
    return folder / "rows.npy"


def test_a_damaged_folder_is_not_there_any_more(tmp_path: Path) -> None:
    said = Warnings()
    file = made(tmp_path / "00001")
    sealed = usable(tmp_path / "00001", kind="rows", reporter=said)
    assert sealed and usable(tmp_path / "00002", kind="rows", reporter=said) is None and said.texts == []
    file.write_bytes(b"same size")
    assert usable(tmp_path / "00001", kind="rows", reporter=said) is None and not is_sealed(tmp_path / "00001")
    (text,) = said.texts
    assert f"{file} is not the file that was sealed" in text and ".00001.damaged-" in text
    made(tmp_path / "00001")
    assert open_sealed(tmp_path / "00001", kind="rows") == sealed


def test_each_folder_is_hashed_once_by_each_machine(tmp_path: Path, monkeypatch: Any) -> None:
    said = Warnings()
    files = [made(tmp_path / "rows" / name) for name in ("00000", "00001")]
    verify_once(tmp_path, said)
    files[1].write_bytes(b"same size")
    verify_once(tmp_path, said)
    assert said.texts == [] and is_sealed(files[1].parent), "it was verified before"
    monkeypatch.setattr("platform.node", lambda: "another machine")
    verify_once(tmp_path, said)
    assert len(said.texts) == 1 and not is_sealed(files[1].parent) and is_sealed(files[0].parent)
    made(tmp_path / "rows" / "00001")
    (files[0].parent / "manifest.json").write_bytes(b"{")
    verify_once(tmp_path, said)
    assert len(said.texts) == 2 and not is_sealed(files[0].parent) and is_sealed(files[1].parent)
