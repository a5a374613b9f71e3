"""What doctor says of the node around the GPUs, by tables: each sound but for one thing, with the lines it must give.

The tables are constructed, not recorded: as the kernel, S3, the hub and wandb answer.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from helpers import judged
from job.machine.finding import Finding, Verdict, refusal, refused
from job.machine.node_checks import NodeFacts, NodeWanted, node_findings

NODE = NodeFacts(
    on_gpus=True,
    container=True,
    shared_memory=16 << 30,
    temporary="/tmp",
    disk="/out",
    disk_free=400e9,
    disk_speed=1.5e9,
    checkpoint_failed="",
    bucket="s3://mine/runs",
    clock_ahead=0.2,
    credentials_left=math.inf,
    wandb="online",
    dataset="climbmix",
    prepared="in the bucket",
    bundle="eval_bundle.zip",
    bundle_failed="",
)
NEEDS = NodeWanted(disk=70e9, checkpoint=10e9, ranks=8, seconds=117 * 60)
REFUSES = (
    "--bucket s3://mine/runs cannot be used: https://s3.amazonaws.com refuses PutObject (AccessDenied): these"
    " credentials need s3:PutObject"
)
NOT_PREPARED = (
    "warned   prepared set: the tokenizer and the rows of climbmix are not there yet: GPUs wait while the node makes"
    " them; make them first, on a node without GPUs: sky/prepare.yaml"
)
NODE_TABLES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "disk too small": (
        {"disk_free": 41e9},
        ["refused  disk size: 41.0 GB free at /out, the run takes up to 70 (estimated); free some, choose another"
         " --out, or take a larger disk_size"],
    ),
    "disk very slow": (
        {"disk_speed": 70e6},
        ["slow     disk speed: 70 MB/s: a checkpoint of 10 GB takes 143 s; choose an --out on the node's own NVMe, or a"
         " higher disk_tier"],
    ),
    "disk slow": (
        {"disk_speed": 400e6},
        ["warned   disk speed: 400 MB/s: a checkpoint of 10 GB takes 25 s, and a stop signal leaves 15: the steps"
         " since the last one would be lost; choose an --out on the node's own NVMe, or a higher disk_tier"],
    ),
    "noexec": (
        {"temporary_exec": False},
        ["refused  temporary files: /tmp is mounted noexec, and torch.compile loads what it has compiled from there;"
         " start it with: docker run --tmpfs /tmp:rw,exec,size=4g ..."],
    ),
    "small shm": (
        {"shared_memory": 64 << 20},
        ["refused  shared memory: /dev/shm has 64 MiB, and NCCL's ranks talk to each other through it; start the"
         " container with: docker run --ipc=host ..., or --shm-size=1g"],
    ),
    "small shm without a container": (
        {"shared_memory": 64 << 20, "container": False},
        ["refused  shared memory: /dev/shm has 64 MiB, and NCCL's ranks talk to each other through it; mount -o"
         " remount,size=1g /dev/shm"],
    ),
    "read-only bucket": (
        {"bucket": "", "bucket_refused": REFUSES, "clock_ahead": None, "credentials_left": None},
        ["refused  bucket: --bucket s3://mine/runs cannot be used: https://s3.amazonaws.com refuses PutObject"
         " (AccessDenied); these credentials need s3:PutObject"],
    ),
    "skewed clock": (
        {"clock_ahead": -420.0},
        ["refused  clock: 420 s behind the bucket's; set it right (chronyd or systemd-timesyncd): S3 refuses what is"
         " 900 s off"],
    ),
    "clock a little off": (
        {"clock_ahead": 45.0},
        ["warned   clock: 45 s ahead of the bucket's; set it right (chronyd or systemd-timesyncd): S3 refuses what is"
         " 900 s off"],
    ),
    "keys that end in 20 minutes": (
        {"credentials_left": 1200.0},
        ["refused  credentials: they end in 20 minutes, the run takes up to 117 (planned); give keys that last, a"
         " role of the node, or a longer session (aws sts ... --duration-seconds)"],
    ),
    "keys that may just do": (
        {"credentials_left": 7200.0},
        ["warned   credentials: they end in 120 minutes, the run takes up to 117 (planned); give keys that last, a"
         " role of the node, or a longer session (aws sts ... --duration-seconds)"],
    ),
    "keys whose end nobody says": (
        {"credentials_left": None},
        ["unknown  credentials: they have a session token, and nobody says when they end; AWS_CREDENTIAL_EXPIRATION"
         " would, or give a user's keys"],
    ),
    "wandb without a key": (
        {"wandb": "offline", "wandb_asked": True},
        ["warned   wandb: WANDB_MODE=online, and there is no key: the curves would stay in the run's folder; set"
         " WANDB_API_KEY, or leave WANDB_MODE out"],
    ),
    "wandb's server away": (
        {"wandb_failed": "HTTP 503"},
        ["warned   wandb: its server does not answer (HTTP 503); check WANDB_BASE_URL and the network; `speedrun"
         " wandb-sync` sends the curves later"],
    ),
    "no prepared set": ({"prepared": "", "hub_failed": ""}, [NOT_PREPARED]),
    "no prepared set, no hub": (
        {"prepared": "", "hub_failed": "HTTP 401"},
        [NOT_PREPARED,
         "refused  hub: does not give climbmix (HTTP 401); check the network, HF_ENDPOINT and HF_TOKEN, or prepare"
         " into the bucket elsewhere (sky/prepare.yaml)"],
    ),
    "a busy hub": (
        {"prepared": "", "hub_failed": "HTTP 429"},
        [NOT_PREPARED,
         "warned   hub: does not give climbmix (HTTP 429); check the network, HF_ENDPOINT and HF_TOKEN, or prepare"
         " into the bucket elsewhere (sky/prepare.yaml)"],
    ),
    "a bundle's server away": (
        {"bundle_failed": "timed out"},
        ["warned   CORE bundle: eval_bundle.zip is not to be had (timed out), and without it the model is not scored;"
         " get the file and name it with --core-bundle"],
    ),
    "no bundle": (
        {"bundle_failed": "no such file or folder"},
        ["refused  CORE bundle: eval_bundle.zip is not to be had (no such file or folder), and without it the model"
         " is not scored; get the file and name it with --core-bundle"],
    ),
    "a checkpoint that does not come back": (
        {"checkpoint_failed": "s3://mine/runs/.probe/file is not the file that was sealed; use another store"},
        ["refused  checkpoint path: s3://mine/runs/.probe/file is not the file that was sealed; use another store"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("table", NODE_TABLES)
def test_a_table_of_the_node_gives_its_lines(table: str) -> None:
    changed, lines = NODE_TABLES[table]
    assert judged(node_findings(dataclasses.replace(NODE, **changed), NEEDS)) == lines


def test_a_sound_node() -> None:
    assert judged(node_findings(NODE, NEEDS)) == []
    assert len(node_findings(NODE, NEEDS)) == 11
    laptop = NodeFacts(temporary="/tmp", temporary_exec=False, disk="/", disk_free=1e12, disk_speed=1e9, wandb="off")
    assert judged(node_findings(laptop, NodeWanted(disk=1e9, checkpoint=1e7))) == []


# --- what stands against a machine

SLOW, REFUSED = (Finding("NVLink", verdict, "none", "take another") for verdict in (Verdict.SLOW, Verdict.REFUSED))
WARNED, UNKNOWN = (Finding("ECC", verdict, "?", "!") for verdict in (Verdict.WARNED, Verdict.UNKNOWN))


def test_slowness_can_be_accepted_and_nothing_else() -> None:
    assert str(refusal([WARNED, SLOW], accept_slow=False)) == (
        "NVLink: none; take another, or accept it with --accept-slow"
    )
    assert refusal([WARNED, UNKNOWN, SLOW], accept_slow=True) is None
    for accept_slow in (True, False):
        assert str(refusal([SLOW, REFUSED], accept_slow=accept_slow)) == "NVLink: none; take another"


def test_a_refusal_that_names_no_remedy_ends_with_what_is_wrong() -> None:
    assert str(refusal([refused("bucket", "S3 does not answer")], accept_slow=False)) == "bucket: S3 does not answer"


def test_sizes_above_two_digits_are_written_out() -> None:
    wanted = NodeWanted(disk=170e9, checkpoint=120e9)
    lines = [finding.line() for finding in node_findings(NODE, wanted)]
    assert "ok       disk size: 400.0 GB free at /out, the run takes up to 170 (estimated)" in lines
    assert any("1500 MB/s: a checkpoint of 120 GB takes 80 s" in line for line in lines)
