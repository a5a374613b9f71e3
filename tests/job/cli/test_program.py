"""From the first line to the last: signals before anything is begun, outputs that go away, the first process."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PATIENCE = 60
"""seconds that a process may take to its first line on a busy machine"""
ROOT = Path(__file__).parents[3]


def masks(pid: int, name: str) -> int:
    """A signal mask of a process: SigCgt (handled) or SigIgn, bit n-1 for signal n."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1], 16)
    return 0


def start(tmp_path: Path, *words: str, **given: object) -> subprocess.Popen:
    """`speedrun` that stops for ten minutes at its first heavy import, SIGHUP as a terminal leaves it."""
    (tmp_path / "click.py").write_text("import time\ntime.sleep(600)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONSAFEPATH": "1"}
    words = (*words, sys.executable, "-m", "job.cli", "smoke")
    default = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    return subprocess.Popen(words, env=environment, cwd=tmp_path, preexec_fn=default, **given)


def until_handled(pid: int, number: int) -> None:
    until = time.monotonic() + PATIENCE
    while not masks(pid, "SigCgt") >> (number - 1) & 1:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_first_import_is_75(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, stderr=subprocess.PIPE, text=True)
    until_handled(process.pid, signal.SIGHUP)  # the last of the three
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    assert said == f"speedrun: {number.name} came before anything was begun; the same command begins it\n"


def test_nohup_is_respected(tmp_path: Path) -> None:
    process = start(tmp_path, "nohup", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until_handled(process.pid, signal.SIGTERM)
    time.sleep(0.2)
    assert masks(process.pid, "SigIgn") >> (signal.SIGHUP - 1) & 1
    process.terminate()
    assert process.wait(PATIENCE) == 75


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare")
def test_the_first_process_of_a_container_passes_signals_on_and_buries_orphans(tmp_path: Path) -> None:
    process = start(tmp_path, "unshare", "--pid", "--fork", "--kill-child", stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        first = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        below = Path(f"/proc/{first[0]}/task/{first[0]}/children").read_text().split() if first else []
        if below and masks(int(below[0]), "SigCgt") >> (signal.SIGHUP - 1) & 1:
            break
        time.sleep(0.02)
    os.kill(int(first[0]), signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75 and "SIGTERM came before anything was begun" in said


@pytest.mark.parametrize("gone", [(1,), (2,), (1, 2)], ids=["stdout", "stderr", "both"])
def test_a_reader_that_goes_away_changes_no_exit_code(speedrun: object, gone: tuple[int, ...]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    outputs = {name: write_end if fd in gone else subprocess.DEVNULL for fd, name in ((1, "stdout"), (2, "stderr"))}
    for words, code in ((["plan", "--preset", "smoke"], 0), (["report", "--run-id", "none"], 2)):
        done = subprocess.run(speedrun.command(*words), env=speedrun.environment(), cwd=ROOT, timeout=60, **outputs)
        assert done.returncode == code
    os.close(write_end)


def test_closed_descriptors_lead_to_no_other_file(speedrun: object) -> None:
    words = speedrun.command("report", "--run-id", "none")
    shell = ["sh", "-c", 'exec "$@" 1>&- 2>&-', "sh", *words]
    assert subprocess.run(shell, env=speedrun.environment(), cwd=ROOT, timeout=60).returncode == 2


def test_a_thread_that_still_runs_holds_no_end_up(tmp_path: Path) -> None:
    """Neither that of a command nor that of a bug."""
    program = """
import sys, threading, time
from job.cli.__main__ import main
from job.cli.commands import main as commands

def callback(as_json):
    threading.Thread(target=time.sleep, args=(600,)).start()
    if as_json:
        raise RuntimeError("a bug")

commands.commands["presets"].callback = callback
main()
"""
    for words, code in (((), 0), (("--json",), 1)):
        command = [sys.executable, "-c", program, "presets", *words]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        assert (ended.returncode, "RuntimeError: a bug" in ended.stderr) == (code, bool(code))
