"""A checkpoint of the leaderboard's training program, read into our GPT by name: an oracle, and no part of the product.

A checkpoint is `model_<step>.pt`, a dict of tensors, and `meta_<step>.json`, whose `model_config` says the shape.
What it does not say is the generation (windows, rotary base, scale of q and k, softcap live in the program), so the
caller does; tensors of the other generation are then missing or left over, and either is an error that names them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from model.config import GPTConfig
from model.gpt import GPT

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


def load_nanochat(
    folder: Path, step: int, generation: str, compute_dtype: torch.dtype = torch.float32, **switches: object
) -> GPT:
    """The model of step `step` in `folder`; ValueError for a configuration or a tensor that our GPT has no place for,
    or lacks."""
    meta = json.loads((folder / f"meta_{step:06d}.json").read_text(encoding="utf-8"))
    config = our_config(meta["model_config"], generation, **switches)
    tensors = torch.load(folder / f"model_{step:06d}.pt", map_location="cpu", weights_only=True)
    with torch.device("meta"):
        model = GPT(config, compute_dtype)
    model.to_empty(device="cpu")
    fill(model, tensors)
    return model


def our_config(theirs: dict[str, object], generation: str, **switches: object) -> GPTConfig:
    """`model_config` as a GPTConfig of `generation`."""
    if strange := set(theirs) ^ CONFIG:
        raise ValueError(f"model_config: unknown or missing {', '.join(sorted(strange))}")
    if theirs["n_kv_head"] != theirs["n_head"]:
        raise ValueError(
            f"model_config: {theirs['n_kv_head']} key heads for {theirs['n_head']} heads cannot be represented"
        )
    head_dim, left = divmod(theirs["n_embd"], theirs["n_head"])
    if left:
        raise ValueError(f"model_config: {theirs['n_head']} heads do not divide the width {theirs['n_embd']}")
    shape = {"width": theirs["n_embd"], "head_dim": head_dim, "window_pattern": theirs["window_pattern"]}
    return GPTConfig.for_depth(
        theirs["n_layer"], theirs["vocab_size"], theirs["sequence_len"], generation, **shape | switches
    )


def our_name(theirs: str) -> str:
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
    raise ValueError(f"{theirs}: no such tensor is known")


@torch.no_grad()
def fill(model: GPT, tensors: dict[str, Tensor]) -> None:
    """Copy `tensors` into `model`, each into the parameter of its name and shape, cast to its dtype."""
    sources = {our_name(name): tensor for name, tensor in tensors.items()}
    parameters = dict(model.named_parameters())
    if strange := sorted(sources.keys() - parameters.keys()):
        raise ValueError(f"the model has no place for {', '.join(strange)}")
    if missing := sorted(parameters.keys() - sources.keys()):
        raise ValueError(f"the checkpoint lacks {', '.join(missing)}")
    for name, parameter in parameters.items():
        source = sources[name]
        if source.numel() != parameter.numel() or (parameter.ndim == 2 and source.shape != parameter.shape):
            raise ValueError(f"{name}: {tuple(source.shape)} in the checkpoint, {tuple(parameter.shape)} in the model")
        parameter.copy_(source.view_as(parameter))
