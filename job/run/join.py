"""A node of a run that is not the first: it reads what the first one decided, and supervises its own ranks."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from job.console import Console
from job.errors import DataError, InterruptedRun, UsageError
from job.recipe.config import Recipe
from job.reporter import Reporter
from job.run.bucket import Bucket
from job.run.compile_cache import Caches
from job.run.fruitless import GOES_ON
from job.run.launch import open_run, run_folder
from job.run.node_checkpoints import PartUploader, fetch
from job.run.node_link import SILENCE, NodeLink, other_link
from job.run.nodes import LaunchSpec, NodeContext, Nodes, same_command
from job.run.preemption import Preemption
from job.run.processes import GRACE
from job.run.supervise import Interrupts, supervise
from job.store.fence import claim_key, newest_claimed, read_claim


def join(
    out: Path, run_id: str, recipe: Recipe, *, fresh: bool, console: Console, nodes: Nodes, bucket: Bucket | None = None
) -> None:
    """Take part in the run until the first node ends it, and end as it does."""
    node = NodeContext(out, run_folder(out, run_id), nodes, recipe.train.threads, bucket.store if bucket else None)
    with Interrupts() as interrupts, Preemption(interrupts).watched(), other_link(nodes, interrupts, console) as link:
        link.call()
        attempt, shares = current_attempt(node, link, same_command(recipe, nodes))
        if not shares:
            open_run(out, run_id, recipe, fresh=fresh, ranks=nodes.world_size)
        link.say(joined=attempt, shares=shares)
        reporter, launched = NodeReporter(link), ""
        while spec := announced(node, link, attempt, launched):
            launched = spec.stage
            if spec.stage != "prepare" and not shares and spec.prepared != reporter.prepared:
                raise DataError(
                    f"this node prepared other rows ({reporter.prepared or 'none'}) than the first one"
                    f" ({spec.prepared}): give all nodes the same text"
                )
            if spec.split and spec.resume is not None:
                fetch(node.documents, node.run, spec.resume)
            link.say(ready=launched)
            _run_ranks(spec, node, recipe, link, reporter, console, interrupts)
            link.say(done=launched)


def announced(node: NodeContext, link: NodeLink, attempt: int, after: str) -> LaunchSpec | None:
    """What the first node decided for the next stage `after` that one; None when the run has ended."""
    link.wait("the run ended", lambda record: record.get("end") or record.get("launched", after) != after)
    if link.records[0].get("end"):
        return None
    stage = str(link.records[0]["launched"])
    spec = LaunchSpec.read(node, attempt, stage)
    if spec is None:
        raise InterruptedRun(
            f"{link.nodes.name(0)} announced {stage}, which {node.documents.url} does not know; {GOES_ON}"
        )
    return spec


def current_attempt(node: NodeContext, link: NodeLink, same: str) -> tuple[int, bool]:
    """The attempt that the first node announces, when the store confirms it, and whether its --out is this node's.

    UsageError when this node was started differently, InterruptedRun when what is announced is not the newest claim.
    """
    number, claim, until = 0, None, time.monotonic() + SILENCE
    while not claim:
        hint = link.records[0].get("attempt")
        number = hint if isinstance(hint, int) else 0
        claim = node.documents.get(claim_key(node.run.name, number))
        if claim is None and node.store is None:
            raise UsageError(
                "each node has an --out of its own, so checkpoints need a place where their parts come together: give"
                " --bucket, or an --out that all nodes share"
            )
        if claim and (newest := newest_claimed(node.documents, node.run.name)) > number:
            raise InterruptedRun(
                f"{link.nodes.name(0)} is still at attempt {number}, and attempt {newest} took over; the same command"
                " on all nodes tries again"
            )
        if not claim and time.monotonic() > until:
            raise InterruptedRun(
                f"{link.nodes.name(0)} announced attempt {number}, which {node.documents.url} does not know; the same"
                " command on all nodes tries again"
            )
        link.wait("the first node answered", lambda record: True)
        time.sleep(0.0 if claim else 0.2)
    told = read_claim(claim).get("same")
    if told != same:
        name = link.nodes.name(link.nodes.number)
        raise UsageError(f"{name} was started with another command than the first node: {same}, not {told}")
    local = node.run / "attempts" / str(number)
    return number, local.is_file() and local.read_bytes() == claim


def _run_ranks(
    spec: LaunchSpec,
    node: NodeContext,
    recipe: Recipe,
    link: NodeLink,
    reporter: NodeReporter,
    console: Console,
    interrupts: Interrupts,
) -> None:
    caches = Caches(spec.stage, node, recipe, console, reporter)
    parts = None
    if spec.stage == "pretrain" and spec.split:
        parts = PartUploader(node.run, spec.attempt, node.fenced(spec.attempt))

    def meanwhile() -> None:
        link.check(GRACE)
        if parts:
            parts.check()

    try:
        with parts or contextlib.nullcontext():
            ranks = caches.node.start(spec)
            console.say(f"{spec.stage}: {len(ranks)} of its processes start here")
            supervise(
                spec.stage,
                ranks,
                reporter=caches,
                console=console,
                interrupts=interrupts,
                meanwhile=meanwhile,
                silence=recipe.train.silence_seconds,
                alone=False,
            )
    finally:
        caches.end(interrupted=interrupts.count > 0)


class NodeReporter(Reporter):
    """Keeps of this node's reports what the first one cannot know: the id of its prepared rows, and warnings."""

    def __init__(self, link: NodeLink) -> None:
        self._link, self.prepared = link, ""
        self._warnings: list[str] = []

    def emit(self, kind: str, **fields: Any) -> None:
        if kind == "prepare.done":
            self.prepared = fields["id"]
        if kind == "warning":
            self._warnings.append(f"node {self._link.nodes.number}: {fields['text']}")
            self._link.say(warnings=self._warnings)
