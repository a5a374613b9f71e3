"""Clouds announce that they take a spot machine back: AWS two minutes ahead, Google 30 s, in a service that every
machine of theirs has. `Preemption` asks it every few seconds; an announcement is a signal (job/run/supervise.py)."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping

from job.machine import cloud
from job.run.supervise import Interrupts

POLL = 5.0
"""seconds between two questions to the cloud"""
NOTICE = {"AWS": 120.0, "Google": 30.0}
"""seconds from the announcement until the machine is gone, as the clouds document them"""


class Preemption:
    """Asks the cloud whether this machine is about to be taken back; where SkyPilot started it, or an address is set
    (job/machine/cloud.py)."""

    def __init__(self, interrupts: Interrupts, environment: Mapping[str, str] = os.environ) -> None:
        self._interrupts, self._environment = interrupts, environment
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
        said = cloud.aws("spot/instance-action", self._environment)
        if said is None:
            return None
        with contextlib.suppress(ValueError, AttributeError):
            return json.loads(said or "{}").get("action") in ("terminate", "stop", "hibernate")
        return False

    def _google_takes_it(self) -> bool | None:
        """https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption"""
        said = cloud.google("preempted", self._environment)
        return None if said is None else said == "TRUE"
