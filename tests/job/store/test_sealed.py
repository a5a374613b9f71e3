"""Sealed folders: whole or absent, and refused with a name when a byte differs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from job.errors import DataError, StorageError
from job.store.documents import hashed
from job.store.sealed import MANIFEST, atomic_write, content_id, is_sealed, open_sealed, sealing

MADE_FROM = {"text": "abc", "size": 3}


def make(path: Path) -> Path:
    with sealing(path, kind="thing", made_from=MADE_FROM) as folder:
        (folder.path / "a.bin").write_bytes(b"aaaa")
        (folder.path / "sub").mkdir()
        (folder.path / "sub" / "b.bin").write_bytes(b"bb")
        folder.facts["count"] = 2
    return path


def test_round_trip(tmp_path: Path) -> None:
    sealed = open_sealed(make(tmp_path / "x"), kind="thing")
    assert sealed.facts == {"count": 2}
    assert sealed.made_from == MADE_FROM
    assert sealed.id == content_id("thing", MADE_FROM)
    assert set(sealed.files) == {"a.bin", "sub/b.bin"}
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_id_depends_on_kind_and_inputs_not_on_key_order() -> None:
    assert content_id("a", {"x": 1, "y": 2}) == content_id("a", {"y": 2, "x": 1})
    assert len({content_id("a", {"x": 1}), content_id("b", {"x": 1}), content_id("a", {"x": 2})}) == 3


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), sealing(tmp_path / "x", kind="thing", made_from={}) as folder:
        (folder.path / "a").write_text("a")
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_an_older_folder_is_replaced(tmp_path: Path) -> None:
    make(tmp_path / "x")
    with sealing(tmp_path / "x", kind="other", made_from={}) as folder:
        (folder.path / "c").write_text("c")
    assert set(open_sealed(tmp_path / "x", kind="other").files) == {"c"}
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.mark.parametrize("name", ["a.bin", "sub/b.bin"])
def test_a_flipped_byte_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file = make(tmp_path / "x") / name
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    open_sealed(tmp_path / "x", kind="thing", verify=False)
    with pytest.raises(DataError, match=f"{file} is not the file that was sealed"):
        open_sealed(tmp_path / "x", kind="thing")


def test_a_truncated_and_a_missing_file_are_refused_by_name(tmp_path: Path) -> None:
    file = make(tmp_path / "x") / "a.bin"
    file.write_bytes(b"aaa")
    with pytest.raises(DataError, match=r"a\.bin has 3 bytes, not 4"):
        open_sealed(tmp_path / "x", kind="thing", verify=False)
    file.unlink()
    with pytest.raises(DataError, match=r"a\.bin is missing"):
        open_sealed(tmp_path / "x", kind="thing", verify=False)


def test_another_version_kind_or_no_seal_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "x")
    with pytest.raises(DataError, match="holds a thing, not a checkpoint"):
        open_sealed(path, kind="checkpoint")
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(hashed(manifest | {"schema": 99})))
    with pytest.raises(DataError, match="another version"):
        open_sealed(path, kind="thing")
    (path / MANIFEST).write_text('{"schema": 1, ')
    with pytest.raises(DataError, match="cannot be read"):
        open_sealed(path, kind="thing")
    (path / MANIFEST).unlink()
    with pytest.raises(DataError, match="never sealed"):
        open_sealed(path, kind="thing")


KILLED_WRITER = """
    import os, signal, sys
    from job.store import sealed
    moment = sys.argv[2]
    real = getattr(sealed, moment)
    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(sealed, moment, die)
    with sealed.sealing(sealed.Path(sys.argv[1]), kind="thing", made_from={}) as folder:
        (folder.path / "a").write_text("a" * 1000)
"""


@pytest.mark.parametrize("moment", ["_hashed", "sha256_file", "fsync", "atomic_write", "_replace_folder"])
def test_sigkill_at_any_moment_leaves_a_whole_folder_or_none(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "x"
    script = textwrap.dedent(KILLED_WRITER)
    ended = subprocess.run(
        [sys.executable, "-c", script, str(path), moment], cwd=Path(__file__).parents[3], check=False
    )
    assert ended.returncode == -signal.SIGKILL
    if is_sealed(path):
        open_sealed(path, kind="thing")
    make(path)
    assert list(tmp_path.iterdir()) == [path], "the next writer sweeps what the killed one left"


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse the write as a full disk does."""
    script = textwrap.dedent("""
        import resource, signal, sys
        from job import errors
        from job.store import sealed
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            with sealed.sealing(sealed.Path(sys.argv[1]), kind="thing", made_from={}) as folder:
                (folder.path / "a").write_bytes(b"x" * 10000)
        except errors.StorageError as error:
            print(error, int(error.exit_code))
    """)
    command = [sys.executable, "-c", script, str(tmp_path / "x")]
    said = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True).stdout
    assert said.startswith("the disk is full: writing ")
    assert said.endswith("free some space and run the same command again (what was sealed is kept) 12\n")
    assert list(tmp_path.iterdir()) == []


def test_atomic_write_replaces_whole(tmp_path: Path) -> None:
    atomic_write(tmp_path / "sub" / "f", b"one")
    atomic_write(tmp_path / "sub" / "f", b"two")
    assert (tmp_path / "sub" / "f").read_bytes() == b"two"
    assert os.listdir(tmp_path / "sub") == ["f"]


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((StorageError, OSError)), sealing(tmp_path / "file" / "x", kind="thing", made_from={}):
        pass
