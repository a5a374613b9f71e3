"""Checkpoints: named slices of state in safetensors, sealed under the number of rows consumed.

A slice is (name, first row, rows): "weight/blocks.0.attn.q.weight" rows 0-255, "muon_momentum/..." and so on. Each rank writes the
slices it owns to one file; the manifest maps every name to its files and rows. A reader asks for a name and a range of rows, so a
checkpoint written by any number of ranks is read by any other number. There is no pickle: safetensors and JSON.

    checkpoints/000000000409600/    rank-00000.safetensors ...  manifest.json     (409,600 rows consumed)
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from job.errors import DataError
from job.sealed import Sealed, content_id, is_sealed, open_sealed, sealing
from model.gpt import GPT
from model.shards import as_rows

if TYPE_CHECKING:
    from job.pretrain import Run

KIND = "checkpoint"
WEIGHT = "weight/"
"""what the names of weights begin with; all other slices are the optimizer's"""
KEEP = 2
"""newest checkpoints that stay on disk"""


def folders(run: Path) -> list[Path]:
    """The sealed checkpoints of a run, newest first."""
    parent = run / "checkpoints"
    found = [p for p in parent.iterdir() if p.name.isdigit() and is_sealed(p)] if parent.is_dir() else []
    return sorted(found, key=lambda p: int(p.name), reverse=True)


def folder_of(run: Path, rows: int) -> Path:
    """Where the checkpoint after `rows` rows stands, or will."""
    return run / "checkpoints" / f"{rows:015d}"


def save(run: Run) -> None:
    """Seal the state after `run.step` steps; every rank calls it, rank 0 seals and reports."""
    context, started = run.context, time.perf_counter()
    rows = run.step * run.batches.rows_per_step
    folder = folder_of(context.run, rows)
    made_from = {"recipe": content_id("recipe", run.recipe.values()), "prepared": run.prepared.id, "rows": rows}
    slices = [*run.optimizer.weight_slices(), *run.optimizer.state_slices()]
    file = f"rank-{context.rank:05d}.safetensors"
    with sealing(folder, kind=KIND, made_from=made_from) if context.rank == 0 else contextlib.nullcontext() as sealed:
        target = _shared(sealed.path if sealed else None, context.world_size)
        save_file({_key(s.name, s.start): s.tensor.contiguous() for s in slices}, target / file)
        index = [(s.name, file, s.start, s.start + len(s.tensor), s.total_rows) for s in slices]
        indices = _gathered(index, context.world_size)
        if sealed:
            sealed.facts |= {"rows": rows, "step": run.step, "world_size": context.world_size, "slices": _by_name(indices)}
    if context.rank == 0:
        size = sum(p.stat().st_size for p in folder.iterdir())
        seconds = time.perf_counter() - started
        context.reporter.emit("checkpoint.sealed", step=run.step, rows=rows, folder=folder.name, bytes=size, seconds=seconds)
        for old in folders(context.run)[KEEP:]:
            shutil.rmtree(old)


def resume(run: Run) -> None:
    """Put `run` where the newest usable checkpoint stands; without any, leave it at step 0.

    A damaged checkpoint is passed over with an event; DataError when there are checkpoints and none is usable.
    """
    candidates = folders(run.context.run)
    for folder in candidates:
        try:
            sealed = open_sealed(folder, kind=KIND)
        except DataError as error:
            run.context.reporter.emit("checkpoint.refused", folder=folder.name, why=str(error))
            continue
        load_weights(run.model, sealed)
        run.optimizer.load_slices(Reader(sealed))
        run.step = sealed.facts["step"]
        return
    if candidates:
        raise DataError(
            f"no checkpoint below {run.context.run / 'checkpoints'} is usable; delete that folder to train again from the first step"
        )


class Reader:
    """Reads rows [start, stop) of a named slice, whichever files hold them."""

    def __init__(self, sealed: Sealed) -> None:
        self._sealed = sealed
        self._slices: dict[str, list[dict[str, Any]]] = sealed.facts["slices"]

    def __call__(self, name: str, start: int, stop: int) -> torch.Tensor:
        parts = []
        at = start
        for entry in self._slices.get(name, []):
            if entry["start"] <= at < min(entry["stop"], stop):
                with safe_open(self._sealed.path / entry["file"], framework="pt") as file:
                    rows = file.get_slice(_key(name, entry["start"]))
                    parts.append(rows[at - entry["start"] : min(entry["stop"], stop) - entry["start"]])
                at = min(entry["stop"], stop)
        if at != stop:
            raise DataError(f"{self._sealed.path} lacks rows {at}-{stop} of {name}; delete it and run again")
        return torch.cat(parts) if len(parts) != 1 else parts[0]


def load_weights(model: GPT, sealed: Sealed) -> None:
    """Fill every parameter of `model` from a checkpoint; a missing, extra or misshapen tensor is a DataError."""
    reader = Reader(sealed)
    wanted = {WEIGHT + name: as_rows(parameter) for name, parameter in model.named_parameters()}
    extra = {name for name in sealed.facts["slices"] if name.startswith(WEIGHT)} - set(wanted)
    if extra:
        raise DataError(f"{sealed.path} holds {min(extra)}, which this model does not have; it belongs to another recipe")
    with torch.no_grad():
        for name, parameter in wanted.items():
            rows = reader(name, 0, len(parameter))
            if rows.shape != parameter.shape:
                raise DataError(
                    f"{sealed.path} holds {name} as {tuple(rows.shape)}, not {tuple(parameter.shape)}; it belongs to another recipe"
                )
            parameter.copy_(rows)


def _key(name: str, start: int) -> str:
    return f"{name}@{start}"


def _by_name(indices: Iterable[list[tuple[str, str, int, int, int]]]) -> dict[str, list[dict[str, Any]]]:
    slices: dict[str, list[dict[str, Any]]] = {}
    for index in indices:
        for name, file, start, stop, total in index:
            slices.setdefault(name, []).append({"file": file, "start": start, "stop": stop, "total": total})
    for entries in slices.values():
        entries.sort(key=lambda e: e["start"])
    return dict(sorted(slices.items()))


def _shared(path: Path | None, world_size: int) -> Path:
    """Rank 0's folder, known to all."""
    if world_size == 1:
        return path
    box = [path]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _gathered(index: list[tuple[str, str, int, int, int]], world_size: int) -> list[list[tuple[str, str, int, int, int]]]:
    """Every rank's index, once every rank's file is written."""
    if world_size == 1:
        return [index]
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, index)
    return everyone
