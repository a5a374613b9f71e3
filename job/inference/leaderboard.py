"""A checkpoint of the leaderboard's training program: `model_<step>.pt` and `meta_<step>.json`, weights only.

The shape is in the meta file. The generation (windows, rotary base, scale of q and k, softcap live in the program) is
told by the tensors that only one of them has; what it cannot tell, a softcap of 20 or windows of a third, the caller
says. Nothing of a pickle is executed: the tensors are read by torch's weights-only reader, and of a tokenizer.pkl one
class is known, as a bag of its values.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from job.data.tokenizer import Tokenizer
from job.errors import DataError, first_line
from job.inference.sources import Source
from job.store.sealed import is_sealed, open_sealed, sha256_file
from model.config import ConfigError, GPTConfig

BLOCK = {
    "attn.c_q": "attn.q",
    "attn.c_k": "attn.k",
    "attn.c_v": "attn.v",
    "attn.c_proj": "attn.o",
    "attn.ve_gate": "attn.ve_gate",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
OUTSIDE = {"transformer.wte.weight": "wte.weight", "lm_head.weight": "head.weight"}
SAME = re.compile(r"value_embeds\.\d+\.weight|resid_lambdas|x0_lambdas|smear_gate\.weight|smear_lambda|backout_lambda")
CONFIG = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern"}


def open_leaderboard(
    folder: Path, tokenizer: Path, step: int | None = None, switches: Mapping[str, Any] | None = None
) -> Source:
    """The checkpoint of `step` (the newest by default) in `folder`; `switches` replace fields of GPTConfig.

    DataError for what is truncated, foreign, or would run code.
    """
    steps = {int(file.stem[6:]): file for file in folder.glob("model_*.pt") if file.stem[6:].isdigit()}
    if not steps:
        raise DataError(f"{folder} holds no model_<step>.pt; give the folder of the leaderboard's checkpoints")
    if step is not None and step not in steps:
        raise DataError(f"{folder} has no step {step}, only {', '.join(map(str, sorted(steps)))}")
    file = steps[max(steps) if step is None else step]
    meta = folder / f"meta_{file.stem[6:]}.json"
    tensors = _tensors(file)
    try:
        theirs = json.loads(meta.read_text(encoding="utf-8"))["model_config"]
        config = our_config(theirs, "head" if "smear_lambda" in tensors else "feb", switches or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{meta} is no description of a checkpoint ({first_line(error)})") from None
    read_by = load_tokenizer(tokenizer)
    if read_by.vocab_size != config.vocab_size:
        raise DataError(
            f"{tokenizer} has {read_by.vocab_size:,} tokens, the model {config.vocab_size:,}: give the tokenizer that"
            " it was trained with"
        )
    made_from = {"leaderboard": sha256_file(file), "switches": dict(switches or {})}
    return Source(file, config, read_by, frozenset(tensors), tensors.__getitem__, made_from)


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """By our names, mapped from the file where its format allows it."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise DataError(
            f"{file} is no checkpoint of tensors alone, and code in it is not run; get it elsewhere"
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise DataError(f"{file} cannot be read ({first_line(error)}); fetch it again") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise DataError(f"{file} is no dictionary of tensors: it is no checkpoint of the leaderboard's program")
    return {our_name(name, file): tensor for name, tensor in state.items()}


def our_name(theirs: str, file: Path) -> str:
    """Our parameter's name for a tensor of the checkpoint."""
    name = theirs.removeprefix("_orig_mod.")  # a compiled model was saved
    if block := re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.weight", name):
        layer, inner = block.groups()
        if inner in BLOCK:
            return f"blocks.{layer}.{BLOCK[inner]}.weight"
    elif name in OUTSIDE:
        return OUTSIDE[name]
    elif SAME.fullmatch(name):
        return name
    raise DataError(f"{file}: {theirs} is no tensor of the leaderboard's model; it is of another program or version")


def our_config(theirs: dict[str, Any], generation: str, switches: Mapping[str, Any]) -> GPTConfig:
    """`model_config` as a GPTConfig of `generation`; ValueError where it cannot be one."""
    if strange := set(theirs) ^ CONFIG:
        raise ValueError(f"unknown or missing {', '.join(sorted(strange))}")
    if theirs["n_kv_head"] != theirs["n_head"]:
        raise ValueError(f"{theirs['n_kv_head']} key heads for {theirs['n_head']} heads cannot be represented")
    head_dim, left = divmod(theirs["n_embd"], theirs["n_head"])
    if left:
        raise ConfigError(f"{theirs['n_head']} heads do not divide the width {theirs['n_embd']}")
    shape = {"width": theirs["n_embd"], "head_dim": head_dim, "window_pattern": theirs["window_pattern"], **switches}
    return GPTConfig.for_depth(theirs["n_layer"], theirs["vocab_size"], theirs["sequence_len"], generation, **shape)


def load_tokenizer(path: Path) -> Tokenizer:
    """Of a sealed tokenizer of ours, or of the leaderboard's tokenizer.pkl (or the folder that has it)."""
    if is_sealed(path):
        return Tokenizer.load(open_sealed(path, kind="tokenizer").path)
    file = path / "tokenizer.pkl" if path.is_dir() else path
    try:
        with open(file, "rb") as stream:
            saved = vars(_Restricted(stream).load())
        ids = saved["mergeable_ranks"] | saved["special_tokens"]
        ranks, specials = (sorted(saved[key], key=saved[key].get) for key in ("mergeable_ranks", "special_tokens"))
        assert [ids[token] for token in (*ranks, *specials)] == list(range(len(ids))), "its special tokens are not last"
        return Tokenizer(ranks, specials, saved["pat_str"])
    except FileNotFoundError:
        raise DataError(
            f"{path} holds no tokenizer (no {file.name}); give a tokenizer's folder or tokenizer.pkl"
        ) from None
    except Exception as error:  # a pickle may hold anything
        raise DataError(f"{file} is no tokenizer that can be used ({first_line(error)})") from None


class _Values:
    """Stands for the one class that a tokenizer.pkl may name."""


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _Values
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and code in it is not run")
