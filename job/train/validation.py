"""Bits per byte of held-out rows: what the leaderboard calls val_bpb.

    bpb = sum of nats over the targets that are text / (ln 2 x sum of those targets' bytes)

Per byte, so that vocabularies can be compared: each target counts with the exact bytes that its token stands for.
Special tokens stand for none and count on neither side. The rows are the first of the held-out set, `val_tokens` of
them or all there are: a uniform sample, since they are stored in a seeded permutation. The published runs take the
first that a packer makes, where short documents come early; with `eval.packed_val` the finished model is scored on
those too. (Theirs are of eight packers, each with an eighth of the documents; ours of one.)

The rows are cut into blocks of one micro-batch whatever the number of ranks; each block's sum is made in fp64, and the
blocks' sums are added exactly (`math.fsum`). So any number of ranks gives the same number, bit for bit, as far as one
block does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from job.errors import DivergedError
from job.reporter import Reporter
from job.train.ranks import Ranks, current_ranks

if TYPE_CHECKING:
    from job.data.prepare import Prepared
    from job.recipe.config import Recipe
    from model.gpt import GPT


class Model(Protocol):
    """What is asked of a model: `GPT.token_losses`."""

    def token_losses(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]: ...


def validation_rows(prepared: Prepared, recipe: Recipe, *, packed: bool = False) -> np.ndarray:
    """`train.val_tokens` of the held-out rows or all there are, a sample or the packer's first: (n, T+1) uint16."""
    count = max(1, recipe.train.val_tokens // recipe.model.seq_len)
    return prepared.val_as_packed(count) if packed else prepared.val[:count]


def validate(
    model: GPT, prepared: Prepared, recipe: Recipe, reporter: Reporter, *, packed: bool = False
) -> dict[str, Any]:
    """`bits_per_byte` of the recipe's validation rows, shared by the ranks of the process group if there is one."""
    return bits_per_byte(
        model,
        validation_rows(prepared, recipe, packed=packed),
        prepared.tokenizer.token_bytes,
        block_rows=recipe.train.device_batch_size,
        ranks=current_ranks(reporter),
        reporter=reporter,
        device=model.wte.weight.device,
    )


def bits_per_byte(
    model: Model,
    rows: np.ndarray,
    token_bytes: np.ndarray,
    *,
    block_rows: int,
    ranks: Ranks,
    reporter: Reporter,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """{"bpb", "nats", "bytes", "tokens", "val_rows"} of rows (n, T+1); `token_bytes` (V,) are each token's bytes, 0 for
    specials.

    Every rank calls this with the same rows and gets the same numbers, or the same DivergedError where a loss is NaN or
    infinite. `tokens` counts all targets, specials included.
    """
    bytes_of = torch.from_numpy(token_bytes.astype(np.int64)).to(device)
    starts = range(0, len(rows), block_rows)
    mine = starts[ranks.rank :: ranks.size]
    sums = []
    for done, start in enumerate(mine, 1):
        reporter.beat(f"validation, block {done} of {len(mine)}")
        sums.append(_block_sums(model, rows[start : start + block_rows], bytes_of))
        if ranks.rank == 0:
            reporter.progress("validate", done, len(mine), "blocks")
    nats_and_bytes = [tuple(pair.tolist()) for pair in sums]
    parts = ranks.all_gather(nats_and_bytes)
    for rank, part in enumerate(parts):
        for start, (nats, _) in zip(starts[rank :: ranks.size], part, strict=True):
            if not math.isfinite(nats):
                raise DivergedError(
                    f"validation, rows {start} to {min(start + block_rows, len(rows)) - 1}: the model's loss is NaN or"
                    " infinite; start again from an earlier checkpoint, or with a lower learning rate"
                )
    everyones = [pair for part in parts for pair in part]
    nats, count = math.fsum(pair[0] for pair in everyones), sum(int(pair[1]) for pair in everyones)
    bpb = nats / (math.log(2) * count)
    return {"bpb": bpb, "nats": nats, "bytes": count, "tokens": len(rows) * (rows.shape[1] - 1), "val_rows": len(rows)}


def _block_sums(model: Model, rows: np.ndarray, bytes_of: Tensor) -> Tensor:
    """(2,) fp64: nats and bytes of one block's targets. Left on the device: nothing waits between blocks."""
    block = torch.from_numpy(rows.astype(np.int64)).to(bytes_of.device, non_blocking=True)
    inputs, targets = block[:, :-1], block[:, 1:]
    nll, _ = model.token_losses(inputs, targets)
    counted = bytes_of[targets]
    return torch.stack([(nll.double() * (counted > 0)).sum(), counted.sum().double()])
