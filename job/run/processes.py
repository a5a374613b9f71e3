"""The processes of a stage: how the supervisor sees a rank, and how ranks of this machine are started, spoken to and
ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from job.machine.host import usable_cores
from job.reporter import EVENTS_FD, Doing

GRACE = 15.0
"""seconds that ranks have to stop between two steps and seal a checkpoint (the table allows 20 in all)"""

KILL_SECONDS = 20.0
"""that a killed process has to be gone: one that waits for a broken device or disk may never be"""

RANK_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""What ranks are given unless the user's environment says otherwise. Threads that wait for each other sleep instead of
spinning: on cores that others use too, spinning is 4 to 8 times slower. glibc keeps freed activations instead of
returning them to the kernel page by page: a step's page faults cost 15 to 30 % of it. Both measured in LOG.md. On a
GPU, segments that grow leave no holes between activations of changing sizes: what the plan says fits must not fail by
fragmentation."""

PACKAGES = str(Path(__file__).parents[2])
"""the folder of this package and of `model`"""

LOG_TAIL = 30
"""lines of a rank's log that a failure shows"""


SECRET = re.compile(
    r"(^|_)(KEYS?|KEY_ID|TOKENS?|SECRETS?|PASSWORD|PASSWD|CREDENTIALS?|NETRC)$"
    r"|^AWS_|^SPEEDRUN_(CORE_ADDRESS|NODES_SECRET)$|^SKYPILOT_TASK_ID$"
)
"""variables by whose names something secret can be expected"""
NEEDED = {
    "prepare": re.compile(r"AWS_|HF_|HUGGING_FACE|SPEEDRUN_CORE_ADDRESS"),
    "background": re.compile(r"AWS_|HF_|HUGGING_FACE|SPEEDRUN_CORE_ADDRESS"),
    "evaluate": re.compile(r"SPEEDRUN_CORE_ADDRESS"),
    "evaluate_hf": re.compile(r"SPEEDRUN_CORE_ADDRESS"),
    "uploader": re.compile(r"AWS_"),
    "wandb": re.compile(r"WANDB_|NETRC"),
}
"""which of them a child is given; those that are not named here get none"""


def environment_for(child: str, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with no secret but what `child`, a stage of ranks or another process of ours, works with."""
    needed = NEEDED.get(child)
    return {
        name: value for name, value in environment.items() if not SECRET.search(name) or (needed and needed.match(name))
    }


def python_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a child that is Python: it finds this package wherever it is started, and nothing in the folder
    where it is.

    `python -m` puts the working folder before everything else, and so does an empty entry of PYTHONPATH: a user's
    secrets.py or model.py there would run inside the ranks, in the place of Python's or ours.
    """
    entries = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    return {**environment, "PYTHONPATH": os.pathsep.join([PACKAGES, *entries]), "PYTHONSAFEPATH": "1"}


class LocalRank:
    """A child process, Python given `program` and `arguments`, in a session of its own: its pipes, its log, and what it
    last said."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        environment: Mapping[str, str],
        log: Path,
        program: Sequence[str] = ("-m", "job.run.rank"),
        folder: Path | None = None,
    ) -> None:
        read_end, write_end = os.pipe()
        self.name, self.log = name, str(log)
        """the name as a sentence has it: "rank 3", "rank 3 on node 1" """
        self.error: tuple[int, str] | None = None
        self.failed = float("inf")
        """when it said so"""
        self.broken: tuple[str, str, bool] | None = None
        """what it says has died, of what, and whether that is a device"""
        self.apart = False
        """whether it does not wait for the others of its stage, nor they for what it is at"""
        self.may_be_left = False
        """whether the stage is over though it still runs"""
        self.steps_to_stop: int | None = None
        """from the stop signal to the step before which all ranks stop; None until training has begun"""
        self.step_seconds = 0.0
        """of the last step that it told of"""
        self.closed = False
        self.heard = time.monotonic()
        """when it last said anything, be it an answer"""
        self.progressed = self.heard
        self.doing = Doing()
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**python_environment(environment), EVENTS_FD: str(write_end)},
                pass_fds=[write_end],
                start_new_session=True,
            )
        os.close(write_end)
        os.set_blocking(read_end, False)
        self.pipe = read_end
        self._buffer = b""

    def messages(self) -> Iterator[dict[str, Any]]:
        """What has arrived; EOFError when the process closed its end, BlockingIOError when there is nothing."""
        data = os.read(self.pipe, 1 << 16)
        if not data:
            self.closed = True
            raise EOFError
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.heard = time.monotonic()
            if message.get("doing") != list(self.doing):
                self.progressed = self.heard
            if "doing" in message:
                self.doing = Doing(*message["doing"])
            else:
                yield message

    def tell(self, message: dict[str, Any]) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write((json.dumps(message) + "\n").encode())
            self.process.stdin.flush()

    def hang_up(self) -> None:
        """Nothing more will be told."""
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def signal(self, number: int) -> None:
        """Send a signal to the process and its children; nothing where it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End it, and wait for that while the kernel may still be at work for it, but not for ever."""
        self.signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_SECONDS)

    def is_stopped(self) -> bool:
        """Whether it was stopped by a signal, where /proc says so."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        return False

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self.process.poll()

    def ended(self) -> int | None:
        """The exit code; None when the process closed its pipe and still runs after GRACE seconds, or has a failed
        peer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=GRACE if self.closed else 0)
        return None

    def tail(self) -> str:
        """The end of its log."""
        return "\n".join(Path(self.log).read_text(errors="replace").splitlines()[-LOG_TAIL:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def start_ranks(
    arguments: list[str],
    *,
    world_size: int,
    threads: int,
    logs: Path,
    label: str,
    here: range | None = None,
    node: int | None = None,
    master: tuple[str, int] | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[LocalRank]:
    """Start those of `world_size` ranks that are `here`: all, unless several nodes share them and this is number `node`
    of them.

    They meet at `master`, an address and a port of the first node. `threads` CPU threads each (0: the cores, divided).
    `environment` is given to them whatever this process's own says.
    """
    here = range(world_size) if here is None else here
    address, port = master or ("127.0.0.1", free_port())
    shared = (
        RANK_ENVIRONMENT
        | environment_for(arguments[0], os.environ)
        | dict(environment)
        | {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(threads or max(1, usable_cores() // len(here))),
            "PYTHONUNBUFFERED": "1",
        }
    )
    where = "" if node is None else f" on node {node}"
    log = label if node is None else f"{label}.node{node}"
    return [
        LocalRank(
            f"rank {rank}{where}",
            arguments,
            shared | {"RANK": str(rank), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(len(here))},
            logs / f"{log}.rank{rank}.log",
        )
        for local, rank in enumerate(here)
    ]
