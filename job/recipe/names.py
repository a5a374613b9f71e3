"""The nearest right name for one that does not exist, and what other tools call a recipe's keys."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from job.errors import UsageError

LIKENESS = 0.6
"""of two words, by difflib, from which one may be a slip of the other"""
ELSEWHERE = {
    "batch_size": "train.total_batch_size (tokens a step) or train.device_batch_size (rows at once)",
    "block_size": "model.seq_len",
    "context_length": "model.seq_len",
    "d_model": "model.depth (the width is 64 x depth)",
    "dim": "model.depth (the width is 64 x depth)",
    "epochs": "train.steps, or train.param_data_ratio (tokens a scaling parameter)",
    "eval_interval": "train.val_every",
    "eval_steps": "train.val_every",
    "gradient_accumulation_steps": "train.total_batch_size (tokens a step: what is accumulated follows)",
    "hidden_size": "model.depth (the width is 64 x depth)",
    "iterations": "train.steps",
    "layers": "model.depth",
    "learning_rate": "train.lr_scale (a factor on every rate), or train.matrix_lr and its like",
    "lr": "train.lr_scale (a factor on every rate), or train.matrix_lr and its like",
    "max_iters": "train.steps",
    "max_length": "model.seq_len",
    "max_steps": "train.steps",
    "micro_batch_size": "train.device_batch_size",
    "n_embd": "model.depth (the width is 64 x depth)",
    "n_layer": "model.depth",
    "num_train_epochs": "train.steps, or train.param_data_ratio (tokens a scaling parameter)",
    "precision": "train.dtype",
    "save_steps": "train.checkpoint_every",
    "sequence_length": "model.seq_len",
    "weight_decay": "no key: it follows from batch and depth (--dry-run says why)",
    "width": "model.depth (the width is 64 x depth)",
}
"""what keys are called in other tools, and the key that does it here"""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `word` is most probably a slip of; None where none is like it."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=LIKENESS)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The question behind a sentence about an unknown `word`, with what stands before it; empty where none is near."""
    match = nearest(word, known)
    return f"; did you mean {match}?" if match else ""


def right_key(word: str, known: Iterable[str]) -> str:
    """The remedy for an unknown recipe key `word`: by its own part, by what other tools call it, or the nearest."""
    known, own = list(known), word.rpartition(".")[2].replace("-", "_")
    if own in ELSEWHERE:
        return f"here that is {ELSEWHERE[own]}"
    if same := [key for key in known if key.endswith(f".{own}")]:
        return f"did you mean {' or '.join(same)}?"
    by_own = {key.rpartition(".")[2]: key for key in known}
    match = nearest(word, known) or by_own.get(nearest(own, by_own) or "")
    return f"did you mean {match}?" if match else "speedrun keys lists all"


def no_run(run_id: str, place: object, known: Collection[str]) -> UsageError:
    """There is no such run at `place`, where the `known` ones are."""
    there = f"there are: {', '.join(sorted(known))}" if known else "begin one with: speedrun run"
    return UsageError(f"no run {run_id} below {place}{did_you_mean(run_id, known)}; {there}")
