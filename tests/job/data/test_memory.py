"""Memory is estimated, said and checked before the tokenizer is trained."""

from __future__ import annotations

import pytest

from job.data import memory
from job.data.memory import available_bytes, check_training, training_bytes
from job.errors import OutOfMemoryError


def test_the_estimate_covers_what_was_measured():
    for characters, measured in ((15e6, 62e6), (30e6, 96e6), (60e6, 109e6)):
        assert measured <= training_bytes(int(characters)) <= 1.6 * measured
    assert 1e9 < training_bytes(2_000_000_000) < 2e9


def test_it_is_said_and_what_cannot_fit_is_refused(helpers):
    recorder = helpers.Recorder()
    check_training(10**6, recorder)
    ((kind, fields),) = recorder.events
    assert (
        kind == "prepare.memory"
        and fields["estimated_bytes"] == training_bytes(10**6)
        and fields["available_bytes"] == pytest.approx(available_bytes(), rel=0.5)
    )
    with pytest.raises(
        OutOfMemoryError,
        match=r"on 1,000,000,000,000,000 characters takes about \d+\.\d GB of memory and .* are free; "
        "lower data.tokenizer_chars",
    ):
        check_training(10**15, recorder)


def test_a_control_group_limits_it(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_bytes() == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() > 2000
