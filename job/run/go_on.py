"""`speedrun run --from PARENT --run-id NEW`: a run that begins with a stored checkpoint of another and goes on longer.

The recipe is the parent's with what the command line changes. The checkpoint, the same bytes, is sealed again in the
new run's folder (job/run/adopt.py), and is from then on the run's own first one, which a stop, another node and the
bucket treat like any other. Step and row go on counting from it: the next row is the one that an unbroken run would
have read. Where it came from is in recipe.json and result.json as `from`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.errors import UsageError
from job.evaluation.core_v1 import PUBLISHED_URL
from job.evaluation.rescore import FROM_BUCKET
from job.recipe.config import FREE, Recipe, differing_keys, from_document, known_keys, resolve
from job.recipe.derive import derive
from job.run.adopt import Origin
from job.run.bucket import Bucket
from job.run.launch import run_folder
from job.store.checkpoint_folder import KIND, OPTIMIZER, files_hash, folders, key_of
from job.store.documents import read_recipe, recipe_of
from job.store.sealed import open_sealed
from job.store.stores import stored_manifest

MAY_DIFFER = (
    FREE
    | {f"train.{name}" for name in ("steps", "param_data_ratio", "total_batch_size", "val_every", "val_tokens")}
    | {f"train.{name}" for name in ("lr_scale", "matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")}
    | {f"train.{name}" for name in ("warmup_steps", "warmdown_ratio", "final_lr_frac")}
    | {"data.paths", *(key for key in known_keys() if key.startswith("eval."))}
)
"""keys that may differ from the parent's: how long, how fast it learns, how it is scored, and what any run may change;
`total_batch_size` if the batch stays what it was, and `paths` if the same text is there"""


def begin(
    parent: str, at: int | None, *, out: Path, run_id: str | None, recipe: Recipe, bucket: Bucket | None, fresh: bool
) -> tuple[Recipe, dict[str, Any], str]:
    """The recipe of run `run_id`, the `Origin` that it goes on from as a document (`at`: the checkpoint before this
    step, else the newest), and a sentence that says so; UsageError with the remedy where that cannot be.

    Nothing is written. recipe: the command line's, of which what a preset or a default gives is left out.
    """
    if run_id in (None, parent):
        raise UsageError(f"--from {parent} begins a run of its own: give it a --run-id that is not {parent}")
    assert run_id
    document = _parents_recipe(out, parent, recipe, bucket)
    recipe, of_parent = _longer(document, parent, recipe), from_document(document)
    origin = (None if fresh else _begun(out, run_id, bucket)) or _checkpoint(out, parent, at, bucket)
    if origin.run != parent or at not in (None, origin.step):
        raise UsageError(
            f"run {run_id} was begun from step {origin.step} of run {origin.run}: go on with --from {origin.run}, or"
            " take another --run-id"
        )
    before, after = derive(of_parent), derive(recipe)
    if after.steps <= origin.step:
        raise UsageError(
            f"--from {parent} goes on at step {origin.step}, and {run_id} would have {after.steps} steps: give more,"
            f" e.g. -o train.steps={2 * origin.step}"
        )
    said = f"run {run_id} goes on from step {origin.step:,} of run {parent} to step {after.steps:,}"
    schedules = (before.schedule.at(step) == after.schedule.at(step) for step in range(origin.step))
    if before.specs == after.specs and all(schedules):
        return recipe, dataclasses.asdict(origin), f"{said}, as one run of so many steps would have"
    last, first = (of.schedule.at(step).lr_mult for of, step in ((before, origin.step - 1), (after, origin.step)))
    said += (
        f", with the rows that come next; its steps so far had the schedule of {before.steps:,}, so that it is not what"
        f" one run of {after.steps:,} would be (the learning rates go from {last:.0%} of their height to {first:.0%})"
    )
    return recipe, dataclasses.asdict(origin), said


def _parents_recipe(out: Path, parent: str, asked: Recipe, bucket: Bucket | None) -> dict[str, Any]:
    """The document; of one that only the bucket has no path on this machine is followed."""
    folder = run_folder(out, parent)
    here = (folder / "recipe.json").is_file()
    if here and not (folder / FROM_BUCKET).exists():
        return recipe_of(folder)
    stored = (folder / "recipe.json").read_bytes() if here else bucket.recipe(parent) if bucket else None
    if stored is None:
        raise UsageError(
            f"no run {parent} below {folder.parent}" + (f" or in {bucket.place}" if bucket else "") + ": see `speedrun"
            " list`"
        )
    document = read_recipe(stored, f"the recipe of {parent} in the bucket")
    recipe = from_document(document)
    given = {key for key, source in asked.sources.items() if source.startswith("-")}
    if recipe.data.source == "local" and "data.paths" not in given:
        raise UsageError(f"the text of run {parent} is named in the bucket alone: say where it is with --data")
    if recipe.eval.core_bundle not in ("", PUBLISHED_URL) and "eval.core_bundle" not in given:
        raise UsageError(
            f"the CORE bundle of run {parent} is named in the bucket alone: say where it is with --core-bundle"
        )
    return document


def _longer(document: Mapping[str, Any], parent: str, asked: Recipe) -> Recipe:
    """The parent's recipe with the command line's values; UsageError for one that may not differ."""
    before = from_document(document)
    given = {key for key, source in asked.sources.items() if not source.startswith(("default", "preset"))}
    flags = {}
    for key in known_keys():
        section, _, name = key.partition(".")
        recipe = asked if key in given else before
        flags[key] = recipe.sources[key], getattr(getattr(recipe, section), name)
    recipe = resolve(before.preset, flags)
    for changed in differing_keys(before.values(), recipe.values()):
        if changed.partition(":")[0] not in MAY_DIFFER:
            raise UsageError(
                f"--from {parent} goes on with what its weights and optimizer state were made by, and {changed} cannot"
                " be: leave it out, or begin a run without --from"
            )
    old, new = (derive(of).batch_tokens for of in (before, recipe))
    if old != new:
        raise UsageError(
            f"--from {parent} counts steps of {old:,} tokens, and this recipe's have {new:,}: add -o"
            f" train.total_batch_size={old}"
        )
    return recipe


def _begun(out: Path, run_id: str, bucket: Bucket | None) -> Origin | None:
    """What the run goes on from that was begun under this name, here or in the bucket; None where there is none."""
    file = run_folder(out, run_id) / "recipe.json"
    data = file.read_bytes() if file.is_file() else bucket.recipe(run_id) if bucket else None
    if data is None:
        return None
    begun = read_recipe(data, file).get("from")
    if begun is None:
        raise UsageError(f"run {run_id} was begun without --from: take another --run-id, or --fresh to discard it")
    return Origin(**begun)


def _checkpoint(out: Path, parent: str, at: int | None, bucket: Bucket | None) -> Origin:
    """The stored checkpoint before step `at`, or the newest; UsageError naming those that can be used."""
    run = run_folder(out, parent)
    manifests = {}
    if bucket:
        there = {folder: key_of(run, int(folder.name)) for folder in bucket.checkpoints(run)}
        manifests = {folder: stored_manifest(bucket.store, key) for folder, key in there.items()}
    for folder in folders(run):
        sealed = open_sealed(folder, kind=KIND, verify=False)
        manifests[folder] = {"facts": sealed.facts, "files": sealed.files}
    found = {manifest["facts"]["step"]: manifest for manifest in manifests.values() if manifest}
    if not found:
        raise UsageError(
            f"run {parent} has no stored checkpoint to go on from: `speedrun status {parent}` says how it is finished"
        )
    usable = [step for step in sorted(found) if any(name.startswith(OPTIMIZER) for name in found[step]["files"])]
    remedy = "no stored checkpoint has it (a run with -o train.keep_optimizer=yes keeps that of its end)"
    if usable:
        remedy = f"--at {' or --at '.join(map(str, usable))} can be used"
    step = max(found) if at is None else at
    if step not in found:
        raise UsageError(f"run {parent} has no stored checkpoint before step {step}: {remedy}")
    if step not in usable:
        raise UsageError(
            f"the checkpoint before step {step} of run {parent} is its weights alone, and training goes on from an"
            f" optimizer's state: {remedy}"
        )
    return Origin(parent, step, found[step]["facts"]["rows"], files_hash(found[step]["files"]))
