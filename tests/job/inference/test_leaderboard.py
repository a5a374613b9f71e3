"""Checkpoints of the leaderboard's program: by name, whole, and the logits are those of its forward pass."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

from job.data.tokenizer import SPLIT_PATTERN, Tokenizer
from job.errors import DataError
from job.inference.export import export
from job.inference.leaderboard import load_tokenizer, open_leaderboard
from job.inference.sources import Source, open_source
from job.store.sealed import sealing

V, PADDED, T, D, H, L = 300, 320, 256, 64, 4, 4  # the short windows are 128 of 256 in both generations


def tensors(generation: str) -> dict[str, Tensor]:
    """A checkpoint's tensors under the published names, all random, embeddings in bf16 as the program stores them."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int, scale: float | None = None) -> Tensor:
        return torch.randn(*shape, generator=generator) * (scale or 1 / math.sqrt(shape[-1]))

    made = {
        "transformer.wte.weight": draw(PADDED, D, scale=1.0).bfloat16(),
        "lm_head.weight": draw(PADDED, D, scale=0.5),
    }
    for i in range(L):
        block = f"transformer.h.{i}."
        made |= {f"{block}attn.{name}.weight": draw(D, D) for name in ("c_q", "c_k", "c_v", "c_proj")}
        made |= {f"{block}mlp.c_fc.weight": draw(4 * D, D), f"{block}mlp.c_proj.weight": draw(D, 4 * D)}
        if i % 2 == (L - 1) % 2:
            made[f"{block}attn.ve_gate.weight"] = draw(H, 32 if generation == "feb" else 12, scale=1.0)
            made[f"value_embeds.{i}.weight"] = draw(PADDED, D, scale=1.0).bfloat16()
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


def write(folder: Path, state: object, model_config: dict[str, object] | None = None) -> None:
    torch.save(state, folder / "model_000123.pt")
    meta = {"step": 123, "val_bpb": 0.75, "model_config": model_config or config()}
    (folder / "meta_000123.json").write_text(json.dumps(meta), encoding="utf-8")
    write_tokenizer(folder / "tokenizer.pkl")


def write_tokenizer(file: Path, words: int = V, harm: object = None, bos: int | None = None) -> None:
    """As the program saves it: a pickle of tiktoken's encoding; `bos` is the last id by default."""
    bos = words - 1 if bos is None else bos
    ids = (i for i in range(words) if i != bos)
    ranks = {bytes([i] if i < 256 else [97, i - 256]): id for i, id in enumerate(ids)}
    specials = {"<|bos|>": bos}
    encoding = tiktoken.Encoding("rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    file.write_bytes(pickle.dumps(harm or encoding))


def opened(folder: Path, **switches: object) -> Source:
    return open_leaderboard(folder, folder / "tokenizer.pkl", switches=switches)


class Harmful:
    def __reduce__(self) -> tuple:
        return print, ("code ran",)


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
    ours = opened(tmp_path, softcap=softcap).model().logits(idx[None])[0]
    torch.testing.assert_close(ours.double(), published_logits(state, idx, generation, softcap), atol=1e-4, rtol=1e-4)


def test_a_compiled_model_and_bf16_tables(tmp_path: Path) -> None:
    state = tensors("head")
    write(tmp_path, {f"_orig_mod.{name}": tensor for name, tensor in state.items()})
    model = opened(tmp_path).model(dtype=torch.bfloat16)
    assert torch.equal(model.value_embeds["1"].weight, state["value_embeds.1.weight"])
    assert torch.equal(model.blocks[2].mlp.down.weight, state["transformer.h.2.mlp.c_proj.weight"].bfloat16())
    assert model.smear_lambda.shape == () and model.smear_lambda.item() == state["smear_lambda"].item()


@pytest.mark.parametrize("generation", ["feb", "head"])
def test_it_becomes_an_export(tmp_path: Path, generation: str) -> None:
    write(tmp_path, tensors(generation))
    source = opened(tmp_path, softcap=20.0)
    export(source, tmp_path / "export", "mit")
    back, idx = open_source(tmp_path / "export"), torch.arange(V)[None]
    assert torch.equal(back.model().logits(idx), source.model().logits(idx))
    assert back.tokenizer.encode("ab") == [97, 98] and back.tokenizer.bos_id == V - 1 and back.config.softcap == 20


@pytest.mark.parametrize("generation", ["feb", "head"])
def test_every_missing_tensor_is_an_error(tmp_path: Path, generation: str) -> None:
    write(tmp_path, tensors(generation))
    source = opened(tmp_path)
    for name in source.names - {"smear_lambda"}:  # which tells the generation
        lacking = dataclasses.replace(source, names=source.names - {name})
        with pytest.raises(DataError, match=f"missing tensor {name}; it is no whole model"):
            lacking.shapes()


BLOCK = "transformer.h.0"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({f"{BLOCK}.attn.c_proj_scalar": torch.zeros(D)}, "attn.c_proj_scalar is no tensor of the leaderboard's model"),
        ({"transformer.h.9.mlp.c_fc.weight": torch.zeros(4 * D, D)}, "unknown tensor blocks.9.mlp.up.weight"),
        ({f"{BLOCK}.attn.ve_gate.weight": torch.zeros(H, 12)}, "unknown tensor blocks.0.attn.ve_gate.weight"),
        ({"lm_head.weight": torch.zeros(V, D)}, r"head.weight is \(300, 64\) there and \(320, 64\) in the model"),
        ({f"{BLOCK}.mlp.c_fc.weight": torch.zeros(D, 4 * D)}, r"blocks.0.mlp.up.weight is \(64, 256\) there"),
        ({"resid_lambdas": [1.0]}, "is no dictionary of tensors"),
        ({"resid_lambdas": Harmful()}, "is no checkpoint of tensors alone, and code in it is not run"),
    ],
)
def test_what_is_foreign_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], complaint: str
) -> None:
    write(tmp_path, tensors("head") | change)
    with pytest.raises(DataError, match=complaint):
        opened(tmp_path).model()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"n_kv_head": 2}, "2 key heads for 4 heads"),
        ({"n_head": 5, "n_kv_head": 5}, "5 heads do not divide the width 64"),
        ({"frozen_embd": True}, "unknown or missing frozen_embd"),
        ({"vocab_size": 99}, "has 300 tokens, the model 99"),
        ({"window_pattern": "X"}, "window_pattern is 'X'"),
    ],
)
def test_configurations_that_cannot_be_represented(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    write(tmp_path, tensors("head"), config() | change)
    with pytest.raises(DataError, match=complaint):
        opened(tmp_path)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: truncated(f / "model_000123.pt"), r"model_000123.pt cannot be read \(.*\); fetch it again"),
        (lambda f: (f / "model_000123.pt").write_bytes(b""), "model_000123.pt cannot be read"),
        (lambda f: (f / "model_000123.pt").unlink(), r"holds no model_<step>\.pt"),
        (lambda f: (f / "meta_000123.json").unlink(), "meta_000123.json is no description of a checkpoint"),
        (lambda f: (f / "meta_000123.json").write_text("[]"), "meta_000123.json is no description of a checkpoint"),
        (lambda f: truncated(f / "tokenizer.pkl"), "tokenizer.pkl is no tokenizer that can be used"),
        (lambda f: (f / "tokenizer.pkl").unlink(), "holds no tokenizer"),
        (lambda f: write_tokenizer(f / "tokenizer.pkl", harm=Harmful()), "it asks for builtins.print, and code in it"),
        (lambda f: write_tokenizer(f / "tokenizer.pkl", harm={"a": 1}), "is no tokenizer that can be used"),
        (lambda f: write_tokenizer(f / "tokenizer.pkl", bos=7), r"is no tokenizer that can be used \(its special tok"),
    ],
)
def test_what_is_damaged_or_would_run_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], complaint: str
) -> None:
    write(tmp_path, tensors("feb"))
    damage(tmp_path)
    with pytest.raises(DataError, match=complaint):
        opened(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_tokenizer_of_ours_will_do(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with sealing(tmp_path / "t", kind="tokenizer", made_from={}) as folder:
        tokenizer.save(folder.path)
    assert load_tokenizer(tmp_path / "t").ranks == tokenizer.ranks
