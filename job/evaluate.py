"""The evaluate stage: bits per byte, the tasks of a bundle, and a few samples of the finished model. fp8 is off here, always."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from job import checkpoint, machine, pretrain
from job.core_eval.bundle import open_bundle
from job.core_eval.score import evaluate as score_bundle
from job.core_eval.score import forward_of
from job.data.bigram import bigram_bpb
from job.data.prepare import Prepared
from job.data.rows import Rows
from job.errors import DataError
from job.prepare import SMOKE_BUNDLE
from job.sealed import Sealed, is_sealed, open_sealed, sealing
from job.worker import RankContext
from model.generate import generate
from model.gpt import GPT


def main(context: RankContext) -> None:
    """Bits per byte, the tasks, and a few samples of the finished model."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    recipe, derived, prepared = context.load()
    final = final_checkpoint(context.run, derived.rows)
    model = GPT(derived.config, compute_dtype=machine.compute_dtype(recipe.train.dtype))
    checkpoint.load_weights(model, final)
    seal_bits_per_byte(context, model, prepared, final)
    score(context, model, prepared, final)
    write_samples(context, model, prepared)


def final_checkpoint(run: Path, rows: int) -> Sealed:
    """The sealed checkpoint of the last step; DataError with the command that makes it otherwise."""
    folder = checkpoint.folder_of(run, rows)
    if not is_sealed(folder):
        raise DataError(
            f"run {run.name} has no finished model ({folder} is not there); finish it with: speedrun run --run-id {run.name}"
        )
    return open_sealed(folder, kind=checkpoint.KIND)


def seal_bits_per_byte(context: RankContext, model: GPT, prepared: Prepared, final: Sealed) -> None:
    """`eval/bpb`: the model's and the bigram's bits per byte on the same held-out rows."""
    folder = context.run / "eval" / "bpb"
    recipe = context.recipe()
    made_from = {"weights": final.id, "prepared": prepared.id, "val_tokens": recipe.train.val_tokens}
    if not is_sealed(folder) or open_sealed(folder, kind="bpb").made_from != made_from:
        measured = pretrain.validate(model, prepared, recipe)
        val_rows = pretrain.validation_rows(prepared, recipe)
        trained = Rows(prepared, seed=recipe.data.seed)
        bigram = bigram_bpb(
            trained.chunks(final.facts["rows"]), val_rows, prepared.tokenizer.token_bytes, prepared.tokenizer.vocab_size
        )
        with sealing(folder, kind="bpb", made_from=made_from) as unsealed:
            unsealed.facts |= measured | {"bigram_bpb": bigram}
    facts = open_sealed(folder, kind="bpb").facts
    context.reporter.emit("eval.bpb", step=final.facts["step"], rows=final.facts["rows"], **facts)


def score(context: RankContext, model: GPT, prepared: Prepared, final: Sealed) -> None:
    """CORE from the recipe's bundle, or the smoke score from the bundle made of held-out text."""
    recipe = context.recipe()
    core = recipe.eval.core_bundle
    bundle = open_bundle(core).require_core() if core else open_bundle(prepared.path / SMOKE_BUNDLE)
    answered_by = {
        "weights": final.id,
        "tokenizer": prepared.id,
        "dtype": str(model.wte.weight.dtype).removeprefix("torch."),
        "backend": "cpu",
    }
    score_bundle(
        forward_of(model),
        prepared.tokenizer,
        bundle,
        context.run / "eval",
        cap=recipe.eval.cap or None,
        reporter=context.reporter,
        made_from=answered_by,
    )


def write_samples(context: RankContext, model: GPT, prepared: Prepared) -> None:
    """Continuations of the beginnings of held-out documents."""
    recipe, tokenizer = context.recipe(), prepared.tokenizer
    documents = [d for d in prepared.held_out_documents() if len(d) > 200][: recipe.eval.samples]
    for number, document in enumerate(documents):
        prompt = document[:80].rsplit(None, 1)[0]
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        continuation = generate(model, ids, recipe.eval.sample_tokens, temperature=0.8, seed=recipe.train.seed + number)
        context.reporter.emit("sample", prompt=prompt, text=tokenizer.decode(continuation[len(ids) :]))
        context.reporter.progress("samples", number + 1, len(documents), "texts")
