"""wandb: the numbers sent, each once, and that losing it harms nothing. The client is the real one, the server ours."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.console import Console
from job.errors import DivergedError, InterruptedRun, StorageError
from job.run import wandb_client
from job.run.wandb_client import wandb_logging
from job.run.wandb_process import Events, alerts, has_key, history, mode, summary, wandb_id
from job.store import VARIABLE
from job.store.attempt import Attempt, fold, read_events

RECIPE = {"preset": "smoke", "recipe": {"model": {"depth": 2}, "data": {"paths": ["texts"]}}}
FLOPS = 1000
KEY = "a" * 40


@pytest.fixture
def server(wandb_server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wandb_client, "FINISH", 60.0)
    return wandb_server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps({"evidence": "", "sources": {}, "derived": {}} | RECIPE))
    return folder


def train(attempt: Attempt, first: int, last: int, steps: int = 20) -> None:
    """Events as a training stage writes them, for the steps `first` ... `last`."""
    attempt.emit("train.start", step=first, rows=first * 8, steps=steps, flops_per_token=FLOPS)
    for step in range(first, last + 1):
        if step and step % 5 == 0:
            attempt.emit("train.val", step=step, rows=step * 8, bpb=3 - step / 100)
        attempt.emit(
            "train.step", step=step, rows=(step + 1) * 8, loss=5 - step / 10, lr_mult=1.0, ms=500.0, tokens=512
        )


def evaluate(attempt: Attempt, name: str = "core", steps: int = 20) -> None:
    attempt.emit("eval.bpb", step=steps, rows=steps * 8, bpb=2.5)
    attempt.emit("eval.task", task="copa", n=100, accuracy=0.625, baseline=0.5, centered=0.25)
    attempt.emit("eval.done", metric=0.27, name=name, cap=None, bundle_id="b", se=0.01)


def begin(run: Path) -> Attempt:
    attempt = Attempt.claim(run)
    attempt.emit("attempt.started", argv=[])
    return attempt


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def warnings(run: Path) -> list[str]:
    return [e["text"] for e in read_events(run) if e["kind"] == "warning"]


# --- what is sent


def test_rows_and_summary_have_the_leaderboards_names(run: Path) -> None:
    attempt = begin(run)
    train(attempt, 0, 19)
    evaluate(attempt)
    record = fold(run)
    rows = dict(history(record, -1))
    assert list(rows) == list(range(21))
    assert rows[15] == {
        "val/bpb": 2.85,
        "step": 15,
        "train/loss": 3.5,
        "train/lrm": 1.0,
        "train/dt": 0.5,
        "train/tok_per_sec": 1024.0,
        "total_training_flops": 16 * 512 * FLOPS,
        "total_training_time": 2.5,
    }
    assert rows[20] == {"val/bpb": 2.5, "core_metric": 0.27, "centered_results": {"copa": 0.25}}
    assert summary(record) == {
        "step": 20,
        "total_training_flops": 20 * 512 * FLOPS,
        "total_training_time": record.training_seconds,
        "val_bpb": 2.5,
        "core_metric": 0.27,
        "tasks": {"copa": {"n": 100, "accuracy": 0.625, "baseline": 0.5, "centered": 0.25}},
    }
    assert rows[19]["total_training_time"] == record.training_seconds == 4.5


def test_alerts_are_of_this_attempt_and_its_end(run: Path) -> None:
    attempt = begin(run)
    train(attempt, 0, 9)
    attempt.emit("train.slow_ranks", step=9, rows=80, behind={"3": 0.2}, lost_ms=1.0, steps=10)
    record = fold(run)
    assert alerts(record, 1, None) == {"slow": "ranks 3 are slower than the median rank"}
    assert alerts(record, 2, None) == {} and alerts(record, 2, 14) == {}
    assert alerts(record, 2, 75) == {"preempted": "interrupted after step 9; the same command goes on"}
    assert alerts(record, 2, 0) == {"done": "10 steps; not scored yet"}


def test_a_smoke_score_is_not_called_core(run: Path) -> None:
    attempt = begin(run)
    train(attempt, 0, 19)
    evaluate(attempt, name="smoke_score")
    assert "core_metric" not in summary(fold(run))
    assert summary(fold(run))["smoke_score"] == 0.27
    assert "core_metric" not in dict(history(fold(run), -1))[20]


def test_what_was_sent_is_passed_over_and_a_validation_waits_for_its_step(run: Path) -> None:
    attempt = begin(run)
    train(attempt, 0, 9)
    attempt.emit("train.val", step=10, rows=80, bpb=2.9)
    assert [step for step, _ in history(fold(run), 6)] == [7, 8, 9]
    again = begin(run)
    train(again, 8, 11)
    rows = dict(history(fold(run), 9))
    assert list(rows) == [10, 11]
    assert rows[10]["val/bpb"] == 2.9


def test_events_are_folded_as_they_are_written_line_by_line(run: Path) -> None:
    train(begin(run), 0, 3)
    events = Events(run)
    events.advance()
    assert sorted(events.record.steps) == [0, 1, 2, 3]
    with open(run / "events" / "1.jsonl", "ab") as file:
        line = json.dumps({"kind": "train.step", "attempt": 1, "seq": 99, "t": 1.0, "step": 4, "ms": 1.0}).encode()
        file.write(line[:20])
        file.flush()
        events.advance()
        assert 4 not in events.record.steps
        file.write(line[20:] + b"\n")
    events.advance()
    assert 4 in events.record.steps
    assert list(events.record.steps) == list(fold(run).steps)


def test_a_run_begun_anew_is_another_one(run: Path) -> None:
    begin(run)
    before = wandb_id(run, fold(run))
    assert before.startswith("mine-2")
    begin(run)
    assert wandb_id(run, fold(run)) == before
    (run / "events" / "1.jsonl").write_text('{"kind": "attempt.started", "attempt": 1, "seq": 0, "t": 5.0}\n')
    assert wandb_id(run, fold(run)) == "mine-19700101-000005"


def test_the_mode_follows_the_key_and_wandbs_own_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    logins = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(logins))
    assert mode() == "offline"
    logins.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    logins.chmod(0o600)
    assert has_key("https://api.wandb.ai")
    assert not has_key("https://wandb.example.com")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mode() == "offline"
    assert not wandb_client.is_off()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_client.is_off()


def test_where_nobody_asked_for_wandb_there_is_no_trace_of_it(run: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "")  # a secret of a YAML that nobody filled in
    with wandb_logging(run, begin(run), Console()):
        assert sorted(path.name for path in run.iterdir()) == ["attempts", "events", "recipe.json"]
    assert warnings(run) == [] and capfd.readouterr().err == ""
    for name, value in (("WANDB_API_KEY", KEY), ("WANDB_MODE", "offline"), ("WANDB_PROJECT", "mine")):
        with monkeypatch.context() as asked:
            asked.setenv(name, value)
            assert not wandb_client.is_off()
    (tmp_path / "settings").touch()  # as `wandb login --host` leaves it
    assert not wandb_client.is_off()


# --- sent once, by the real client


@pytest.mark.slow
def test_online_every_step_is_sent_once_though_the_process_was_killed(run: Path, server, monkeypatch, capfd) -> None:
    first = begin(run)
    watching = wandb_client.WandbClient(run, first.number, Console())
    train(first, 0, 9)
    wait_until(lambda: server.lines and len(server.steps) > 4)
    os.killpg(watching.child.process.pid, signal.SIGKILL)
    train(first, 10, 12)
    second = begin(run)
    monkeypatch.setenv(VARIABLE, "s3://b/p")
    with wandb_logging(run, second, Console()):
        train(second, 8, 19)
        second.emit("train.slow_ranks", step=19, rows=160, behind={"3": 0.2}, lost_ms=1.0, steps=10)
        evaluate(second)
    assert server.steps == list(range(21))
    assert sorted(alert["title"] for alert in server.alerts) == ["mine done", "mine slow"]
    ((name, sent),) = server.runs.items()
    assert name.startswith("mine-")
    assert sent["displayName"] == "mine"
    assert json.loads(sent["config"])["model.depth"]["value"] == 2
    assert json.loads(sent["config"])["page"]["value"] == "s3://b/p/runs/mine/report/report.html"
    said = {key: server.summaries[name][key] for key in summary(fold(run))}
    assert said == summary(fold(run))
    assert warnings(run) == []
    assert capfd.readouterr().err.count("wandb: http") == 2  # once an attempt


def offline_folders(run: Path) -> list[Path]:
    return list((run / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_offline_leaves_one_folder_and_one_command_sends_it_once(run: Path, server, monkeypatch, capfd) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(run / "none"))
    monkeypatch.setattr(wandb_client, "FINISH_INTERRUPTED", wandb_client.FINISH)
    first = begin(run)
    with pytest.raises(InterruptedRun), wandb_logging(run, first, Console()):
        train(first, 0, 9)
        wait_until(lambda: offline_folders(run))
        raise InterruptedRun("a signal")
    time.sleep(1.1)  # wandb names folders by the second
    second = begin(run)
    with wandb_logging(run, second, Console()):
        train(second, 8, 19)
        evaluate(second)
    (folder,) = offline_folders(run)
    assert server.runs == {}
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", str(folder)], check=True, capture_output=True, timeout=60, cwd=run
    )
    assert server.steps == list(range(21))
    wandb_client.sync(run, Console())
    assert server.steps == list(range(21))
    assert capfd.readouterr().err.count("warning") == 0


@pytest.mark.slow
def test_the_sync_command_sends_a_whole_run_and_then_what_is_new(run: Path, server, speedrun) -> None:
    attempt = begin(run)
    train(attempt, 0, 9)
    words = speedrun.command("wandb-sync", "--out", str(run.parents[1]), "--run-id", "mine")
    assert speedrun(words).stderr.startswith(f"wandb: {server.url}/us/gpt2-speedrun/runs/mine-")
    assert server.steps == list(range(10))
    train(attempt, 10, 19)
    speedrun(words)
    assert server.steps == list(range(20))


# --- lost, without harm


@pytest.mark.parametrize(
    "trouble", ["hangs", *(pytest.param(name, marks=pytest.mark.slow) for name in ("refused", "nonsense", "dies"))]
)
def test_a_lost_wandb_is_a_warning_and_nothing_else(run: Path, server, monkeypatch, capfd, trouble: str) -> None:
    monkeypatch.setattr(wandb_client, "FINISH", 6.0)
    server.hangs, server.answers_nonsense = trouble == "hangs", trouble == "nonsense"
    if trouble == "refused":
        server.stop()
    attempt = begin(run)
    with wandb_logging(run, attempt, Console()):
        train(attempt, 0, 9)
        if trouble == "dies":
            wait_until(lambda: server.lines)
            server.stop()
        train(attempt, 10, 19)
        ended = time.monotonic()
    assert time.monotonic() - ended < 10
    (warning,) = warnings(run)
    assert warning.endswith("; later: speedrun wandb-sync --run-id mine")
    assert warning in capfd.readouterr().err
    wait_until(lambda: not processes_of(run), seconds=20)


def test_the_error_of_a_run_passes_through_and_a_full_disk_hides_no_other(run: Path, server, monkeypatch) -> None:
    monkeypatch.setattr(wandb_client, "FINISH", 1.0)
    server.hangs = True
    attempt = begin(run)

    def refuse(*_: object, **__: object) -> None:
        raise StorageError("full")

    with pytest.raises(DivergedError, match="as it was"), wandb_logging(run, attempt, Console()):
        train(attempt, 0, 9)
        attempt.emit = refuse
        raise DivergedError("as it was")


@pytest.mark.slow
def test_a_process_whose_supervisor_vanished_ends_by_itself(run: Path, server) -> None:
    attempt = begin(run)
    watching = wandb_client.WandbClient(run, attempt.number, Console())
    train(attempt, 0, 3)
    wait_until(lambda: server.lines)
    server.hangs = True
    watching.child.process.stdin.close()
    watching.child.process.wait(timeout=20)
    wait_until(lambda: not processes_of(run), seconds=20)


@pytest.mark.slow
def test_a_server_that_comes_back_gets_everything_once(run: Path, server, monkeypatch, capfd) -> None:
    hasty = "import sys, job.run.wandb_process as m; m.INIT_TIMEOUT = 3; m.RETRY = 0.1; sys.exit(m.main(*sys.argv[1:]))"
    monkeypatch.setattr(wandb_client, "COMMAND", ["-c", hasty])
    server.hangs = True
    attempt, said = begin(run), ""

    def lost() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "warning: wandb was lost" in said

    with wandb_logging(run, attempt, Console()):
        train(attempt, 0, 9)
        wait_until(lost)
        server.hangs = False
        wait_until(lambda: server.lines)
        train(attempt, 10, 19)
        evaluate(attempt)
    assert server.steps == list(range(21))
    assert warnings(run) == []


@pytest.mark.parametrize("key", [None, pytest.param("too-short", marks=pytest.mark.slow)])
def test_to_sync_without_a_usable_key_is_said(run: Path, server, monkeypatch, speedrun, key: str | None) -> None:
    monkeypatch.setenv("NETRC", str(run / "none"))
    monkeypatch.delenv("WANDB_API_KEY")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    train(begin(run), 0, 3)
    words = speedrun.command("wandb-sync", "--out", str(run.parents[1]), "--run-id", "mine")
    said = speedrun(words, code=12 if key else 2).stderr
    if key:
        assert said.startswith("speedrun: wandb was lost (") and "nothing is lost" in said
    else:
        assert said == "speedrun: wandb has no key; set WANDB_API_KEY, or give the command `wandb login` once\n"


def processes_of(run: Path) -> list[str]:
    """Command lines of our process and of wandb's own that still work on `run`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            where = os.readlink(entry / "cwd") if "wandb" in words else ""
            if ("job.run.wandb_process" in words and str(run) in words) or (
                "wandb-core" in words and where == os.fspath(run)
            ):
                found.append(words)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [False, True])
def test_a_real_run_that_is_killed_and_resumed(tmp_path: Path, server, speedrun, hangs: bool) -> None:
    server.hangs = hangs
    run = tmp_path / "runs" / "t"
    killed = speedrun.start(speedrun.tiny("run", tmp_path))
    wait_until(lambda: sum(e["kind"] == "train.step" for e in read_events(run)) > 6, seconds=120)
    killed.kill()
    killed.communicate()
    speedrun(speedrun.tiny("run", tmp_path))
    if not hangs:
        assert server.steps == list(range(13))
        assert server.lines.popitem()[1][-1]["smoke_score"] == fold(run).score["metric"]
    assert bool(warnings(run)) == hangs
