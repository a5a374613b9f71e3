"""Checkpoints of the leaderboard's program: by name, whole, and the logits are those of its forward pass."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import load

V, T, D, H, L = 100, 256, 64, 4, 4  # padded to 128 words; the short windows are 128 of 256 in both generations


nanochat = load(Path(__file__).with_name("nanochat_import.py"))


def tensors(generation: str) -> dict[str, Tensor]:
    """A checkpoint's tensors under the published names, all random, embeddings in bf16 as the program stores them."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int, scale: float | None = None) -> Tensor:
        return torch.randn(*shape, generator=generator) * (scale or 1 / math.sqrt(shape[-1]))

    made = {"transformer.wte.weight": draw(128, D, scale=1.0).bfloat16(), "lm_head.weight": draw(128, D, scale=0.5)}
    for i in range(L):
        block = f"transformer.h.{i}."
        made |= {f"{block}attn.{name}.weight": draw(D, D) for name in ("c_q", "c_k", "c_v", "c_proj")}
        made |= {f"{block}mlp.c_fc.weight": draw(4 * D, D), f"{block}mlp.c_proj.weight": draw(D, 4 * D)}
        if i % 2 == (L - 1) % 2:
            made[f"{block}attn.ve_gate.weight"] = draw(H, 32 if generation == "feb" else 12, scale=1.0)
            made[f"value_embeds.{i}.weight"] = draw(128, D, scale=1.0).bfloat16()
    made |= {"resid_lambdas": draw(L, scale=0.5) + 1, "x0_lambdas": draw(L, scale=0.3)}
    if generation == "head":
        made |= {
            "smear_gate.weight": draw(1, 24, scale=1.0),
            "smear_lambda": draw(1, scale=1.0),
            "backout_lambda": draw(1, scale=0.3),
        }
    return made


def config() -> dict[str, object]:
    return {
        "sequence_len": T,
        "vocab_size": V,
        "n_layer": L,
        "n_head": H,
        "n_kv_head": H,
        "n_embd": D,
        "window_pattern": "SSSL",
    }


def write(folder: Path, state: dict[str, Tensor], model_config: dict[str, object] | None = None) -> None:
    torch.save(state, folder / "model_000123.pt")
    meta = {"step": 123, "val_bpb": 0.75, "model_config": model_config or config()}
    (folder / "meta_000123.json").write_text(json.dumps(meta), encoding="utf-8")


def load(folder: Path, generation: str, **switches: object) -> torch.nn.Module:
    return nanochat.load_nanochat(folder, 123, generation, **switches)


def published_logits(state: dict[str, Tensor], idx: Tensor, generation: str, softcap: float) -> Tensor:
    """The published forward pass over one row, from the formulas, under the checkpoint's own names."""
    w = {name: tensor.double() for name, tensor in state.items()}
    feb, n, hd = generation == "feb", len(idx), D // H

    def rms(x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=torch.finfo(torch.float32).eps)

    angle = torch.arange(n).double()[:, None] / (1e4 if feb else 1e5) ** (torch.arange(0, hd, 2).double() / hd)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rotated(x: Tensor) -> Tensor:
        a, b = x[..., : hd // 2], x[..., hd // 2 :]
        return rms(torch.cat([a * cos + b * sin, b * cos - a * sin], -1)) * (1.0 if feb else 1.2)

    x = rms(w["transformer.wte.weight"][idx])
    if not feb:
        gate = w["smear_lambda"] * torch.sigmoid(x[1:, :24] @ w["smear_gate.weight"].T)
        x = torch.cat([x[:1], x[1:] + gate * x[:-1]])
    x0 = x
    for i in range(L):
        block = f"transformer.h.{i}."
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        h = rms(x)
        q, k, v = ((h @ w[f"{block}attn.c_{name}.weight"].T).view(n, H, hd) for name in "qkv")
        if f"value_embeds.{i}.weight" in w:
            gate = torch.sigmoid(h[:, : 32 if feb else 12] @ w[f"{block}attn.ve_gate.weight"].T)
            v = v + (2 if feb else 3) * gate[..., None] * w[f"value_embeds.{i}.weight"][idx].view(n, H, hd)
        scores = torch.einsum("qhd,khd->hqk", rotated(q), rotated(k)) / math.sqrt(hd)
        distance = torch.arange(n)[:, None] - torch.arange(n)
        seen = (distance >= 0) & (distance <= (T if i == L - 1 else 128))
        out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).reshape(n, D)
        x = x + out @ w[f"{block}attn.c_proj.weight"].T
        x = x + (rms(x) @ w[f"{block}mlp.c_fc.weight"].T).relu().square() @ w[f"{block}mlp.c_proj.weight"].T
        if i == L // 2:
            middle = x
    if not feb:
        x = x - w["backout_lambda"] * middle
    return softcap * torch.tanh((rms(x) @ w["lm_head.weight"].T)[:, :V] / softcap)


@pytest.mark.parametrize(("generation", "softcap"), [("feb", 15.0), ("feb", 20.0), ("head", 15.0)])
def test_logits_are_the_published_ones(tmp_path: Path, generation: str, softcap: float) -> None:
    state = tensors(generation)
    write(tmp_path, state)
    idx = torch.randint(V, (200,), generator=torch.Generator().manual_seed(1))
    ours = load(tmp_path, generation, softcap=softcap).logits(idx[None])[0]
    torch.testing.assert_close(ours.double(), published_logits(state, idx, generation, softcap), atol=1e-4, rtol=1e-4)


def test_a_compiled_model_and_bf16_tables(tmp_path: Path) -> None:
    state = tensors("head")
    write(tmp_path, {f"_orig_mod.{name}": tensor for name, tensor in state.items()})
    model = nanochat.load_nanochat(tmp_path, 123, "head", torch.bfloat16)
    assert torch.equal(model.value_embeds["1"].weight, state["value_embeds.1.weight"])
    assert torch.equal(model.blocks[2].mlp.down.weight, state["transformer.h.2.mlp.c_proj.weight"])
    assert model.smear_lambda.shape == () and model.smear_lambda.item() == state["smear_lambda"].item()


@pytest.mark.parametrize("generation", ["feb", "head"])
def test_every_missing_tensor_is_an_error(generation: str) -> None:
    config_ = nanochat.our_config(config(), generation)
    with torch.device("meta"):
        model = nanochat.GPT(config_)
    for name in tensors(generation):
        rest = {other: tensor for other, tensor in tensors(generation).items() if other != name}
        with pytest.raises(ValueError, match=f"the checkpoint lacks {nanochat.our_name(name)}$"):
            nanochat.fill(model, rest)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"transformer.h.0.attn.c_proj_scalar": torch.zeros(D)},
            "transformer.h.0.attn.c_proj_scalar: no such tensor is known",
        ),
        (
            {"transformer.h.9.mlp.c_fc.weight": torch.zeros(4 * D, D)},
            "the model has no place for blocks.9.mlp.up.weight",
        ),
        (
            {"transformer.h.0.attn.ve_gate.weight": torch.zeros(H, 12)},
            "the model has no place for blocks.0.attn.ve_gate.weight",
        ),
        (
            {"lm_head.weight": torch.zeros(V, D)},
            r"head.weight: \(100, 64\) in the checkpoint, \(128, 64\) in the model",
        ),
        (
            {"transformer.h.0.mlp.c_fc.weight": torch.zeros(D, 4 * D)},
            r"blocks.0.mlp.up.weight: \(64, 256\) in the checkpoint",
        ),
    ],
)
def test_unknown_and_misshapen_tensors_are_errors(tmp_path: Path, change: dict[str, Tensor], complaint: str) -> None:
    write(tmp_path, tensors("head") | change)
    with pytest.raises(ValueError, match=complaint):
        load(tmp_path, "head")


def test_the_other_generation_does_not_fit(tmp_path: Path) -> None:
    write(tmp_path, tensors("head"))
    with pytest.raises(ValueError, match=r"the model has no place for backout_lambda, smear_gate.weight, smear_lambda"):
        load(tmp_path, "feb")
    write(tmp_path, tensors("feb"))
    with pytest.raises(ValueError, match=r"the checkpoint lacks backout_lambda, smear_gate.weight, smear_lambda"):
        load(tmp_path, "head")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"n_kv_head": 2}, "2 key heads for 4 heads"),
        ({"n_head": 5, "n_kv_head": 5}, "5 heads do not divide the width 64"),
        ({"frozen_embd": True}, "unknown or missing frozen_embd"),
    ],
)
def test_configurations_that_cannot_be_represented(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    write(tmp_path, tensors("head"), config() | change)
    with pytest.raises(ValueError, match=complaint):
        load(tmp_path, "head")


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    write(tmp_path, {"wte": Harmful()})
    with pytest.raises(pickle.UnpicklingError):
        load(tmp_path, "head")


class Harmful:
    def __reduce__(self) -> tuple:
        return print, ("code ran",)
