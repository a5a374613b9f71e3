"""What transformers makes of an export: the same ids, the same logits, the same text."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from job.inference.sources import Source
from model.generate import Sampling, generate

IS_HERE = importlib.util.find_spec("transformers") is not None
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not IS_HERE, reason="transformers is not installed: make hf")]

CORPUS = Path(__file__).parents[4] / "shared" / "data" / "corpus"
DOCUMENTS, CHARS = 10_000, 1_000  # of each document its beginning, for time


@pytest.fixture(scope="module")
def theirs(exported: tuple[Source, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": True, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(exported[1], **options)
    return model.eval(), AutoTokenizer.from_pretrained(exported[1], **options)


def test_logits_and_greedy_text_are_ours(exported: tuple[Source, Path], theirs: Any) -> None:
    source, (model, tokenizer) = exported[0], theirs
    ours = source.model()
    prompts = ["The quick brown fox", "a", "Python's import system finds a module, then"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    rows = [[source.tokenizer.bos_id, *source.tokenizer.encode(prompt)] for prompt in prompts]
    assert [row[seen.bool()].tolist() for row, seen in zip(batch.input_ids, batch.attention_mask, strict=True)] == rows
    ids = torch.randint(source.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert (model(ids).logits - ours.logits(ids)).abs().max() < 1e-4
        out = model.generate(**batch, max_new_tokens=40, eos_token_id=None)[:, -40:].tolist()
        beams = model.generate(**batch, max_new_tokens=8, num_beams=2)
    greedy = list(zip(*generate(ours, rows, 40, Sampling(temperature=0)), strict=True))
    assert [tuple(row) for row in out] == greedy
    assert len(beams) == len(prompts) and torch.isfinite(model(ids, labels=ids).loss)


def test_ids_of_ten_thousand_documents_are_ours(exported: tuple[Source, Path], theirs: Any) -> None:
    if exported[0].config.smear:
        pytest.skip("the tokenizer is the same for both")
    if not CORPUS.is_dir():
        pytest.skip(f"the corpus is not there ({CORPUS})")
    ours, (_, tokenizer) = exported[0].tokenizer, theirs
    texts = [text for file in sorted(CORPUS.glob("*.parquet")) for text in pq.read_table(file)["text"].to_pylist()]
    pieces = [text[:CHARS] for text in texts[:DOCUMENTS]]
    pieces += ["<|bos|> is text", " " * 33 + "x" + "\t" * 17, "-" * 101, "=" * 64 + "a" * 77, "\u180e a\u180eb", ""]
    assert len(texts) > DOCUMENTS
    for piece, ids in zip(pieces, tokenizer(pieces)["input_ids"], strict=True):
        assert ids == [ours.bos_id, *ours.encode(piece)], piece[:100]
