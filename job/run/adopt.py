"""A run that goes on from another's checkpoint (job/run/go_on.py): that checkpoint becomes the run's own first one."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.console import Console
from job.errors import DataError
from job.run.bucket import Bucket
from job.store.attempt import Attempt
from job.store.checkpoint_folder import KIND, files_hash, folder_of, folders, key_of
from job.store.documents import recipe_of
from job.store.sealed import is_sealed, open_sealed, seal_written
from job.store.stores import pull_sealed


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint that a run goes on from."""

    run: str
    step: int
    rows: int
    sha256: str
    """of its weights, as the parent's result.json has it"""


def adopt(run: Path, belongs_to: Mapping[str, Any], attempt: Attempt, console: Console, bucket: Bucket | None) -> None:
    """Where a run goes on from another's checkpoint and has none of its own, here or in the bucket: seal that one.

    DataError where it is gone, is another one, or was trained on other rows.
    """
    begun = recipe_of(run).get("from")
    if begun is None or folders(run) or (bucket and bucket.checkpoints(run)):
        return
    origin = Origin(**begun)
    parent = run.parent / origin.run
    folder, own = folder_of(parent, origin.rows), folder_of(run, origin.rows)
    written = own.with_name(f".{own.name}.tmp-from")
    shutil.rmtree(written, ignore_errors=True)
    if is_sealed(folder):
        sealed = open_sealed(folder, kind=KIND)
        written.mkdir(parents=True)
        for name in sealed.files:
            _link(folder / name, written / name)
    elif bucket:
        sealed = pull_sealed(bucket.store, key_of(parent, origin.rows), written, kind=KIND)
    else:
        raise DataError(
            f"the checkpoint that run {run.name} goes on from is gone ({folder}): put it back, or give the --bucket"
            " that has it"
        )
    if files_hash(sealed.files) != origin.sha256:
        raise DataError(f"{folder} is not the checkpoint that run {run.name} was begun from: take another --run-id")
    if sealed.made_from.get("prepared") != belongs_to["prepared"]:
        raise DataError(
            f"run {origin.run} was trained on other rows than this text gives: give its text with --data, or begin a"
            " run without --from"
        )
    made_from = {**belongs_to, "rows": origin.rows, "from": begun}
    seal_written(written, own, kind=KIND, made_from=made_from, facts=sealed.facts, files=sealed.files)
    attempt.emit("checkpoint.adopted", step=origin.step, rows=origin.rows, folder=own.name, run=origin.run)
    console.say(f"going on from the checkpoint before step {origin.step:,} of run {origin.run}")


def _link(source: Path, target: Path) -> None:
    """The same file, which nobody writes any more, or a copy on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
