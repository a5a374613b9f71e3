"""Levers (`model/fp8_passes.py`) on a real device: whether a block with them computes the same, and what each is
worth."""

from __future__ import annotations

import time

import torch
from steps.training import BLOCK_TIMES, OneBlock, block_times

from bench import Bench, Result
from model.config import LEVERS, SAME_NUMBERS
from model.fp8_levers_proof import prove
from model.kernels import Fp8Error

SECONDS = 200
"""after which no further row begins"""


def levers(bench: Bench) -> Result:
    """The proof that stands before training, of all levers; then a block of each kind without levers, with those of
    SAME_NUMBERS and with all, and one with value embedding with one lever more a row."""
    bench.free()
    result, began = Result(), time.perf_counter()
    try:
        found = prove(bench.sizes.config, bench.sizes.tokens, "head", LEVERS, bench.device)
        proof = [[each.what, f"{each.error:.4f}", f"{each.bound:.4f}"] for each in found]
        result.tables.append((["all levers against none", "relative error", "what rounding explains"], proof))
    except Fp8Error as error:
        result.check(False, str(error))
    with_embedding = bench.sizes.config.value_embed_layers[0]
    kinds = {"with value embedding": with_embedding, "without": 1 - with_embedding}
    sets = {"none": (), "those that change no numbers": SAME_NUMBERS, "all": LEVERS}
    wanted = [(kind, layer, name, chosen) for name, chosen in sets.items() for kind, layer in kinds.items()]
    wanted += [
        ("with value embedding", with_embedding, f"and {LEVERS[i]}", LEVERS[: i + 1]) for i in range(len(LEVERS) - 1)
    ]
    rows = []
    for kind, layer, name, chosen in wanted:
        if time.perf_counter() - began > SECONDS:
            result.facts["not timed, for want of time"] = f"{len(wanted) - len(rows)} of {len(wanted)} rows"
            break
        one = OneBlock(bench, layer, chosen)
        copies = _copying(bench, one) if one.model.before_loss else "-"
        rows.append([name, kind, *block_times(bench, one), copies])
    result.tables.append((["levers", "a block", *BLOCK_TIMES, "ms to copy all weights, once a step"], rows))
    return result


def _copying(bench: Bench, one: OneBlock) -> str:
    """Milliseconds of quantising every block's weights, after a first time that compiles."""
    one.model.before_loss()
    with torch.no_grad():
        for weight in one.model.blocks.parameters():
            weight.mul_(1)
    bench.wait()
    return f"{bench.ms(one.model.before_loss):.3f}"
