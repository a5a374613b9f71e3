"""Fixtures of all tests: a small real corpus, a tiny recipe, the command line as a process, a real S3 server."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import botocore.session
import pytest
from click.testing import CliRunner, Result
from hypothesis import settings

import fault_proxy
import s3_server
from job.cli.commands import main

settings.register_profile("shared-cores", deadline=None)  # a deadline would measure the neighbours on a busy machine
settings.load_profile("shared-cores")
botocore.session.create_loader = functools.cache(botocore.session.create_loader)  # its JSON is nine tenths of a client

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
PARTS = ("container", "cluster")
"""folders of tests that need more than Python"""

TINY = (
    "model.depth=2",
    "model.seq_len=64",
    "data.vocab_size=512",
    "data.val_fraction=0.1",
    "train.steps=12",
    "train.total_batch_size=512",
    "train.device_batch_size=4",
    "train.checkpoint_every=4",
    "train.val_every=6",
    "train.val_tokens=4096",
    "train.threads=1",
    "eval.samples=1",
    "eval.sample_tokens=8",
    "eval.cap=6",
)
"""A run of seconds in which every stage does something: checkpoints and validations fall inside it."""


@dataclasses.dataclass
class Speedrun:
    """`speedrun ...` as a user types it, in a process of its own, with the environment's `variables` added."""

    data: Path
    variables: dict[str, str] = dataclasses.field(default_factory=dict)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "job.cli", *arguments]

    def tiny(self, command: str, out: Path, *arguments: str) -> list[str]:
        """`command` with the tiny recipe on the small corpus."""
        overrides = [word for value in TINY for word in ("-o", value)]
        return self.command(
            command,
            "--preset",
            "smoke",
            "--data",
            str(self.data),
            "--out",
            str(out),
            "--run-id",
            "t",
            *overrides,
            *arguments,
        )

    def environment(self) -> dict[str, str]:
        quiet = {"WANDB_MODE": "disabled"}  # unless a test says otherwise
        return quiet | os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "80"} | self.variables

    def start(self, words: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment(), cwd=ROOT
        )

    def __call__(self, words: list[str], *, code: int = 0, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            words, capture_output=True, text=True, env=self.environment(), cwd=ROOT, timeout=seconds, check=False
        )
        assert ended.returncode == code, f"exit {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return ended

    def here(self, words: list[str], *, code: int = 0) -> Result:
        """The same without a process, for what ends before a stage begins."""
        with mock.patch.dict(os.environ):  # a bucket that a command was given goes into it, for the command's children
            ended = CliRunner().invoke(main, words[len(self.command()) :], env=self.environment(), prog_name="speedrun")
        assert ended.exit_code == code, f"exit {ended.exit_code}\n{ended.output}\n{ended.exception!r}"
        return ended


LONGEST = (
    *("test_hopper.py", "test_rehearse.py", "test_nodes_runs.py", "test_chaos.py", "test_exact.py", "test_try8.py"),
    *("test_compiled_step.py", "test_compile_cache.py", "test_rehearse_s3.py", "test_run.py", "test_checkpoint.py"),
)
"""files with minutes of slow tests, and of the fast ones the longest: begun first, no worker ends alone with one"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def sky_env() -> Path:
    """The environment of SkyPilot; `make container` and `make cluster` make it."""
    folder = ROOT / ".sky-env"
    if not list(folder.glob("made-from-*")):
        pytest.fail("SkyPilot's environment is not there: `make container` or `make cluster` makes it")
    return folder


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this test run, one for all of its processes."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(folder: Path, make: Callable[[], object]) -> Path:
    """`folder`, filled by the first process of this test run that asks for it."""
    with open(f"{folder}.made", "ab") as made:
        fcntl.flock(made, fcntl.LOCK_EX)
        if not os.fstat(made.fileno()).st_size:
            folder.mkdir()
            make()
            made.write(b"yes")
    return folder


@pytest.fixture(scope="session")
def small_corpus(common: Path) -> Path:
    """Python's own language reference as text files: about 120 documents of real prose."""
    from pydoc_data.topics import topics

    def write() -> None:
        for name, text in topics.items():
            (common / "corpus" / f"{name}.txt").write_text(text, encoding="utf-8")

    return once(common / "corpus", write)


@pytest.fixture(scope="session")
def speedrun(small_corpus: Path) -> Speedrun:
    return Speedrun(small_corpus)


@pytest.fixture(scope="session")
def s3_shared(common: Path) -> Iterator[Any]:
    """The S3 server of this test run, one for all of its processes."""
    with s3_server.shared_server(common / "s3") as s3:
        yield s3


@dataclasses.dataclass
class Finished:
    """An undisturbed run of the tiny recipe with a bucket: its folder, what it said, and where the bucket is."""

    out: Path
    stdout: str
    stderr: str
    s3: Any


@pytest.fixture(scope="session")
def finished(common: Path, speedrun: Speedrun, s3_shared: Any) -> Finished:
    """One for all processes of this test run: tests copy it or only read it."""
    server = s3_shared.endpoint.rpartition(":")[2]  # one that is started again has lost the bucket
    folder, s3 = common / f"finished-{server}", dataclasses.replace(s3_shared, prefix="finished")

    def run() -> None:
        there = dataclasses.replace(speedrun, variables=s3.variables())
        ended = there(there.tiny("run", folder / "out", "--json", "--bucket", s3.url))
        (folder / "stdout").write_text(ended.stdout)
        (folder / "stderr").write_text(ended.stderr)

    once(folder, run)
    return Finished(folder / "out", (folder / "stdout").read_text(), (folder / "stderr").read_text(), s3)


@pytest.fixture
def prepared(finished: Finished, tmp_path: Path) -> Path:
    """A folder with the tiny recipe's prepared set and no run."""
    shutil.copytree(finished.out / "prepared", tmp_path / "first" / "prepared")
    return tmp_path / "first"


@pytest.fixture
def s3(s3_shared: Any) -> Any:
    """A prefix of the test's own in a bucket of a real S3 server (s3_server.S3)."""
    return s3_shared.place()


@pytest.fixture
def faults(s3_shared: Any) -> Iterator[Any]:
    """A proxy before the S3 server that does what networks do (fault_proxy.Faults)."""
    with fault_proxy.Faults(s3_shared.place()) as faults:
        yield faults


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What was not run for want of a program or a right is the last that is said, in `make container` and `cluster`."""
    skipped = terminalreporter.stats.get("skipped", ())
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in skipped if isinstance(report.longrepr, tuple)}
    asked = [Path(argument) for argument in config.args]
    if reasons and any(ROOT / "tests" / name in (path, path.absolute()) for name in PARTS for path in asked):
        said = f"NOT RUN: {len(skipped)} tests: {'; '.join(sorted(reasons))}"
        config.add_cleanup(lambda: print(said))
