"""Small corpora of real text, written once a session from what the Python installation carries."""

from __future__ import annotations

import json
import random
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from job.config import DataConfig
from job.data import prepare as preparing
from job.progress import Reporter


class Recorder(Reporter):
    """Keeps what a stage reports."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict]] = []
        self.shown: list[tuple[str, float, float, str]] = []

    def emit(self, kind, **fields):
        self.events.append((kind, fields))

    def progress(self, stage, done, total, unit):
        self.shown.append((stage, done, total, unit))


def write_jsonl(file: Path, texts) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def prose() -> list[str]:
    """About 400 paragraphs-and-pages of the language reference, none twice."""
    draw = random.Random(7)
    pieces: list[str] = []
    for name in sorted(topics):
        lines = topics[name].splitlines(keepends=True)
        while lines:
            size = draw.choice([3, 8, 20, 60])
            pieces.append("".join(lines[:size]))
            lines = lines[size:]
    distinct = sorted({piece for piece in pieces if len(piece) > 40})
    draw.shuffle(distinct)
    return distinct[:400]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, prose) -> Path:
    """A folder of three jsonl shards."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(3):
        write_jsonl(folder / f"{index}.jsonl", prose[index::3])
    return folder


@pytest.fixture
def one_file_shards(monkeypatch) -> None:
    """Every file a shard of its own, however small."""
    monkeypatch.setattr("job.data.sources.SHARD_BYTES", 1)


def config(*paths: Path, **changes) -> DataConfig:
    values = {"source": "local", "vocab_size": 400, "tokenizer_chars": 200_000, "val_fraction": 0.1, "split_long": True}
    return DataConfig(paths=tuple(map(str, paths)), **(values | changes))


def small_prepare(out: Path, data: DataConfig, *, seq_len: int = 32, workers: int = 1, reporter: Reporter | None = None):
    return preparing.prepare(out, data, seq_len, reporter or Recorder(), workers)


@pytest.fixture(scope="session")
def helpers():
    """The functions above, for tests in other files (test folders are not packages)."""

    class Helpers:
        pass

    for item in (Recorder, write_jsonl, config, small_prepare):
        setattr(Helpers, item.__name__, staticmethod(item) if not isinstance(item, type) else item)
    return Helpers


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, corpus):
    """The corpus prepared once, for tests that only read."""
    return small_prepare(tmp_path_factory.mktemp("out"), config(corpus))
