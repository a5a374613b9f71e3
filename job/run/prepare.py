"""The prepare stage: tokenizer, training rows, held-out rows, the smoke bundle and the evaluation's items, each sealed.

Needs no torch and no GPU: what a machine with GPUs would wait for is done before one is needed.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from job.data import prepare as data
from job.data.lock import alone
from job.data.prepare import Prepared
from job.errors import DataError
from job.evaluation.fetch import SMOKE_BUNDLE, eval_bundle
from job.evaluation.items import items_folder, seal_items
from job.evaluation.leaks import seal_leaks
from job.evaluation.smoke_bundle import write_smoke_bundle
from job.machine import host
from job.recipe.config import Recipe
from job.reporter import Reporter
from job.store import store_of_environment
from job.store.artifact_cache import AT_ONCE, ArtifactCache
from job.store.checkpoint_folder import final_checkpoint, folder_of
from job.store.damaged import verify_once
from job.store.sealed import content_id, is_content_id, is_sealed, open_sealed, sealing
from job.store.stores import Store, pull_sealed
from job.train.context import RankContext


def main(context: RankContext) -> None:
    """The prepare stage, in one process that starts its own packers."""
    recipe, asked = context.recipe(), bool(context.asked)
    if asked:
        prepared = rows_of_the_model(context)
    else:
        trains = context.run is not None and not is_sealed(folder_of(context.run, context.rows_of_the_run()))
        prepared = prepare_rows(context, whole=not trains)
    seal_smoke_bundle(prepared, recipe.data.seed)
    seal_eval_items(context.out, recipe, prepared, context.reporter)
    if prepared.is_whole and not asked:
        count_leaks(context.out, recipe, prepared, context.reporter, from_text=context.run is None)


def rows_of_the_model(context: RankContext) -> Prepared:
    """What the finished model was trained on, as the store has it."""
    store = store_of_environment()
    assert context.run and store
    made_from = final_checkpoint(context.run, context.rows_of_the_run(), verify=False).made_from
    if not is_content_id(made_from.get("prepared")):
        raise DataError(f"the finished model of run {context.run.name} does not say what rows it was trained on")
    return pull(context.out / "prepared" / made_from["prepared"], store, context.reporter)


def pull(root: Path, store: Store, reporter: Reporter) -> Prepared:
    """The prepared set `root`, of which `store` gives what is not here. Nothing is made, and no text is opened: the
    recipe beside a model in a bucket may be anybody's. DataError where a part of the set is nowhere."""

    def take(name: str, kind: str) -> None:
        if not is_sealed(root / name):
            pull_sealed(store, f"prepared/{root.name}/{name}", root / name, kind=kind)
        made_from = open_sealed(root / name, kind=kind, verify=False).made_from
        belongs = (made_from.get("prepared", root.name), made_from.get("part", name)) == (root.name, name)
        if not belongs or (name == "set" and content_id(kind, made_from) != root.name):
            raise DataError(f"{root / name} belongs elsewhere; delete {root}, here and in the bucket, and run again")

    with alone(root, reporter):
        verify_once(root, reporter)
        for name, kind in (("set", "prepared"), ("tokenizer", "tokenizer"), ("val", "val")):
            take(name, kind)
        files = open_sealed(root / "set", kind="prepared").facts["files"]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            names = [f"rows/{index:05d}" for index in range(len(files))]
            for done, _ in enumerate(threads.map(lambda name: take(name, "rows"), names), 1):
                reporter.progress("pull", done, len(files), "files of rows")
        prepared = Prepared.open(root)
    reporter.emit("prepare.done", id=prepared.id, **{key: prepared.metadata[key] for key in data.REPORTED})
    return prepared


def prepare_rows(context: RankContext, *, whole: bool) -> Prepared:
    """The rows of the recipe on the cores that the stage's ranks leave; not `whole`: as far as training can start."""
    recipe = context.recipe()
    return data.prepare(
        context.out,
        recipe.data,
        recipe.model.seq_len,
        context.reporter,
        max(1, host.usable_cores() - context.local_world_size + 1),
        rows=context.rows_of_the_run(),
        whole=whole,
        store=store_of_environment(),
    )


def count_leaks(out: Path, recipe: Recipe, prepared: Prepared, reporter: Reporter, *, from_text: bool = True) -> None:
    """Documents of the whole set that share text with CORE, where the recipe names CORE: noted beside the rows.

    Counting reads all of the text again: where a run waits (not `from_text`) only an earlier count is reported.
    """
    if recipe.eval.core_bundle:
        bundle = eval_bundle(out, recipe, prepared, reporter)
        cache = ArtifactCache(store_of_environment(), prepared.path, reporter)
        seal_leaks(prepared, out, recipe.data, bundle, reporter, host.usable_cores() if from_text else 0, cache)


def seal_smoke_bundle(prepared: Prepared, seed: int) -> None:
    """22 small tasks made from the held-out documents, in CORE's format."""
    folder = prepared.path / SMOKE_BUNDLE
    if not is_sealed(folder):
        with sealing(folder, kind=SMOKE_BUNDLE, made_from={"prepared": prepared.id, "seed": seed}) as unsealed:
            write_smoke_bundle(prepared.held_out_documents(), unsealed.path, seed=seed)


def seal_eval_items(out: Path, recipe: Recipe, prepared: Prepared, reporter: Reporter) -> None:
    """The tokens of the bundle that the recipe names, where the evaluation will look for them."""
    bundle, cap = eval_bundle(out, recipe, prepared, reporter), recipe.eval.cap or None
    seal_items(
        bundle,
        prepared.tokenizer,
        items_folder(prepared.path, bundle.id, cap),
        tokenizer_id=prepared.id,
        cap=cap,
        workers=host.usable_cores(),
        reporter=reporter,
        cache=ArtifactCache(store_of_environment(), prepared.path, reporter),
    )
