"""A causal language model in the Hugging Face format for the scorer: a local folder with its own tokenizer.

Needs the extra `[hf]` (transformers). Weights keep the precision they are stored in; no code from the folder is run.
A model of fixed positions (GPT-2: 1,024) sees the last `max_positions` tokens of a prompt, as in the published scores.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from job.errors import DataError, first_line
from job.store.documents import canonical_json
from job.store.sealed import sha256_file

WEIGHT_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
FALLBACK_BOS = "<|endoftext|>"
REMEDY = "give a folder with config, weights and tokenizer"


class CausalLM:
    """A transformers model as the scorer's `Model`: hidden states of plain rows, and fp32 logits of some of them.

    Some models do more to their logits than one matrix product (a softcap, a scale). This is tried once; if so the
    whole model computes the logits of all positions, which takes more memory and gives the same answers.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.max_positions: int | None = getattr(model.config, "max_position_embeddings", None)
        self._head = None
        if self._head_alone_gives_the_logits():
            self._head = model.get_output_embeddings()

    @torch.no_grad()
    def _head_alone_gives_the_logits(self) -> bool:
        head, body = self._model.get_output_embeddings(), self._model.base_model
        if head is None or body is self._model:
            return False
        ids = torch.arange(8, device=self._model.device).unsqueeze(0)
        return torch.equal(
            head(body(input_ids=ids, use_cache=False)[0]), self._model(input_ids=ids, use_cache=False).logits
        )

    @property
    def dtype(self) -> str:
        return str(self._model.dtype).removeprefix("torch.")

    def hidden(self, idx: Tensor, shared: Any = None, positions: Tensor | None = None) -> Tensor:
        """(B, T) -> the states at `positions`, (N, D), or the logits themselves, (N, V); without `positions`, at
        all, (B, T, ...).

        Columns beyond the model's positions, all padding, are zeros.
        """
        model = self._model if self._head is None else self._model.base_model
        states = model(input_ids=idx[:, : self.max_positions], use_cache=False)[0]
        states = F.pad(states, (0, 0, 0, idx.size(1) - states.size(1)))
        return states if positions is None else states.flatten(0, 1)[positions]

    def lm_head(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) fp32."""
        return (hidden if self._head is None else self._head(hidden)).float()


class HFTokenizer:
    """A transformers tokenizer as an Encoder: text never yields special tokens, and BOS is its own or <|endoftext|>."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        if self.bos_id is None:
            self.bos_id = tokenizer.get_vocab().get(FALLBACK_BOS)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def load(folder: Path, device: torch.device | str) -> tuple[CausalLM, HFTokenizer]:
    """The model and tokenizer in `folder`; DataError when it does not hold them, whole and of one another's size."""
    try:
        model, tokenizer = _from_pretrained(folder)
        return CausalLM(model.eval().to(device)), HFTokenizer(tokenizer)
    except (DataError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers and what it calls raise whatever they like
        unusable = f"{folder} cannot be loaded as a causal language model ({first_line(error)})"
        raise DataError(f"{unusable}; {REMEDY}") from error


def _from_pretrained(folder: Path) -> tuple[Any, Any]:
    """transformers' model and tokenizer; DataError unless each weight is the folder's and each token has a row."""
    import transformers

    options = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    if getattr(config, "quantization_config", None):
        raise DataError(f"{folder} holds quantised weights, which are not scored; give the folder of the original ones")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, **options
    )
    for kind in ("missing", "unexpected", "mismatched"):
        if names := sorted(map(str, found[f"{kind}_keys"])):
            raise DataError(
                f"{folder} is not the model that its config.json describes: {len(names)} {kind} weights ({names[0]}"
                f"{', ...' if len(names) > 1 else ''}); {REMEDY} of one model, whole"
            )
    highest, rows = max(tokenizer.get_vocab().values(), default=0), model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise DataError(
            f"{folder}: its tokenizer has ids up to {highest}, its embedding {rows} rows; give the tokenizer that the"
            " model was trained with, or resize the embedding"
        )
    return model, tokenizer


def identity(folder: Path, patterns: tuple[str, ...]) -> str:
    """16 hex digits over names and contents of the files in `folder` that match; DataError where none does."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    if not files:
        raise DataError(f"{folder} has none of {', '.join(patterns)}; {REMEDY}")
    return hashlib.sha256(canonical_json({file.name: sha256_file(file) for file in files}).encode()).hexdigest()[:16]
