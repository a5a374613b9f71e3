"""The prepare stage: tokenizer, training rows, held-out rows and the smoke bundle, each sealed. Needs no torch and no GPU."""

from __future__ import annotations

from job import machine
from job.core_eval.smoke_bundle import write_smoke_bundle
from job.data import prepare as data
from job.data.prepare import Prepared
from job.sealed import is_sealed, sealing
from job.worker import RankContext

SMOKE_BUNDLE = "smoke_bundle"


def main(context: RankContext) -> None:
    """The prepare stage, in one process that starts its own packers."""
    recipe = context.recipe()
    prepared = data.prepare(context.out, recipe.data, recipe.model.seq_len, context.reporter, workers=machine.usable_cores())
    seal_smoke_bundle(prepared, recipe.data.seed)


def seal_smoke_bundle(prepared: Prepared, seed: int) -> None:
    """22 small tasks made from the held-out documents, in CORE's format."""
    folder = prepared.path / SMOKE_BUNDLE
    if not is_sealed(folder):
        with sealing(folder, kind=SMOKE_BUNDLE, made_from={"prepared": prepared.id, "seed": seed}) as unsealed:
            write_smoke_bundle(prepared.held_out_documents(), unsealed.path, seed=seed)
