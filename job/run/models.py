"""Which model a command means: a run's, here or in a bucket, or that of a folder."""

from __future__ import annotations

import re
from pathlib import Path

from job.errors import UsageError
from job.recipe.config import from_document
from job.recipe.derive import derive
from job.run.bucket import Bucket
from job.run.launch import existing_run
from job.store.checkpoint_folder import KIND, final_checkpoint, folders
from job.store.documents import recipe_of
from job.store.fence import run_key
from job.store.sealed import is_sealed, open_sealed
from job.store.stores import pull_sealed

ADDRESS = re.compile(r"(s3://.+)/runs/([^/]+)(?:/(export|checkpoints/\d+))?/?")


def find_model(out: Path, run_id: str | None, model: str | None, bucket: Bucket | None) -> Path:
    """The folder on this disk, pulled where it is not: of a run the newest checkpoint, of anything else itself."""
    if (run_id is None) == (model is None):
        raise UsageError("say which model: --run-id ID for a run's, or --model with a folder or an s3:// address")
    if run_id is not None:
        return _of_run(existing_run(out, run_id, bucket), bucket)
    assert model is not None
    if not model.startswith("s3://"):
        folder = Path(model)
        return _of_run(folder, None) if (folder / "recipe.json").is_file() else folder
    if not (parts := ADDRESS.fullmatch(model)):
        raise UsageError(f"--model {model} names no model: write s3://bucket/prefix/runs/ID, perhaps with /export")
    bucket = Bucket.at(parts[1])
    run = existing_run(out, parts[2], bucket)
    if parts[3] != "export":
        return _of_run(run, bucket, int(Path(parts[3]).name) if parts[3] else None)
    if not is_sealed(run / "export"):
        pull_sealed(bucket.store, f"{run_key(run.name)}/export", run / "export", kind="export")
    return run / "export"


def _of_run(run: Path, bucket: Bucket | None, rows: int | None = None) -> Path:
    """Its newest checkpoint (or that of `rows`), with the tokenizer where a bucket has it."""
    here, there = folders(run), bucket.checkpoints(run) if bucket else []
    wanted = [folder for folder in {*here, *there} if rows in (None, int(folder.name))]
    if not wanted:
        return final_checkpoint(run, derive(from_document(recipe_of(run))).rows).path
    newest = max(wanted, key=lambda folder: int(folder.name))
    if bucket and newest not in here:
        bucket.pull_checkpoint(run, newest)
    prepared = open_sealed(newest, kind=KIND, verify=False).made_from["prepared"]
    tokenizer = run.parent.parent / "prepared" / prepared / "tokenizer"
    if bucket and not is_sealed(tokenizer):
        pull_sealed(bucket.store, f"prepared/{prepared}/tokenizer", tokenizer, kind="tokenizer")
    if bucket:
        bucket.pull_results(run)
    return newest
