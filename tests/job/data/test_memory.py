"""Memory is estimated, said and checked before the tokenizer is trained."""

from __future__ import annotations

import pytest

from job.data.tokenizer import check_memory, training_bytes
from job.errors import OutOfMemoryError
from job.machine import cgroup
from job.machine.host import available_memory


def test_the_estimate_covers_what_was_measured():
    for characters, measured in ((15e6, 62e6), (30e6, 96e6), (60e6, 109e6)):
        assert measured <= training_bytes(int(characters)) <= 1.6 * measured
    assert 1e9 < training_bytes(2_000_000_000) < 2e9


def test_it_is_said_and_what_cannot_fit_is_refused(helpers):
    recorder = helpers.Recorder()
    check_memory(10**6, recorder)
    ((kind, fields),) = recorder.events
    assert (
        kind == "prepare.memory"
        and fields["estimated_bytes"] == training_bytes(10**6)
        and fields["available_bytes"] == pytest.approx(available_memory(), rel=0.5)
    )
    with pytest.raises(
        OutOfMemoryError,
        match=r"on 1,000,000,000,000,000 characters takes about \d+\.\d GB of memory and .* are free; "
        "lower data.tokenizer_chars",
    ):
        check_memory(10**15, recorder)


def test_a_control_group_limits_it(tmp_path, monkeypatch):
    (tmp_path / "own").write_text("0::/a\n")
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    (tmp_path / "a" / "memory.max").write_text("3000\n")
    (tmp_path / "a" / "memory.current").write_text("1000\n")
    assert available_memory() == 2000
    (tmp_path / "a" / "memory.stat").write_text("anon 200\ninactive_file 500\n")
    assert available_memory() == 2500
    (tmp_path / "a" / "memory.max").write_text("max\n")
    assert available_memory() > 3000


def test_a_control_group_around_this_one_limits_it(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    (tmp_path / "own").write_text("0::/job/task\n")
    for folder, limit, used, stat in (("job", "9000", "5000", "inactive_file 1000"), ("job/task", "max", "10", "")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / folder / "memory.current").write_text(f"{used}\n")
        (tmp_path / folder / "memory.stat").write_text(f"{stat}\n" if stat else "")
    assert available_memory() == 5000
