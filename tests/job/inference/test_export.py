"""Exports: what is written is what was trained, and what was not is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import job.inference.export
from job.cli.commands import main
from job.errors import DataError, UsageError
from job.inference.export import check_target, export, load_network, push_to_hub
from job.inference.hf_tokenizer import tokenizer_document
from job.inference.sources import SHAPE_KEYS, Source, open_source
from job.store.sealed import open_sealed, sealing


def test_an_export_is_opened_as_the_model_that_it_was_made_from(exported: tuple[Source, Path]) -> None:
    source, folder = exported
    back = open_source(folder)
    for key in SHAPE_KEYS:
        assert getattr(back.config, key) == getattr(source.config, key), key
    ids = torch.randint(source.config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(1))
    assert torch.equal(back.model().logits(ids), source.model().logits(ids))
    assert back.tokenizer.encode("the same ids") == source.tokenizer.encode("the same ids")
    for name in source.names:
        assert torch.equal(back.read(name).view(-1), source.read(name).view(-1)), name


def test_the_card_has_verdict_data_licence_and_what_was_checked(exported: tuple[Source, Path]) -> None:
    card = (exported[1] / "README.md").read_text()
    checked = open_sealed(exported[1], kind="export").facts["checked"]
    assert card.startswith("---\n") and "license: mit" in card and "GGUF" in card
    assert f"logits of {checked['tokens']} tokens" in card and float(checked["logits"]) < 1e-4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda names: names - {"blocks.1.attn.q.weight"}, "missing tensor blocks.1.attn.q.weight; it is no whole"),
        (lambda names: names | {"blocks.9.x", "blocks.9.y"}, "unknown tensor blocks.9.x and 1 more"),
    ],
)
def test_every_tensor_is_accounted_for(
    make_source: Callable[[str], Source], tmp_path: Path, change: Callable, said: str
) -> None:
    source = make_source("head")
    with pytest.raises(DataError, match=said):
        export(dataclasses.replace(source, names=change(source.names)), tmp_path / "e", "mit")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_computes_something_else_is_found(
    make_source: Callable[[str], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(folder: Path, config: object) -> torch.nn.Module:
        network = load_network(folder, config)
        network.blocks[2].attn.window += 1
        return network

    monkeypatch.setattr(job.inference.export, "load_network", wrong)
    with pytest.raises(DataError, match="logits differ by"):
        export(make_source("head"), tmp_path / "e", "mit")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_diverged_is_no_bug_of_ours(make_source: Callable[[str], Source], tmp_path: Path) -> None:
    source = make_source("feb")
    broken = dataclasses.replace(source, read=lambda name: source.read(name) * float("nan"))
    with pytest.raises(DataError, match="its training diverged"):
        export(broken, tmp_path / "e", "mit")


def test_what_is_there_is_replaced_only_if_it_is_an_export(exported: tuple[Source, Path], tmp_path: Path) -> None:
    """A file, a folder of somebody's, a sealed folder of another kind: all stay as they are."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with sealing(tmp_path / "sealed", kind="checkpoint", made_from={}) as folder:
        (folder.path / "notes.txt").write_text("mine")
    there = "is there and is no export, and is not replaced"
    for name, file, why in (
        ("file", "", "Not a directory"),
        ("folder", "notes.txt", there),
        ("sealed", "notes.txt", there),
    ):
        words = ["export", "--model", str(exported[1]), "--to", str(tmp_path / name)]
        ended = CliRunner().invoke(main, words, prog_name="speedrun")
        assert ended.exit_code == 2 and why in ended.stderr
        assert (tmp_path / name / file).read_text() == "mine"
    (tmp_path / "empty").mkdir()
    for target in (exported[1], tmp_path / "empty", tmp_path / "not there"):
        check_target(target)


def test_the_hub_wants_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError, match="--hub me/mine needs a token: set HF_TOKEN"):
        push_to_hub(tmp_path, "me/mine")


@pytest.mark.parametrize(
    ("address", "said"), [("http://127.0.0.1:9", ".*refused"), ("http://127.0.0.1:port", "Invalid port")], ids=str
)
def test_a_hub_that_does_not_answer_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, said: str
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    with pytest.raises(UsageError, match=rf"--hub me/mine was refused \({said}.*\); the folder is {tmp_path}"):
        push_to_hub(tmp_path, "me/mine")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["export"], 2, "say which model: --run-id ID for a run's, or --model"),
        (["export", "--model", "MODEL"], 2, "this model is of no run: say where its export goes with --to DIR"),
        (["export", "--model", "MODEL", "--to", "file/x"], 2, "--to file/x cannot be written (Not a directory)"),
        (["import", ".", "--tokenizer", "t"], 11, ". holds no model_<step>.pt"),
        (["import", ".", "--tokenizer", "t", "-o", "soft=3"], 2, "-o soft=3 cannot be used: there are depth, "),
    ],
)
def test_what_cannot_be_exported_or_imported_is_one_sentence(
    exported: tuple[Source, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    ended = CliRunner().invoke(main, [str(exported[1]) if word == "MODEL" else word for word in words])
    assert ended.exit_code == code and said in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_the_network_alone_gives_the_logits_of_padded_batches(exported: tuple[Source, Path]) -> None:
    """Left padding, as generate() of a batch needs it."""
    source, folder = exported
    network, ids = load_network(folder, source.config), torch.arange(40).view(1, 40)
    padded, real = torch.zeros(1, 50, dtype=torch.long), torch.zeros(1, 50)
    padded[:, 10:], real[:, 10:] = ids, 1
    with torch.inference_mode():
        theirs = network.logits(network(padded, real))[:, 10:]
    assert not theirs.isnan().any()
    torch.testing.assert_close(theirs, source.model().logits(ids), atol=1e-4, rtol=0)


def test_ids_that_are_made_twice_keep_their_places(exported: tuple[Source, Path]) -> None:
    tokenizer = exported[0].tokenizer
    vocabulary = tokenizer_document(tokenizer)["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(tokenizer.vocab_size))


def test_files_say_what_they_are(exported: tuple[Source, Path]) -> None:
    source, folder = exported
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == len(source.names) and tensors["network.wte.weight"].dtype == torch.bfloat16
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_speedrun.SpeedrunForCausalLM"
    assert config["layer_types"] == ["sliding_attention"] * 3 + ["full_attention"] and config["sliding_window"] == (
        33 if source.config.window_divisor == 2 else 17
    )
