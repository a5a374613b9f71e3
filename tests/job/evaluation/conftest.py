from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest

from helpers import load

HERE = Path(__file__).parent
SHARED = HERE.parents[3] / "shared" / "data"
PIECE = re.compile(r" ?\w+| ?[^\s\w]+|\s+(?!\S)|\s")


class WordTokenizer:
    """A piece of text (a word with the space before it, punctuation, a run of spaces) is one token: a hash of it."""

    def __init__(self, vocab_size: int = 512) -> None:
        self.vocab_size = vocab_size
        self.bos_id: int | None = 0

    def encode(self, text: str) -> list[int]:
        return [1 + zlib.crc32(piece.encode()) % (self.vocab_size - 1) for piece in PIECE.findall(text)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


@pytest.fixture(scope="session")
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture(scope="session")
def reference():
    """tests/job/evaluation/reference.py as a module."""
    return load(HERE / "reference.py", "core_reference")


@pytest.fixture(scope="session")
def core_archive() -> Path:
    path = SHARED / "core" / "core_bundle.tar.zst"
    if not path.is_file():
        pytest.skip(f"the CORE bundle is not there ({path})")
    return path


@pytest.fixture(scope="session")
def core_bundle(core_archive):
    from job.evaluation.bundle import open_bundle

    return open_bundle(core_archive)


@pytest.fixture(scope="session")
def tiny_gpt():
    """A GPT whose every parameter is random, so that every position matters and the options' losses lie apart."""
    import torch

    from model.config import GPTConfig
    from model.gpt import GPT

    model = GPT(GPTConfig(depth=2, vocab_size=512, seq_len=64, width=32, head_dim=16, window_divisor=4, window_tile=16))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def a_bundle(folder: Path, **changes: str | bytes | None) -> Path:
    """A small bundle of all three kinds; `changes` replace files by name ("core": core.yaml, "meta": the baselines)."""
    files: dict[str, str | bytes | None] = {
        "core": "icl_tasks:\n"
        "- {label: pick, dataset_uri: pick.jsonl, num_fewshot: [2], icl_task_type: multiple_choice, "
        'continuation_delimiter: "\\nAnswer: "}\n'
        "- {label: who, dataset_uri: sub/who.jsonl, num_fewshot: [0], icl_task_type: schema}\n"
        "- {label: next, dataset_uri: next.jsonl, num_fewshot: [1], icl_task_type: language_modeling}\n",
        "meta": "Eval Task,Random baseline\npick,25\nwho,50\nnext,0\nunused,10\n",
        "pick": "".join(
            f'{{"query": "Question {i}: which?", "choices": ["red {i}", "green", "a blue one", "none"],'
            f' "gold": {i % 4}}}\n'
            for i in range(9)
        ),
        "who": "".join(
            f'{{"context_options": ["Ann saw {i} men and Ann", "Ann saw {i} men and they"],'
            f' "continuation": "ran away {i}.", "gold": {i % 2}}}\n'
            for i in range(7)
        ),
        "next": "".join(f'{{"context": " one two {i} ", "continuation": "three {i}"}}\n' for i in range(8)),
        "manifest": None,
    }
    names = {
        "core": "core.yaml",
        "meta": "eval_meta_data.csv",
        "pick": "eval_data/pick.jsonl",
        "who": "eval_data/sub/who.jsonl",
        "next": "eval_data/next.jsonl",
        "manifest": "MANIFEST.json",
    }
    for key, content in {**files, **changes}.items():
        if content is not None:
            file = folder / names[key]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture
def make_bundle(tmp_path):
    """make_bundle(name=content...) -> the folder of a small valid bundle with these files replaced (None: left out)."""
    return lambda **changes: a_bundle(tmp_path / "bundle", **changes)
