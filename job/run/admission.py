"""Whether this machine is to do what was asked: all that is checked before a run has its folder."""

from __future__ import annotations

from pathlib import Path

from job.console import Console
from job.errors import UsageError
from job.machine.finding import refusal
from job.machine.host import gpu_count
from job.plan.cap import Cap, Quote
from job.plan.measured import RUN_ID
from job.recipe.config import Recipe
from job.run import examination, preflight
from job.run.bucket import Bucket
from job.run.nodes import Nodes


def check_machine(
    recipe: Recipe,
    out: Path,
    run_id: str,
    notes: list[str],
    *,
    nodes: Nodes,
    bucket: Bucket | None,
    cap: Cap,
    console: Console,
    strict: bool,
    allow_fa2: bool,
    accept_slow: bool,
) -> Quote | None:
    """The quote, where something bounds the run or its price is known; what is to be said first is added to `notes`.

    On GPUs every check's finding is said. UsageError or PreflightError for what stands against this machine.
    """
    if gpu_count() and run_id != RUN_ID:  # which has had its doctor
        if strict and bucket is None:
            raise UsageError(
                "--strict is for machines that go away, and what is on this one would go with it: give --bucket"
                " s3://bucket/prefix"
            )
        price = cap.price.hour / nodes.count if cap.price else None
        store = bucket.store if bucket else None
        findings = examination.examine(recipe, out, store, ranks=nodes.ranks, price=price)
        for finding in findings:
            console.say(finding.line())
        if refused := refusal(findings, accept_slow=accept_slow or not strict):
            raise refused
    machine = preflight.this_machine()
    notes += preflight.check(recipe, nodes.ranks, strict=strict, allow_fa2=allow_fa2, machine=machine)
    if strict and bucket and nodes.ranks > 1 and run_id != RUN_ID:
        notes += preflight.about_try8(bucket.store, machine)
    quote = Quote.of(recipe, machine, nodes.count) if cap.price or cap.hours else None
    notes += [cap.sentence(quote)] if quote else []
    return quote
