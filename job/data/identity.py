"""What a prepared set and its tokenizer are made from, and so where they lie, before any of it is made."""

from __future__ import annotations

from typing import Any

from job.data.hub import DATASETS
from job.recipe.config import DataConfig
from job.store.sealed import content_id

FORMAT = 1
"""Raised whenever the same inputs would give other bytes."""


def tokenizer_inputs(data: DataConfig, text: dict[str, Any]) -> dict[str, Any]:
    """`text` is the identity of what `data` names."""
    keys = ["vocab_size", "tokenizer_chars", "document_chars"]
    keys += [] if data.source in DATASETS else ["val_fraction", "max_chars"]
    return {"format": FORMAT, "text": text, "data": {key: getattr(data, key) for key in keys}}


def set_inputs(data: DataConfig, seq_len: int, text: dict[str, Any]) -> dict[str, Any]:
    """Of the rows, and so of the whole set."""
    made_from = tokenizer_inputs(data, text)
    rows = {"split_long": data.split_long, "seed": data.seed}
    return {**made_from, "data": {**made_from["data"], **rows}, "seq_len": seq_len}


def set_folder(inputs: dict[str, Any]) -> str:
    """Below --out and in a store."""
    return f"prepared/{content_id('prepared', inputs)}"
