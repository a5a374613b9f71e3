"""The node around the GPUs against what a run wants of it: pure functions from facts to findings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from job.machine.container import SHARED_MEMORY, SHARED_MEMORY_NEEDED, TEMPORARY_FLAG
from job.machine.finding import Finding, Verdict, refused

STOP_SECONDS = 15.0
"""that a checkpoint may take after a stop signal (job/run/processes.py)"""
SLOW_DISK = 120.0
"""seconds of one checkpoint from which on a disk is refused"""
CLOCK_WARNED, CLOCK_REFUSED = 30.0, 300.0
"""seconds; S3 refuses requests from 900 on"""
MARGIN = 1.25
"""times as long as planned: what credentials should last"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """None or empty: not looked at, or nobody says. What failed is a sentence."""

    on_gpus: bool = False
    container: bool = False
    shared_memory: int | None = None
    temporary: str = ""
    temporary_exec: bool = True
    disk: str = ""
    disk_free: float = 0.0
    disk_speed: float | None = None
    """bytes/s that were written and forced to the disk"""
    checkpoint_failed: str | None = None
    """why a small checkpoint could not be sealed, sent to the bucket, fetched and read; "" where it could"""
    bucket: str = ""
    bucket_refused: str = ""
    clock_ahead: float | None = None
    """seconds by which this machine's clock is ahead of the bucket's"""
    credentials_left: float | None = None
    """seconds; infinite where they last or are renewed"""
    wandb: str = "off"
    """"off", "offline" or "online": what the run would do"""
    wandb_asked: bool = False
    """WANDB_MODE=online"""
    wandb_failed: str = ""
    dataset: str = ""
    """the named dataset of the recipe; empty where the text is local"""
    hub_failed: str | None = None
    prepared: str = ""
    """where its prepared set is, with all rows of the run"""
    bundle: str = ""
    """as the recipe names it"""
    bundle_failed: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeWanted:
    """What a run takes of the node; bytes, seconds (None: nobody knows), processes."""

    disk: float
    checkpoint: float
    ranks: int = 1
    seconds: float | None = None


def node_findings(facts: NodeFacts, wanted: NodeWanted) -> list[Finding]:
    checks = (_disk_size, _disk_speed, _temporary, _shared_memory, _bucket, _clock, _credentials, _checkpoint_path)
    found = [finding for check in checks for finding in check(facts, wanted)]
    return [*found, *_prepared(facts), *_hub(facts), *_bundle(facts), *_wandb(facts)]


def _disk_size(facts: NodeFacts, wanted: NodeWanted) -> Iterator[Finding]:
    takes = f"the run takes up to {_gigabytes(wanted.disk)} (estimated)"
    said = f"{facts.disk_free / 1e9:.1f} GB free at {facts.disk}, {takes}"
    if facts.disk_free < wanted.disk:
        yield Finding("disk size", Verdict.REFUSED, said, "free some, choose another --out, or take a larger disk_size")
    else:
        yield Finding("disk size", Verdict.OK, said)


def _disk_speed(facts: NodeFacts, wanted: NodeWanted) -> Iterator[Finding]:
    if not facts.disk_speed:
        yield Finding("disk speed", Verdict.UNKNOWN, f"nothing could be written at {facts.disk}")
        return
    seconds = wanted.checkpoint / facts.disk_speed
    size = _gigabytes(wanted.checkpoint)
    said = f"{facts.disk_speed / 1e6:.0f} MB/s: a checkpoint of {size} GB takes {seconds:.0f} s"
    remedy = "choose an --out on the node's own NVMe, or a higher disk_tier"
    if seconds >= SLOW_DISK:
        yield Finding("disk speed", Verdict.SLOW, said, remedy)
    elif seconds >= STOP_SECONDS:
        lost = f"{said}, and a stop signal leaves {STOP_SECONDS:.0f}: the steps since the last one would be lost"
        yield Finding("disk speed", Verdict.WARNED, lost, remedy)
    else:
        yield Finding("disk speed", Verdict.OK, said)


def _gigabytes(size: float) -> str:
    """Two digits, or all before the point."""
    return f"{size / 1e9:{'.2g' if size < 10e9 else '.0f'}}"


def _temporary(facts: NodeFacts, wanted: NodeWanted) -> Iterator[Finding]:
    if facts.on_gpus and not facts.temporary_exec:
        said = f"{facts.temporary} is mounted noexec, and torch.compile loads what it has compiled from there"
        mend = f"start it with: {TEMPORARY_FLAG}" if facts.container else "set TMPDIR elsewhere"
        yield Finding("temporary files", Verdict.REFUSED, said, mend)
    else:
        yield Finding("temporary files", Verdict.OK, facts.temporary)


def _shared_memory(facts: NodeFacts, wanted: NodeWanted) -> Iterator[Finding]:
    if not facts.on_gpus or wanted.ranks == 1 or facts.shared_memory is None:
        return
    said = f"{SHARED_MEMORY} has {facts.shared_memory >> 20} MiB, and NCCL's ranks talk to each other through it"
    if facts.shared_memory >= SHARED_MEMORY_NEEDED:
        yield Finding("shared memory", Verdict.OK, f"{facts.shared_memory >> 20} MiB")
    elif facts.container:
        mend = "start the container with: docker run --ipc=host ..., or --shm-size=1g"
        yield Finding("shared memory", Verdict.REFUSED, said, mend)
    else:
        yield Finding("shared memory", Verdict.REFUSED, said, f"mount -o remount,size=1g {SHARED_MEMORY}")


def _bucket(facts: NodeFacts, wanted: NodeWanted) -> Iterator[Finding]:
    if facts.bucket_refused:
        yield refused("bucket", facts.bucket_refused)
    elif facts.bucket:
        yield Finding("bucket", Verdict.OK, f"{facts.bucket} can be written, and one of several claims wins")


def _clock(facts: NodeFacts, wanted: NodeWanted) -> Iterator[Finding]:
    if facts.clock_ahead is None:
        return
    off = abs(facts.clock_ahead)
    said = f"{off:.0f} s {'ahead of' if facts.clock_ahead > 0 else 'behind'} the bucket's"
    verdict = Verdict.REFUSED if off >= CLOCK_REFUSED else Verdict.WARNED if off >= CLOCK_WARNED else Verdict.OK
    remedy = "set it right (chronyd or systemd-timesyncd): S3 refuses what is 900 s off"
    yield Finding("clock", verdict, said, "" if verdict == Verdict.OK else remedy)


def _credentials(facts: NodeFacts, wanted: NodeWanted) -> Iterator[Finding]:
    left = facts.credentials_left
    if not facts.bucket.startswith("s3://") or facts.bucket_refused:
        return
    if left is None:
        said = "they have a session token, and nobody says when they end"
        yield Finding("credentials", Verdict.UNKNOWN, said, "AWS_CREDENTIAL_EXPIRATION would, or give a user's keys")
    elif math.isinf(left):
        yield Finding("credentials", Verdict.OK, "they last, or are renewed by themselves")
    else:
        needs = wanted.seconds
        said = f"they end in {left / 60:.0f} minutes"
        if needs:
            said += f", the run takes up to {needs / 60:.0f} (planned)"
        remedy = "give keys that last, a role of the node, or a longer session (aws sts ... --duration-seconds)"
        if needs and left < needs:
            yield Finding("credentials", Verdict.REFUSED, said, remedy)
        elif not needs or left < MARGIN * needs:
            yield Finding("credentials", Verdict.WARNED, said, remedy)
        else:
            yield Finding("credentials", Verdict.OK, said)


def _checkpoint_path(facts: NodeFacts, wanted: NodeWanted) -> Iterator[Finding]:
    to = f", in {facts.bucket} and back" if facts.bucket and not facts.bucket_refused else ""
    if facts.checkpoint_failed:
        yield refused("checkpoint path", facts.checkpoint_failed)
    elif facts.checkpoint_failed is not None:
        yield Finding("checkpoint path", Verdict.OK, f"a small one was sealed at {facts.disk}{to}, and read")


def _prepared(facts: NodeFacts) -> Iterator[Finding]:
    if not facts.dataset:
        yield Finding("prepared set", Verdict.OK, "made here, from text of this machine")
    elif facts.prepared:
        yield Finding("prepared set", Verdict.OK, f"{facts.prepared}, with all rows of the run")
    else:
        said = f"the tokenizer and the rows of {facts.dataset} are not there yet: GPUs wait while the node makes them"
        yield Finding("prepared set", Verdict.WARNED, said, "make them first, on a node without GPUs: sky/prepare.yaml")


def _hub(facts: NodeFacts) -> Iterator[Finding]:
    if not facts.dataset or facts.hub_failed is None:
        return
    if not facts.hub_failed:
        yield Finding("hub", Verdict.OK, f"gives {facts.dataset}")
    else:
        remedy = "check the network, HF_ENDPOINT and HF_TOKEN, or prepare into the bucket elsewhere (sky/prepare.yaml)"
        yield Finding("hub", _lasting(facts.hub_failed), f"does not give {facts.dataset} ({facts.hub_failed})", remedy)


def _lasting(why: str) -> Verdict:
    """A server that is away, busy or asks for patience is asked again by the run itself; anything else stays so."""
    said_by_server = why.startswith("HTTP") and (not why.startswith("HTTP 4") or why in ("HTTP 408", "HTTP 429"))
    passing = said_by_server or any(word in why for word in ("timed out", "reset", "refused"))
    return Verdict.WARNED if passing else Verdict.REFUSED


def _bundle(facts: NodeFacts) -> Iterator[Finding]:
    if not facts.bundle:
        yield Finding("CORE bundle", Verdict.OK, "none is named: the run has a smoke score")
    elif facts.bundle_failed:
        said = f"{facts.bundle} is not to be had ({facts.bundle_failed}), and without it the model is not scored"
        yield Finding("CORE bundle", _lasting(facts.bundle_failed), said, "get the file and name it with --core-bundle")
    else:
        yield Finding("CORE bundle", Verdict.OK, facts.bundle)


def _wandb(facts: NodeFacts) -> Iterator[Finding]:
    if facts.wandb_asked and facts.wandb != "online":
        said = "WANDB_MODE=online, and there is no key: the curves would stay in the run's folder"
        yield Finding("wandb", Verdict.WARNED, said, "set WANDB_API_KEY, or leave WANDB_MODE out")
    elif facts.wandb_failed:
        remedy = "check WANDB_BASE_URL and the network; `speedrun wandb-sync` sends the curves later"
        yield Finding("wandb", Verdict.WARNED, f"its server does not answer ({facts.wandb_failed})", remedy)
    else:
        yield Finding("wandb", Verdict.OK, facts.wandb)
