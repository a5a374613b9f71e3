"""A rank's side of checkpoints: named slices of state, written in the background, read by any number of ranks.

A slice is (name, first row, rows): "weight/blocks.0.attn.q.weight" rows 0-255, "muon_momentum/..." and so on. Each rank
writes the slices it owns; the manifest maps every name to its files and rows (job/store/checkpoint_folder.py). A reader
asks for a name and a range of rows, so a checkpoint written by eight ranks is read by four or by one. There is no
pickle: safetensors and JSON.

**What training waits for** is one copy of the state into host buffers that are kept from checkpoint to checkpoint. A
thread then writes, hashes and fsyncs them, each of which lets go of the interpreter. Only a
second checkpoint that comes before the first is written waits for it. safetensors' own writer is not used for that
reason: it holds the interpreter while it writes, and hides a full disk behind an error of its own. Its reader is; the
format is one JSON header and raw bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from job.errors import DataError, OutOfMemoryError
from job.store.checkpoint_folder import KIND, OPTIMIZER, folder_of, parts_folder, write_part
from job.store.sealed import Sealed, open_sealed, storage_errors
from job.train.context import RankContext
from model.gpt import GPT
from model.optimizer import Optimizer
from model.shards import Slice, as_rows

WEIGHT = "weight/"
"""what the names of weights begin with; all other slices are the optimizer's"""
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
"""safetensors' names of the dtypes that state has"""


class Writer:
    """Copies this rank's state and writes it while training goes on; one checkpoint at a time."""

    def __init__(
        self,
        optimizer: Optimizer,
        context: RankContext,
        belongs_to: dict[str, Any],
        rows_per_step: int,
        weights_only_at: int | None = None,
    ) -> None:
        """belongs_to: the `identity` of the run, which the manifest has as what the checkpoint is made from.
        weights_only_at: the step before which the checkpoint is the weights alone."""
        self._optimizer, self._context = optimizer, context
        self._belongs_to, self._rows_per_step, self._weights_only_at = belongs_to, rows_per_step, weights_only_at
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._error: BaseException | None = None
        self._step = -1
        self._thread: threading.Thread | None = threading.Thread(
            target=self._make_buffers, args=(self._slices(),), daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise what the thread failed with, if it did; waits for nothing."""
        if self._error:
            raise self._error

    def has(self, step: int) -> bool:
        """Whether the checkpoint before `step` was begun already."""
        return self._step == step

    def save(self, step: int) -> None:
        """Begin the checkpoint before `step`; returns when the state is copied."""
        self.finish()
        started = time.perf_counter()
        self._step = step
        slices = self._optimizer.weight_slices() if step == self._weights_only_at else self._slices()
        for s in slices:
            self._buffers[s.name, s.start].copy_(s.tensor, non_blocking=True)
        if any(s.tensor.is_cuda for s in slices):
            torch.cuda.synchronize()
        stall = time.perf_counter() - started
        self._thread = threading.Thread(target=self._write, args=(slices, step, stall))
        self._thread.start()

    def finish(self) -> None:
        """Wait until everything begun is written; raises what the writing raised."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self.check()

    def _slices(self) -> list[Slice]:
        return [*self._optimizer.weight_slices(), *self._optimizer.state_slices()]

    def _make_buffers(self, slices: Sequence[Slice]) -> None:
        """While training begins: zeros, because memory that was never written costs a page fault a page at first."""
        try:
            for s in slices:
                zeros = torch.zeros(s.tensor.shape, dtype=s.tensor.dtype)
                self._buffers[s.name, s.start] = zeros.pin_memory() if s.tensor.is_cuda else zeros.fill_(0)
        except BaseException as error:
            self._error = _without_buffers(error, sum(s.tensor.nbytes for s in slices))

    def _write(self, slices: Sequence[Slice], step: int, stall: float) -> None:
        started = time.perf_counter()
        context = self._context
        assert context.run
        rows = step * self._rows_per_step
        folder = parts_folder(context.run, rows, context.attempt)
        try:
            with storage_errors(folder_of(context.run, rows)):
                folder.mkdir(parents=True, exist_ok=True)
                files, index = {}, []
                for prefix, mine in _by_file(slices):
                    file = f"{prefix}{context.rank:05d}.safetensors"
                    tensors = {_key(s.name, s.start): self._buffers[s.name, s.start] for s in mine}
                    files[file] = write_tensors(folder / file, tensors)
                    index += [(s.name, file, s.start, s.start + len(s.tensor)) for s in mine]
            part = {"rows": rows, "step": step, "files": files, "slices": index}
            part |= {"made_from": {**self._belongs_to, "rows": rows}, "stall": stall}
            write_part(folder, context.rank, part | {"seconds": time.perf_counter() - started})
        except BaseException as error:
            self._error = error


def _without_buffers(error: BaseException, size: int) -> BaseException:
    """What training ends with without buffers: `error`, or the sentence that says that memory is missing."""
    said = str(error).lower()
    if not isinstance(error, MemoryError) and "out of memory" not in said and "can't allocate memory" not in said:
        return error
    short = OutOfMemoryError(
        f"this rank found no host memory for the copy of its {size / 1e9:.1f} GB of state that a checkpoint is"
        " written from; give the container or the machine more memory (`speedrun plan` says how much)"
    )
    short.__cause__ = error
    return short


def _by_file(slices: Sequence[Slice]) -> list[tuple[str, list[Slice]]]:
    weights = [s for s in slices if s.name.startswith(WEIGHT)]
    by_file = [("weights-", weights), (OPTIMIZER, [s for s in slices if not s.name.startswith(WEIGHT)])]
    return [(prefix, mine) for prefix, mine in by_file if mine]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file, fsynced; its size and SHA-256 as a manifest has them. Tensors are contiguous and on the
    CPU; each is asked for twice and kept no longer than it takes."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        blocks = [memoryview(len(encoded).to_bytes(8, "little")), memoryview(encoded)]
        for view in itertools.chain(blocks, map(_raw, tensors.values())):
            digest.update(view)
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return {"size": 8 + len(encoded) + at, "sha256": digest.hexdigest()}


def _raw(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def resume(folder: Path, model: GPT, optimizer: Optimizer) -> int:
    """Load the checkpoint that the supervisor chose and verified; the step that comes next."""
    sealed = open_sealed(folder, kind=KIND, verify=False)
    load_weights(model, sealed)
    optimizer.load_slices(Reader(sealed))
    optimizer.round_foreign()
    return sealed.facts["step"]


class Reader:
    """Reads rows [start, stop) of a named slice, whichever files hold them."""

    def __init__(self, sealed: Sealed) -> None:
        self._sealed = sealed
        self._slices: dict[str, list[dict[str, Any]]] = sealed.facts["slices"]
        self._files: dict[str, Any] = {}

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        parts, at = [], start
        for entry in self._slices.get(name, []):
            if entry["start"] <= at < min(entry["stop"], stop):
                until = min(entry["stop"], stop)
                rows = self._file(entry["file"]).get_slice(_key(name, entry["start"]))
                parts.append(rows[at - entry["start"] : until - entry["start"]])
                at = until
        if at != stop:
            raise DataError(f"{self._sealed.path} lacks rows {at}-{stop} of {name}; delete it and run again")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def whole(self, name: str) -> Tensor:
        """All rows of `name`."""
        return self(name, 0, self._slices[name][-1]["stop"] if name in self._slices else 1)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self._sealed.path / name, framework="pt").__enter__()
        return self._files[name]


def load_weights(model: GPT, sealed: Sealed) -> None:
    """Fill every parameter of `model` from a checkpoint; a missing, extra or misshapen tensor is a DataError."""
    reader = Reader(sealed)
    wanted = {WEIGHT + name: as_rows(parameter) for name, parameter in model.named_parameters()}
    extra = {name for name in sealed.facts["slices"] if name.startswith(WEIGHT)} - set(wanted)
    if extra:
        raise DataError(
            f"{sealed.path} holds {min(extra)}, which this model does not have; it belongs to another recipe"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            rows = reader.whole(name)
            if rows.shape != parameter.shape:
                shapes = f"{tuple(rows.shape)}, not {tuple(parameter.shape)}"
                raise DataError(f"{sealed.path} holds {name} as {shapes}; it belongs to another recipe")
            parameter.copy_(rows)


def _key(name: str, start: int) -> str:
    return f"{name}@{start}"
