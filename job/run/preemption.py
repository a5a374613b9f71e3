"""Clouds announce that they take a spot machine back: AWS two minutes ahead, Google 30 s, in a service that every
machine of theirs has. `Preemption` asks it every few seconds; an announcement is a signal (job/run/supervise.py)."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping

from job.run.supervise import Interrupts

POLL = 5.0
"""seconds between two questions to the cloud"""
AWS, GOOGLE = "http://169.254.169.254", "metadata.google.internal"
NOTICE = {"AWS": 120.0, "Google": 30.0}
"""seconds from the announcement until the machine is gone, as the clouds document them"""


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
