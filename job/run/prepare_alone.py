"""The prepare stage by itself: what it seals is shared by runs with the same data."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from job.console import Console
from job.recipe.config import Recipe
from job.reporter import Reporter
from job.run.bucket import Bucket
from job.run.fruitless import RankDied, without_attempts
from job.run.launch import recipe_document
from job.run.processes import start_ranks
from job.run.supervise import Interrupts, supervise
from job.run.uploader_client import AnnouncingReporter, uploading
from job.store.sealed import atomic_write


def prepare_alone(out: Path, recipe: Recipe, *, console: Console, bucket: Bucket | None = None) -> None:
    """The prepare stage without a run, after `check_text`: what it seals is shared by runs with the same data, through
    the bucket too."""
    with (
        tempfile.TemporaryDirectory(prefix="speedrun-") as scratch,
        Interrupts() as interrupts,
        uploading(bucket, out, None, None, 0, console, interrupts, logs=Path(scratch)) as uploads,
    ):
        uploads.start()
        if bucket:
            console.say(f"mirroring what is prepared to {bucket.place}")
        recipe_file = Path(scratch) / "recipe.json"
        atomic_write(recipe_file, json.dumps(recipe_document(recipe, "prepare")).encode())
        ranks = start_ranks(
            ["prepare", str(out), str(recipe_file), ""], world_size=1, threads=0, logs=Path(scratch), label="prepare"
        )
        said = AnnouncingReporter(PrintingReporter(console), uploads)
        try:
            supervise("prepare", ranks, reporter=said, console=console, interrupts=interrupts, meanwhile=uploads.check)
        except BaseException as error:
            uploads.flush(after=error)
            if isinstance(error, RankDied):
                raise without_attempts(error) from None
            raise
        uploads.flush()


class PrintingReporter(Reporter):
    """A reporter without a record: says where the prepared set is."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def emit(self, kind: str, **fields: Any) -> None:
        if kind == "prepare.done":
            read = ", ".join(f"{count} {suffix}" for suffix, count in sorted(fields.get("read", {}).items()))
            rows = f"{fields['train_rows']:,} rows to train on, {fields['val_rows']:,} held out"
            self._console.say(f"prepared {fields['id']}: {rows}" + (f" (files read: {read})" if read else ""))
