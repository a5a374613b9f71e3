"""Items into batches: which rows go through the model together, and what they look like.

An item's options share a long prefix (ten shots and the question) and differ in a short suffix. Where the model can
(`SharedPrefix` of model/shared_prefix.py), a row holds the prefix once and then all suffixes:

    shared  [ prefix of item 1 ........ | suffix A | suffix B | suffix C | suffix D ]     one row per item
    plain   [ prefix of item 1 ........ | suffix A ]  [ prefix ........ | suffix B ]  ...   one row per option

A shared prefix pays when it saves a quarter of the tokens; else every option is a row of its own. Either way a batch's
rows are padded to the same widths. On a GPU these come from a short grid (eight per octave), so that a compiler or an
allocator meets few shapes. A CPU does not mind shapes and pays for every token that is padding: its grid is fine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from job.evaluation.prompts import Item
from model.shared_prefix import SharedPrefix

SHORTEST = 16
FINE = 8
SHARING_PAYS = 0.75


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some of a task's items as `rows` rows of `prefix` + `suffixes` columns; prefix 0: plain rows, one per option.

    `cost` is the tokens of the forward pass, padding included.
    """

    items: tuple[int, ...]
    rows: int
    prefix: int
    suffixes: int

    @property
    def cost(self) -> int:
        return self.rows * (self.prefix + self.suffixes)


def plain_shape(item: Item) -> tuple[int, int, int]:
    """Rows, prefix columns and suffix columns in plain rows, without the last token, which predicts nothing."""
    return len(item.suffixes), 0, item.longest - 1


def shared_shape(item: Item) -> tuple[int, int, int]:
    return 1, len(item.prefix), sum(len(tokens) - 1 for tokens in item.suffixes)


def shape_of(item: Item, share_prefix: bool) -> tuple[int, int, int]:
    """The shape that is run: a shared prefix where the model can and where it pays."""
    plain, shared = plain_shape(item), shared_shape(item)
    pays = shared[1] > 0 and shared[1] + shared[2] <= SHARING_PAYS * plain[0] * plain[2]
    return shared if share_prefix and pays else plain


def padded_length(tokens: int, fine: bool = False) -> int:
    """The next width of the grid: multiples of 1/8 of the power of two below, from SHORTEST on (fine: of 8); or 0."""
    if fine:
        return -(-tokens // FINE) * FINE
    if tokens <= SHORTEST:
        return SHORTEST if tokens else 0
    step = 1 << (tokens - 1).bit_length() - 4
    return -(-tokens // step) * step


def plan_batches(
    items: Sequence[Item], token_budget: int, share_prefix: bool = False, fine: bool = False
) -> list[Batch]:
    """Every item in exactly one batch, shared and plain rows apart, the longest first; `fine` widths or few.

    A batch ends where the next item would make it exceed the budget, or so unequal that more than an eighth of the
    budget would be padding (with fine widths a sixty-fourth). An item larger than the budget is a batch of its own.
    """
    shapes = [shape_of(item, share_prefix) for item in items]
    of_shared = [i for i, (_, prefix, _) in enumerate(shapes) if prefix]
    of_plain = [i for i, (_, prefix, _) in enumerate(shapes) if not prefix]
    return _cut(of_shared, shapes, token_budget, fine) + _cut(of_plain, shapes, token_budget, fine)


def _cut(order: Sequence[int], shapes: Sequence[tuple[int, int, int]], token_budget: int, fine: bool) -> list[Batch]:
    batches: list[Batch] = []
    chosen: list[int] = []
    padding = token_budget // (64 if fine else 8)
    batch, own = Batch((), 0, 0, 0), 0
    for i in sorted(order, key=lambda i: (-shapes[i][1] - shapes[i][2], i)):
        alone = Batch((i,), shapes[i][0], *(padded_length(tokens, fine) for tokens in shapes[i][1:]))
        grown = Batch((), batch.rows + alone.rows, max(batch.prefix, alone.prefix), max(batch.suffixes, alone.suffixes))
        if chosen and (grown.cost > token_budget or grown.cost - own - alone.cost > padding):
            batches.append(dataclasses.replace(batch, items=tuple(chosen)))
            chosen, own, grown = [], 0, alone
        chosen.append(i)
        batch, own = grown, own + alone.cost
    return [*batches, dataclasses.replace(batch, items=tuple(chosen))] if chosen else batches


def share(batches: Sequence[Batch], size: int) -> list[list[Batch]]:
    """The batches of each of `size` ranks: the costliest first, each to the rank with the least work so far."""
    shares: list[list[Batch]] = [[] for _ in range(size)]
    load = [0] * size
    for batch in sorted(batches, key=lambda batch: (-batch.cost, batch.items)):
        rank = load.index(min(load))
        shares[rank].append(batch)
        load[rank] += batch.cost
    return shares


def tensors_of(
    items: Sequence[Item], batch: Batch, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, SharedPrefix | None]:
    """ids (rows, prefix + suffixes), positions (N,), targets (N,), all int64; the `SharedPrefix` if rows share one.

    Each scored token in order, option by option: `positions` says where it is predicted, counted row by row through
    `ids`, and `targets` the token. Worked out here, on the host, because asking a GPU where something stands
    means waiting for it.
    """
    ids = np.zeros((batch.rows, batch.prefix + batch.suffixes), dtype=np.int64)
    predicted = np.full_like(ids, -1)
    position, suffix, previous = np.zeros_like(ids), np.full_like(ids, -1), np.zeros_like(ids)
    b = 0
    for item in items:
        prefix_length = len(item.prefix) if batch.prefix else 0
        ids[b, :prefix_length] = item.prefix[:prefix_length]
        position[b, :prefix_length] = np.arange(prefix_length)
        previous[b, :prefix_length] = np.arange(prefix_length) - 1
        suffix[b, :prefix_length] = 0
        at = batch.prefix
        for r, (tokens, start) in enumerate(zip(item.suffixes, item.starts, strict=True)):
            row = tokens if batch.prefix else np.concatenate([item.prefix, tokens])
            span = slice(at, at + len(row) - 1)
            ids[b, span] = row[:-1]
            predicted[b, span] = np.where(np.arange(prefix_length + 1, prefix_length + len(row)) >= start, row[1:], -1)
            position[b, span] = np.arange(prefix_length, prefix_length + len(row) - 1)
            previous[b, span] = np.arange(at - 1, at + len(row) - 2)
            previous[b, at] = prefix_length - 1
            suffix[b, span] = r + 1
            at = span.stop if batch.prefix else 0
            b += not batch.prefix
        b += batch.prefix > 0
    shared = None
    if batch.prefix:
        shared = SharedPrefix(
            batch.prefix, _to(position, device), _to(suffix, device), _to(previous.clip(min=0), device)
        )
    positions = np.flatnonzero(predicted >= 0)
    return _to(ids, device), _to(positions, device), _to(predicted.ravel()[positions], device), shared


def _to(array: np.ndarray, device: torch.device | str) -> Tensor:
    """On a GPU from pinned memory, whose copy does not wait for the queue."""
    tensor = torch.from_numpy(array)
    pinned = torch.device(device).type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if pinned else tensor.to(device)
