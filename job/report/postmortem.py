"""postmortem.json: after an attempt that failed, what it was at, what is safe where, and how to go on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from job.errors import MEANING, ExitCode
from job.report.receipt import receipt
from job.store.attempt import fold, read_events
from job.store.checkpoint_folder import folders
from job.store.fence import run_key
from job.store.sealed import atomic_write

NAME = "postmortem.json"


def write_postmortem(run: Path, attempt: int, argv: Sequence[str], store_url: str | None) -> None:
    """Write it from the events of all attempts, of which the last one says how `attempt` ended."""
    atomic_write(run / NAME, json.dumps(postmortem(run, attempt, argv, store_url), indent=1).encode())


def postmortem(run: Path, attempt: int, argv: Sequence[str], store_url: str | None) -> dict[str, Any]:
    """argv: the words of the command after `speedrun`. store_url: of the bucket, None where there is none.

    {"attempt", "exit_code", "meaning", "reason", "stage", "step": the last one whose loss is known, "died": as the
    event has it, "node_s": seconds over all attempts, "usd": of all, None while no price is known, "safe", "command"}
    """
    record = fold(run)
    life = record.attempts[-1]
    stages = [span.stage for span in record.stages if span.attempt == attempt]
    events = [event for event in read_events(run) if event["kind"] in ("attempt.ended", "upload.done")]
    uploaded = {event["folder"] for event in events if event["kind"] == "upload.done"}
    bill = receipt(run)
    code = ExitCode(life.exit_code if life.exit_code is not None else ExitCode.BUG)
    return {
        "schema": 1,
        "run_id": run.name,
        "attempt": attempt,
        "exit_code": int(code),
        "meaning": MEANING[code],
        "reason": life.reason,
        "stage": stages[-1] if stages else None,
        "step": max(record.steps, default=None),
        "died": events[-1].get("died") if events else None,
        "node_s": round(record.node_seconds, 3),
        "usd": bill and bill["usd"],
        "safe": {
            "checkpoint": _newest_checkpoint(run, record.checkpoints, uploaded, store_url),
            "prepared": record.prepared.get("id"),
            "tasks": sorted(record.tasks),
            "bucket": f"{store_url}/{run_key(run.name)}" if store_url else None,
        },
        "command": shlex.join(["speedrun", *(word for word in argv if word != "--fresh")]),
    }


def _newest_checkpoint(
    run: Path, sealed: dict[int, dict[str, Any]], uploaded: set[str], store_url: str | None
) -> dict[str, Any] | None:
    """The newest one that is on this disk or is known to be in the bucket."""
    here = {int(folder.name): str(folder) for folder in folders(run)}
    for rows, event in sorted(sealed.items(), reverse=True):
        key = f"{run_key(run.name)}/checkpoints/{event['folder']}"
        there = f"{store_url}/{key}" if store_url and key in uploaded else None
        if rows in here or there:
            return {"step": event["step"], "rows": rows, "disk": here.get(rows), "bucket": there}
    return None
