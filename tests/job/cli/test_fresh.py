"""`--fresh` on what is worth keeping: a question on a terminal, `--yes` without one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from job.cli.options import confirm_fresh
from job.errors import UsageError
from job.store.attempt import Attempt


def begun(out: Path, exit_code: int, name: str = "mine") -> Path:
    run = out / "runs" / name
    attempt = Attempt.claim(run)
    attempt.emit("attempt.started", argv=[])
    attempt.emit("attempt.ended", exit_code=exit_code, reason="")
    attempt.close()
    return run


@pytest.fixture
def fresh(speedrun, tmp_path: Path) -> Callable[..., str]:
    """What a command says that is refused for its cap where nothing else is in the way."""

    def said(*words: str) -> str:
        line = ["--preset", "cpu", "--out", str(tmp_path), "--run-id", "mine", "--fresh", "--max-usd", "1", *words]
        return speedrun.here(speedrun.command("run", *line), code=2).stderr

    return said


def test_a_finished_run_is_kept_without_a_terminal_and_without_yes(fresh, tmp_path: Path) -> None:
    run = begun(tmp_path, 0)
    sentence = f"speedrun: --fresh would discard the finished run {run}: add --yes, or take another --run-id\n"
    assert fresh() == fresh("--preset", "smoke") == sentence
    assert (run / "events" / "1.jsonl").is_file()
    begun(tmp_path, 0, "smoke")  # which anybody makes again
    for words in (["--yes"], ["--preset", "smoke", "--run-id", "smoke"]):
        assert "--max-usd needs a price" in fresh(*words)


def test_what_is_in_the_bucket_is_kept_as_well(fresh, tmp_path_factory: pytest.TempPathFactory) -> None:
    bucket = tmp_path_factory.mktemp("bucket")
    (bucket / "runs" / "mine").mkdir(parents=True)
    (bucket / "runs" / "mine" / "recipe.json").write_text("{}")
    said = fresh("--bucket", str(bucket))
    assert said == f"speedrun: --fresh would discard what {bucket}/runs/mine has: add --yes, or take another --run-id\n"


def test_an_unfinished_run_is_discarded_without_a_question(fresh, tmp_path: Path) -> None:
    begun(tmp_path, 75)
    assert "--max-usd needs a price" in fresh()


@pytest.mark.parametrize("answer", ["y", "n", ""])
def test_on_a_terminal_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    person, terminal = os.openpty()
    os.write(person, f"{answer}\n".encode())
    with open(terminal, encoding="utf-8") as keys, open(os.dup(terminal), "w", encoding="utf-8") as screen:
        monkeypatch.setattr("sys.stdin", keys)
        monkeypatch.setattr("sys.stderr", screen)
        if answer == "y":
            confirm_fresh(True, "cpu", begun(tmp_path, 0), None, dry=False)
        else:
            with pytest.raises(UsageError, match="discarded nothing; take another --run-id"):
                confirm_fresh(True, "cpu", begun(tmp_path, 0), None, dry=False)
        said = ""
        while "[y/N]:" not in said:
            said += os.read(person, 4096).decode()
    os.close(person)
    assert f"--fresh discards the finished run {tmp_path / 'runs' / 'mine'}; go on? [y/N]:" in said
