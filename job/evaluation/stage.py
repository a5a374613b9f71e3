"""The evaluate stage: bits per byte, the tasks of a bundle, and a few samples of the finished model; fp8 is always off.

Each rank has the whole model on its device, in the dtype it was trained in; ranks communicate through gloo and the
host. The model runs uncompiled: the tasks' rows come in many shapes, each of which takes longer to compile than to
run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from job.data.bigram import bigram_bpb
from job.data.prepare import Prepared
from job.data.rows import Rows
from job.evaluation.fetch import eval_bundle
from job.evaluation.items import items_folder
from job.evaluation.rescore import LESSER
from job.evaluation.score import Forward
from job.evaluation.score import evaluate as score_bundle
from job.machine import host
from job.recipe.config import Recipe
from job.reporter import Reporter
from job.store.checkpoint_folder import final_checkpoint
from job.store.damaged import usable
from job.store.sealed import Sealed, open_sealed, sealing
from job.train import checkpoint, validation
from job.train.context import RankContext
from job.train.kernels import choose_kernels, machine_of
from job.train.loop import device_of
from job.train.ranks import Ranks, joined
from model.config import GPTConfig
from model.generate import Sampling, generate
from model.gpt import GPT


def main(context: RankContext) -> None:
    """Bits per byte, the tasks, and a few samples of the finished model; the ranks share the first two.

    The first rank hashes the checkpoint for all: nothing is sealed before it has met the others.
    """
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    recipe, derived, prepared = context.load()
    assert context.run
    final = final_checkpoint(context.run, derived.rows, verify=context.rank == 0)
    device = device_of(context)
    backend = choose_backend(device, recipe)
    model = load(derived.config, final, device, recipe.train.dtype)
    with joined(context.rank, context.world_size, context.reporter) as ranks:
        if context.asked == LESSER:  # beside the run's own score, which has the rest
            score(context, model, prepared, final, ranks, backend, LesserReporter(context.reporter))
            return
        seal_bits_per_byte(context, model, prepared, final, ranks)
        score(context, model, prepared, final, ranks, backend, context.reporter)
        if ranks.rank == 0:
            write_samples(context, model, prepared)


class LesserReporter(Reporter):
    """Marks each event as one of a lesser evaluation, which the run's record leaves out (job/evaluation/rescore.py)."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def emit(self, kind: str, **fields: Any) -> None:
        self._reporter.emit(kind, lesser=True, **fields)

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        self._reporter.progress(stage, done, total, unit)

    def beat(self, what: str, *, waits: bool = False, long: bool = False) -> None:
        self._reporter.beat(what, waits=waits, long=long)


def choose_backend(device: torch.device, recipe: Recipe) -> str:
    """Put the attention kernel in place; what computes, in words. A GPU without fp8 will do, whatever the model was
    trained with."""
    without_fp8 = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, fp8=False))
    kernels = choose_kernels(without_fp8, machine_of(device), prove_on=device)
    return device.type if device.type == "cpu" else f"{device.type}, {kernels['attention']}"


def load(config: GPTConfig, final: Sealed, device: torch.device, dtype: str) -> GPT:
    """The trained model of a checkpoint on `device`, not to be trained further."""
    with device:
        model = GPT(config, compute_dtype=host.compute_dtype(dtype, gpu=device.type == "cuda"))
    checkpoint.load_weights(model, final)
    model.freeze()
    return model


def seal_bits_per_byte(context: RankContext, model: GPT, prepared: Prepared, final: Sealed, ranks: Ranks) -> None:
    """`eval/bpb`: bits per byte, on the same held-out rows, of the model and of a bigram model of its training rows.

    With `eval.packed_val` also the model's on the packer's first rows.
    """
    assert context.run
    folder = context.run / "eval" / "bpb"
    recipe = context.recipe()
    made_from: dict[str, Any] = {"weights": final.id, "prepared": prepared.id, "val_tokens": recipe.train.val_tokens}
    if recipe.eval.packed_val:
        made_from["packed_val"] = True
    known = usable(folder, kind="bpb", reporter=context.reporter) if ranks.rank == 0 else None
    if ranks.all_gather(not known or not made_from.items() <= known.made_from.items())[0]:
        measured = validation.validate(model, prepared, recipe, context.reporter)
        if recipe.eval.packed_val:
            packed = validation.validate(model, prepared, recipe, context.reporter, packed=True)
            measured["packed_bpb"] = packed["bpb"]
        if ranks.rank == 0:
            trained = beating(Rows(prepared, seed=recipe.data.seed).chunks(final.facts["rows"]), context.reporter)
            held_out, tokenizer = validation.validation_rows(prepared, recipe), prepared.tokenizer
            bigram = bigram_bpb(trained, held_out, tokenizer.token_bytes, tokenizer.vocab_size)
            with sealing(folder, kind="bpb", made_from=made_from) as unsealed:
                unsealed.facts |= measured | {"bigram_bpb": bigram}
    if ranks.rank == 0:
        facts = open_sealed(folder, kind="bpb").facts
        context.reporter.emit("eval.bpb", step=final.facts["step"], rows=final.facts["rows"], **facts)


def beating(chunks: Iterable[np.ndarray], reporter: Reporter) -> Iterator[np.ndarray]:
    """The same chunks of rows, a beat before each."""
    for number, chunk in enumerate(chunks):
        reporter.beat(f"the bigram model, chunk {number} of rows")
        yield chunk


def score(
    context: RankContext, model: GPT, prepared: Prepared, final: Sealed, ranks: Ranks, backend: str, reporter: Reporter
) -> None:
    """CORE from the recipe's bundle, or the smoke score from the bundle made of held-out text."""
    recipe = context.recipe()
    assert context.run
    cap = recipe.eval.cap or None
    if ranks.rank == 0:
        eval_bundle(context.out, recipe, prepared, reporter)  # fetched by one rank, found by the others
    ranks.all_gather(None)
    bundle = eval_bundle(context.out, recipe, prepared, Reporter())
    dtype = str(model.wte.weight.dtype).removeprefix("torch.")
    answered_by = {"weights": final.id, "tokenizer": prepared.id, "dtype": dtype, "backend": backend}
    score_bundle(
        Forward(model, reporter=context.reporter),
        prepared.tokenizer,
        bundle,
        context.run / "eval",
        cap=cap,
        reporter=reporter,
        made_from=answered_by,
        items=items_folder(prepared.path, bundle.id, cap),
        device=model.wte.weight.device,
        workers=host.usable_cores(),
        ranks=ranks,
    )


def write_samples(context: RankContext, model: GPT, prepared: Prepared) -> None:
    """Continuations of the beginnings of held-out documents."""
    recipe, tokenizer = context.recipe(), prepared.tokenizer
    documents = [d for d in map(str.lstrip, prepared.held_out_documents()) if len(d) > 200][: recipe.eval.samples]
    for number, document in enumerate(documents):
        prompt = document[:80].rsplit(None, 1)[0]
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        sampling = Sampling(temperature=0.8, seed=recipe.train.seed + number)
        continuation = [token for (token,) in generate(model, [ids], recipe.eval.sample_tokens, sampling)]
        context.reporter.emit("sample", prompt=prompt, text=tokenizer.decode(continuation))
        context.reporter.progress("samples", number + 1, len(documents), "texts")
