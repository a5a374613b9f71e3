"""A finished model read from wherever it stands: a run's checkpoint, an export, a checkpoint of the leaderboard's.

Its tensors come one at a time, straight from the files, so that no reader needs more memory than what it makes of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from job.data.tokenizer import Tokenizer
from job.errors import DataError, first_line
from job.recipe.config import from_document
from job.recipe.derive import derive
from job.store.checkpoint_folder import KIND as CHECKPOINT
from job.store.documents import recipe_of
from job.store.sealed import MANIFEST, Sealed, is_sealed, open_sealed, read_manifest
from job.train.checkpoint import WEIGHT, Reader
from model.config import ConfigError, GPTConfig
from model.gpt import GPT

EXPORT = "export"
NETWORK = "network."
"""what the names of an export's tensors begin with"""
SHAPE_KEYS = tuple(field.name for field in dataclasses.fields(GPTConfig) if not field.name.endswith("_init"))


@dataclasses.dataclass(frozen=True)
class Source:
    """A model: its shape, its tokenizer, and its tensors by the names of `GPT`'s parameters.

    made_from: what identifies it. facts: what the maker of its folder noted. run: the folder of the run that it is of.
    """

    where: Path
    config: GPTConfig
    tokenizer: Tokenizer
    names: frozenset[str]
    read: Callable[[str], Tensor]
    made_from: Mapping[str, Any]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    run: Path | None = None

    def shapes(self) -> dict[str, torch.Size]:
        """Of every parameter that the model has; DataError unless the source has exactly these."""
        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in GPT(self.config).named_parameters()}
        for kind, names in (("unknown", self.names - shapes.keys()), ("missing", shapes.keys() - self.names)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise DataError(f"{self.where}: {kind} tensor {min(names)}{more}; it is no whole model of this shape")
        return shapes

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """One tensor as it is stored; DataError unless it is there, whole, of this shape."""
        try:
            tensor = self.read(name)
        except (SafetensorError, RuntimeError) as error:
            raise DataError(f"{self.where}: {name} cannot be read ({first_line(error)}); fetch it again") from None
        if tensor.numel() != shape.numel() or (len(shape) == 2 and tensor.shape != shape):
            raise DataError(f"{self.where}: {name} is {tuple(tensor.shape)} there and {tuple(shape)} in the model")
        return tensor.view(shape)

    def model(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> GPT:
        """The network that computes in `dtype`, not to be trained further."""
        shapes = self.shapes()
        with torch.device(device):
            model = GPT(self.config, compute_dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.tensor(name, shapes[name]))
        model.freeze()
        return model


def open_source(path: Path) -> Source:
    """The model in a sealed checkpoint or export; DataError, naming what there is, for anything else."""
    if not is_sealed(path):
        if list(path.glob("model_*.pt")):
            raise DataError(
                f"{path} is a checkpoint of the leaderboard's program: make it one of ours first, speedrun"
                f" import {path} --tokenizer FOLDER"
            )
        raise DataError(f"{path} holds no model of ours (no {MANIFEST}): give a run, a checkpoint or an export")
    kind = read_manifest((path / MANIFEST).read_bytes(), path / MANIFEST, "fetch it again")["kind"]
    if kind == CHECKPOINT:
        return _of_checkpoint(open_sealed(path, kind=CHECKPOINT))
    return of_export(open_sealed(path, kind=EXPORT))


def _of_checkpoint(sealed: Sealed) -> Source:
    run = sealed.path.resolve().parents[1]
    recipe = recipe_of(run)
    tokenizer = tokenizer_folder(run, sealed)
    if not is_sealed(tokenizer):
        raise DataError(f"{sealed.path} has no tokenizer ({tokenizer} is not there); restore it, or give --bucket")
    reader = Reader(sealed)
    return Source(
        where=sealed.path,
        config=derive(from_document(recipe)).config,
        tokenizer=Tokenizer.load(open_sealed(tokenizer, kind="tokenizer").path),
        names=frozenset(n.removeprefix(WEIGHT) for n in sealed.facts["slices"] if n.startswith(WEIGHT)),
        read=lambda name: reader.whole(WEIGHT + name),
        made_from={"checkpoint": sealed.id, "prepared": sealed.made_from["prepared"]},
        facts=sealed.facts,
        run=run,
    )


def tokenizer_folder(run: Path, checkpoint: Sealed) -> Path:
    """Where the tokenizer that `checkpoint` was trained with stands, or will."""
    return run.parent.parent / "prepared" / checkpoint.made_from["prepared"] / "tokenizer"


def of_export(sealed: Sealed) -> Source:
    document = json.loads((sealed.path / "config.json").read_text(encoding="utf-8"))
    file = safe_open(sealed.path / "model.safetensors", framework="pt")
    return Source(
        where=sealed.path,
        config=shape_of({key: document.get(key) for key in SHAPE_KEYS}, sealed.path / "config.json"),
        tokenizer=Tokenizer.load(sealed.path / "tokenizer"),
        names=frozenset(name.removeprefix(NETWORK) for name in file.keys()),  # noqa: SIM118 (it is no dict)
        read=lambda name: file.get_tensor(NETWORK + name),
        made_from=sealed.made_from,
        facts=sealed.facts,
    )


def shape_of(values: Mapping[str, Any], where: Path) -> GPTConfig:
    """DataError for values that make no model."""
    try:
        return GPTConfig(**values)
    except (ConfigError, TypeError) as error:
        raise DataError(f"{where}: {error}") from None
