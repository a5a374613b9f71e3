"""Scoring a Hugging Face model on CORE, outside of any run: the ranks' side, started by `job/run/hf_launch.py`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from job.evaluation import hf
from job.evaluation.fetch import open_core
from job.evaluation.prompts import Encoder
from job.evaluation.score import Forward, evaluate
from job.inference.sources import open_source
from job.machine import host
from job.reporter import Reporter
from job.store.sealed import is_sealed
from job.train.context import RankContext
from job.train.loop import device_of
from job.train.ranks import joined


def main(context: RankContext) -> None:
    """One rank's share. The recipe file is {"model", "core_bundle", "cap"}; the ledger goes to `context.run`."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    assert context.run
    asked = json.loads(context.recipe_file.read_text(encoding="utf-8"))
    folder, cache = Path(asked["model"]), context.out / "bundles"
    device = device_of(context)
    with joined(context.rank, context.world_size, context.reporter) as ranks:
        first = None
        if ranks.rank == 0:
            open_core(asked["core_bundle"], cache, context.reporter)  # fetched by one rank, found by the others
            first = hf.identity(folder, hf.WEIGHT_FILES), hf.identity(folder, hf.TOKENIZER_FILES)
        weights, tokenizer_id = ranks.all_gather(first)[0]
        bundle = open_core(asked["core_bundle"], cache, Reporter())
        forward, tokenizer, dtype, max_positions = load(folder, device, context.reporter)
        evaluate(
            forward,
            tokenizer,
            bundle,
            context.run,
            cap=asked["cap"],
            reporter=context.reporter,
            made_from={"weights": weights, "tokenizer": tokenizer_id, "dtype": dtype, "backend": device.type},
            device=device,
            max_tokens=max_positions,
            workers=host.usable_cores(),
            ranks=ranks,
        )


def load(folder: Path, device: torch.device, reporter: Reporter) -> tuple[Forward, Encoder, str, int | None]:
    """The model in `folder` to score with, its tokenizer, dtype and positions; an export of ours by our own code."""
    if not is_sealed(folder):
        model, tokenizer = hf.load(folder, device)
        return Forward(model, share_prefix=False, reporter=reporter), tokenizer, model.dtype, model.max_positions
    source, dtype = open_source(folder), host.compute_dtype("auto", gpu=device.type == "cuda")
    forward = Forward(source.model(device, dtype), reporter=reporter)
    return forward, source.tokenizer, str(dtype).removeprefix("torch."), None
