"""What a cloud says of the machine that it rented out: whose it is, spot or on demand, since when it is up.

SkyPilot names cloud and region in a variable of the task; the cloud itself answers to its machines at an address that
every one of them has. The addresses can be set as the clouds' own tools have it: AWS_EC2_METADATA_SERVICE_ENDPOINT,
GCE_METADATA_HOST.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

AWS, GOOGLE = "http://169.254.169.254", "metadata.google.internal"
CLUSTER = "SKYPILOT_CLUSTER_INFO"


@dataclasses.dataclass(frozen=True)
class Rental:
    """Cloud and region as SkyPilot spells them in a file, in small letters; `spot` None where nobody says it."""

    cloud: str
    region: str
    spot: bool | None


def rental(environment: Mapping[str, str] = os.environ) -> Rental | None:
    """Where SkyPilot has rented this machine; None on one that it has not."""
    try:
        said = json.loads(environment.get(CLUSTER, ""))
        cloud, region = str(said["cloud"]).lower(), str(said.get("region") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    spot = None
    if cloud == "aws":
        spot = {"spot": True, "on-demand": False}.get(aws("instance-life-cycle", environment) or "")
    elif cloud == "gcp":
        spot = {"TRUE": True, "FALSE": False}.get(google("scheduling/preemptible", environment) or "")
    elif cloud == "lambda":  # it has no other
        spot = False
    return Rental(cloud, region, spot)


def aws(path: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """AWS's answer about this instance, "" where it has none, None where AWS does not answer.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-categories.html
    """
    address = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", AWS).rstrip("/")
    token = _ask(f"{address}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "300"}, "PUT")
    return _ask(f"{address}/latest/meta-data/{path}", {"X-aws-ec2-metadata-token": token}) if token else None


def google(path: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Google's answer about this instance, "" where it has none, None where Google does not answer.

    https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys
    """
    address = "http://" + environment.get("GCE_METADATA_HOST", GOOGLE)
    said = _ask(f"{address}/computeMetadata/v1/instance/{path}", {"Metadata-Flavor": "Google"})
    return None if said is None else said.strip()


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """The answer's text, "" where it says that there is none (404), None where nobody answers."""
    request = urllib.request.Request(url, headers=headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a link-local address is behind no proxy
    try:
        with opener.open(request, timeout=2.0) as answer:
            return answer.read(4096).decode(errors="replace")
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError, http.client.HTTPException):
        return None


def boot(proc: Path = Path("/proc")) -> dict[str, Any] | None:
    """The machine's boot, also from inside a container: {"id", "up_s": seconds since}; None where nobody says it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        up = float((proc / "uptime").read_text().split()[0])
        return {"id": (proc / "sys/kernel/random/boot_id").read_text().strip(), "up_s": up}
    return None
