"""What tests of several rooms need: waiting, a run's record, processes, ranks, stand-ins."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import random
import socket
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from job.machine.finding import Finding, Verdict
from job.reporter import Reporter
from job.store.attempt import read_events
from job.store.sealed import open_sealed
from s3_server import is_free

if TYPE_CHECKING:
    import subprocess


def load(path: Path, name: str | None = None) -> ModuleType:
    """The file as a module; the tests are no package."""
    spec = importlib.util.spec_from_file_location(name or path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


# --- waiting


def wait_for(
    found: Callable[[], Any], seconds: float, why: str | Callable[[], str] = "in vain", every: float = 0.02
) -> Any:
    """What `found` returns as soon as it is true; `found` may raise when it never will be."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, why if isinstance(why, str) else why()
        time.sleep(every)
    return value


def wait_for_event(out: Path, process: subprocess.Popen[str], kind: str, seconds: float = 240, **fields: Any) -> None:
    """Until run t below `out` has recorded such an event; `process` must live until then."""

    def found() -> bool:
        assert process.poll() is None, process.communicate()
        return any(fields.items() <= event.items() for event in events(out, kind))

    wait_for(found, seconds, f"no {kind} within {seconds} seconds")


# --- the record of run t below a folder


def events(out: Path, kind: str, run: str = "t") -> list[dict[str, Any]]:
    return [event for event in read_events(out / "runs" / run) if event["kind"] == kind]


def weights(out: Path) -> dict[str, str]:
    """SHA-256 by file of the newest checkpoint's weights, every file of which is looked at."""
    newest = max((out / "runs" / "t" / "checkpoints").iterdir())
    files = open_sealed(newest, kind="checkpoint").files
    return {name: entry["sha256"] for name, entry in files.items() if name.startswith("weights-")}


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "runs" / "t" / "report" / "result.json").read_text())


class Kept(Reporter):
    """Keeps the events in memory."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]


KEPT_RUNS = Path(__file__).parent / "data" / "kept_runs"


def unpacked_run(name: str, folder: Path) -> Path:
    """The kept run's folder, below `folder`/out; a file that its manifest has and the archive has not gets the right
    size."""
    with tarfile.open(KEPT_RUNS / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    run = folder / "out" / "runs" / name
    for manifest in run.glob("checkpoints/*/manifest.json"):
        for file, entry in json.loads(manifest.read_text())["files"].items():
            if not (path := manifest.parent / file).exists():
                with path.open("wb") as sparse:
                    sparse.truncate(entry["size"])
    return run


# --- findings of doctor


def judged(findings: list[Finding]) -> list[str]:
    """Lines of what is not in order, each of which must have a remedy."""
    wrong = [finding for finding in findings if finding.verdict != Verdict.OK]
    assert all(finding.remedy for finding in wrong if finding.verdict != Verdict.UNKNOWN)
    return [finding.line() for finding in wrong]


# --- processes


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether it runs; one that has ended and was not waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def command_line(pid: int) -> str:
    """Empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except FileNotFoundError:
        return ""


def ranks_of(supervisor: int) -> list[int]:
    return [pid for pid in children(supervisor) if "job.run.rank" in command_line(pid)]


def free_ports(number: int) -> list[int]:
    """Below the range of outgoing connections, which tests beside this one open all the time, and s3_server's."""
    ports = range(6000, 12000)
    return random.SystemRandom().sample([port for port in ports if is_free(port)], number)


def loopback() -> str:
    """The name of the loopback interface, for gloo."""
    return next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))


def _rank(function: Callable[..., Any], rank: int, world: int, folder: str, arguments: tuple, named: dict) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(function(rank, world, *arguments, **named), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(
    world: int, folder: Path, function: Callable[..., Any], *arguments: Any, seconds: float = 300, **named: Any
) -> list[Any]:
    """What `function(rank, world, ...)` returns on each of `world` gloo ranks, which are processes of one thread."""
    import torch

    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "job.train.loop"])
    ranks = [
        context.Process(target=_rank, args=(function, rank, world, str(folder), arguments, named))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(seconds)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in ranks] == [0] * world
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
