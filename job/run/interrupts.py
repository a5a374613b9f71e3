"""What asks a run to stop: SIGINT, SIGTERM, SIGHUP, and a cloud that takes a spot machine back.

How much time there is, nobody says with a signal: `docker stop` gives 10 s, Kubernetes and Slurm 30 s unless told
otherwise. SPEEDRUN_STOP_SECONDS says it, 120 where it is not set: what a stop needs is mostly less, and a kill in the
middle of it costs no more than one that was not waited for. AWS announces two minutes ahead that it takes a spot
machine back, Google 30 s, in a service that every machine of theirs has; `Preemption` asks it every few seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping

from job.errors import InterruptedRun, UsageError
from job.run.fruitless import GOES_ON

STOP_SECONDS = 120.0
POLL = 5.0
"""seconds between two questions to the cloud"""
AWS, GOOGLE = "http://169.254.169.254", "metadata.google.internal"
NOTICE = {"AWS": 120.0, "Google": 30.0}
"""seconds from the announcement until the machine is gone, as the clouds document them"""


def stop_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds that a signal gives; UsageError unless SPEEDRUN_STOP_SECONDS is a positive number."""
    text = environment.get("SPEEDRUN_STOP_SECONDS", "")
    with contextlib.suppress(ValueError):
        if not text or float(text) > 0:
            return float(text or STOP_SECONDS)
    raise UsageError(f"SPEEDRUN_STOP_SECONDS={text} cannot be used: give a positive number of seconds")


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ignore_signals() -> None:
    """When all is sealed: what comes now stops nothing."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Interrupts:
    """Counts SIGINT, SIGTERM and SIGHUP while it is in force.

    One wish is one signal: that every node of a run gets it, or that `timeout` and a shell pass it on to the process
    and again to its group, makes it no second one, which would end the run at once.
    """

    TOGETHER = 0.3
    """seconds within which two signals are one"""

    def __init__(self) -> None:
        self.name = ""
        self._last = float("-inf")
        self.count = 0
        self.seconds = stop_seconds()
        """that there are until the machine or the process is gone"""

    def __enter__(self) -> Interrupts:
        handled = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]  # as nohup wants
        self._previous = {s: signal.signal(s, self._note) for s in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self, stage: str) -> None:
        """Between stages: InterruptedRun when a signal has come."""
        if self.count:
            raise InterruptedRun(f"{self.name} came before {stage}; {GOES_ON}")

    def announce(self, name: str, seconds: float) -> None:
        """As a first signal: the machine goes away in `seconds`."""
        if not self.count:
            self.name, self.seconds, self.count = name, min(self.seconds, seconds), 1

    def _note(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if now - self._last > self.TOGETHER:
            self.count += 1
        self._last = now
        self.name = signal.Signals(number).name


class Preemption:
    """Asks the cloud whether this machine is about to be taken back; where SkyPilot started it, or an address is set.

    The addresses can be set as the clouds' own tools have it: AWS_EC2_METADATA_SERVICE_ENDPOINT, GCE_METADATA_HOST.
    """

    def __init__(self, interrupts: Interrupts, environment: Mapping[str, str] = os.environ) -> None:
        self._interrupts = interrupts
        self._aws = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", AWS).rstrip("/")
        self._google = "http://" + environment.get("GCE_METADATA_HOST", GOOGLE)
        names = ("SKYPILOT_TASK_ID", "AWS_EC2_METADATA_SERVICE_ENDPOINT", "GCE_METADATA_HOST")
        self._asks = any(environment.get(name) for name in names)
        self._ended = threading.Event()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While the body runs, an announcement is a signal."""
        if self._asks:
            threading.Thread(target=self._watch, daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()

    def _watch(self) -> None:
        clouds = {"AWS": self._aws_takes_it, "Google": self._google_takes_it}
        here = {name: asks for name, asks in clouds.items() if asks() is not None}
        while here and not self._ended.wait(POLL):
            for name, asks in here.items():
                if asks():
                    self._interrupts.announce(f"{name}'s announcement that it takes this machine back", NOTICE[name])
                    return

    def _aws_takes_it(self) -> bool | None:
        """Whether an interruption is set for this instance; None where AWS does not answer.

        https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
        """
        token = _ask(f"{self._aws}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "300"}, "PUT")
        if not token:
            return None
        said = _ask(f"{self._aws}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
        with contextlib.suppress(ValueError, AttributeError):
            return json.loads(said or "{}").get("action") in ("terminate", "stop", "hibernate")
        return False

    def _google_takes_it(self) -> bool | None:
        """https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption"""
        said = _ask(f"{self._google}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        return None if said is None else said.strip() == "TRUE"


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """The answer's text, "" where it says that there is none (404), None where nobody answers."""
    request = urllib.request.Request(url, headers=headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a link-local address is behind no proxy
    try:
        with opener.open(request, timeout=2.0) as answer:
            return answer.read(4096).decode(errors="replace")
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError):
        return None
