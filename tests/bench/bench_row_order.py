"""What the order of training rows costs, and what a validation set sees of it: small models trained on rows of the same
documents in several orders, each scored on several sets of held-out rows.

    pytest tests/bench/bench_row_order.py --override-ini "python_files=bench_*.py" --capture=no

Orders of training rows ("arms"):

    stream   as packed, one buffer over all shards: the leaderboard's program (leaderboard §6)
    shard    each shard packed alone, its rows in a seeded permutation: `data.split_long=false`
    window   the same rows in a permutation over all shards
    split    as shard, a cropped document's rest back in the buffer: `data.split_long=true`

"shard, 8 M" is shard with a tokenizer of 8 M characters, the others' has seen all of the training text.

Sets of validation rows: the packer's first, its last, a uniform sample of all, and a uniform sample of `split` rows,
which is one of all the text. A seed is that of the weights and of the permutations, and the shard that comes first;
differences are of equal seeds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from job.data.bigram import bigram_bpb
from job.data.documents import ByHash, Counts, documents
from job.data.embedded import open_embedded
from job.data.pack import BUFFER_DOCUMENTS, PackCounts, pack, permutation
from job.data.tokenizer import Tokenizer, train_tokenizer
from job.recipe.config import resolve
from job.recipe.derive import derive
from job.reporter import Reporter
from job.train.ranks import Ranks
from job.train.validation import bits_per_byte
from model.gpt import GPT
from model.optimizer import Optimizer

CORPUS = Path(__file__).parents[3] / "shared" / "data" / "corpus"
SEEDS = (0, 1, 2)
ARMS = ("shard", "stream", "split", "window")

needs_corpus = pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of real text is not beside this repository")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A preset that trains so, a model's depth and its rows, and steps of so many tokens."""

    preset: str
    depth: int
    seq_len: int
    vocab_size: int
    step_tokens: int
    steps: int
    val_tokens: int


SMALL = Shape("smoke", 2, 256, 4096, 2048, 500, 32_768)
LONG = Shape("cpu", 4, 512, 8192, 8192, 250, 524_288)
"""model, rows and steps of a run of the leaderboard's program and one of ours, which ended .016 apart"""


@dataclasses.dataclass
class Text:
    """Training documents by shard, and held-out ones."""

    shards: list[list[str]]
    held_out: list[str]


def corpus() -> Text:
    *train, val = sorted(CORPUS.glob("shard_*.parquet"))
    read = [pq.read_table(file, columns=["text"]).column(0).to_pylist() for file in (*train, val)]
    return Text(read[:-1], read[-1])


def embedded() -> Text:
    split, shards = ByHash(0.05), open_embedded().shards
    sides = [[list(documents(s, split, held_out=side, counts=Counts())) for s in shards] for side in (False, True)]
    return Text(sides[0], list(itertools.chain(*sides[1])))


def tokenizer_of(text: Text, vocab_size: int, max_chars: int = 10**9, document_chars: int = 10_000) -> Tokenizer:
    every = itertools.chain.from_iterable(text.shards)
    return train_tokenizer(every, vocab_size=vocab_size, max_chars=max_chars, document_chars=document_chars)[0]


class Packer:
    """The rows of a text."""

    def __init__(self, text: Text, tokenizer: Tokenizer, shape: Shape) -> None:
        self.tokenizer, self.shape = tokenizer, shape
        self.shards = [list(tokenizer.encode_documents(shard)) for shard in text.shards]
        self.held_out = list(tokenizer.encode_documents(text.held_out))

    def pack(self, ids: Iterable[np.ndarray], split_long: bool = False) -> np.ndarray:
        """(n, T+1) uint16, in the packer's order."""
        rows = pack(
            ids,
            row_tokens=self.shape.seq_len + 1,
            bos=self.tokenizer.bos_id,
            split_long=split_long,
            counts=PackCounts(),
            buffer_documents=BUFFER_DOCUMENTS,
        )
        return np.stack(list(rows))

    def train_rows(self, arm: str, seed: int) -> np.ndarray:
        """As many as the shape's steps take."""
        first = seed % len(self.shards)
        shards = self.shards[first:] + self.shards[:first]
        if arm == "stream":
            files = [self.pack(itertools.chain.from_iterable(shards))]
        else:
            files = [self.pack(shard, split_long=arm == "split") for shard in shards]
            files = [np.concatenate(files)] if arm == "window" else files
            files = [rows[permutation(len(rows), seed, index)] for index, rows in enumerate(files)]
        rows = np.concatenate(files)
        count = self.shape.steps * self.shape.step_tokens // self.shape.seq_len
        return rows[np.arange(count) % len(rows)]

    def validation_rows(self) -> dict[str, np.ndarray]:
        count = self.shape.val_tokens // self.shape.seq_len
        rows, split = self.pack(self.held_out), self.pack(self.held_out, split_long=True)

        def sample(rows: np.ndarray) -> np.ndarray:
            return rows[permutation(len(rows), "validation")[:count]]

        return {"first": rows[:count], "last": rows[-count:], "uniform": sample(rows), "all text": sample(split)}


Scores = dict[str, float]
"""bpb by the name of a set of validation rows"""


def scores_of_a_bigram_model(packer: Packer, rows: np.ndarray, seed: int, sets: dict[str, np.ndarray]) -> Scores:
    tokenizer = packer.tokenizer
    return {
        name: bigram_bpb([rows], val, tokenizer.token_bytes, tokenizer.vocab_size) or math.nan
        for name, val in sets.items()
    }


def scores_of_a_gpt(packer: Packer, rows: np.ndarray, seed: int, sets: dict[str, np.ndarray]) -> Scores:
    """A GPT trained on `rows` in their order."""
    shape = packer.shape
    values = {
        "model.depth": shape.depth,
        "model.seq_len": shape.seq_len,
        "data.vocab_size": shape.vocab_size,
        "train.total_batch_size": shape.step_tokens,
        "train.steps": shape.steps,
    }
    derived = derive(resolve(shape.preset, overrides=[f"{key}={value}" for key, value in values.items()]))
    model = GPT(derived.config)
    model.init_weights(seed)
    optimizer = Optimizer(model.groups(), derived.specs, polar_dtype=torch.float32)
    for step, block in enumerate(torch.from_numpy(rows.astype(np.int64)).split(derived.rows_per_step)):
        optimizer.begin_overlap()
        model.loss(block[:, :-1], block[:, 1:]).backward()
        optimizer.step(derived.schedule.at(step))
    model.freeze()
    options = {"block_rows": 8, "ranks": Ranks(), "reporter": Reporter()}
    return {name: bits_per_byte(model, v, packer.tokenizer.token_bytes, **options)["bpb"] for name, v in sets.items()}


def compare(
    title: str,
    runs: dict[str, tuple[Packer, str]],
    score: Callable[..., Scores],
    sets_of: Callable,
    seeds: tuple[int, ...] = SEEDS,
) -> None:
    """Learn and score each run with each seed; the table of differences from the first one."""
    measured: dict[str, list[Scores]] = {name: [] for name in runs}
    sets = {name: sets_of(packer) for name, (packer, _) in runs.items()}
    print(f"\n\n{title}: {next(iter(runs.values()))[0].shape}")
    for seed, (name, (packer, arm)) in itertools.product(seeds, runs.items()):
        measured[name].append(score(packer, packer.train_rows(arm, seed), seed, sets[name]))
        cells = "".join(f"{key:>10} {value:.4f}" for key, value in measured[name][-1].items())
        print(f"{name:12} seed {seed}{cells}", flush=True)
    base = next(iter(runs))
    print(f"bpb of {base}, and what the others differ from it by: mean of {len(seeds)} seeds (standard error)")
    for name, results in measured.items():
        line = f"{name:12}"
        for key in results[0]:
            pairs = zip(results, measured[base], strict=True)
            found = [one[key] - (other[key] if name != base else 0) for one, other in pairs]
            error = f"{statistics.stdev(found) / len(found) ** 0.5:.4f}" if len(found) > 1 else "one seed"
            line += f"{key:>10} {statistics.mean(found):+.4f} ({error})"
        print(line, flush=True)


@needs_corpus
@pytest.mark.parametrize("shape", [SMALL, LONG], ids=["small", "long"])
def test_orders_by_a_bigram_model(shape):
    text = corpus()
    packer = Packer(text, tokenizer_of(text, shape.vocab_size), shape)
    other = Packer(text, tokenizer_of(text, shape.vocab_size, 8_000_000), shape)
    runs = {arm: (packer, arm) for arm in ARMS} | {"shard, 8 M": (other, "shard")}
    compare("bigram", runs, scores_of_a_bigram_model, Packer.validation_rows)


@needs_corpus
def test_orders_by_a_gpt():
    text = corpus()
    packer = Packer(text, tokenizer_of(text, SMALL.vocab_size), SMALL)
    compare("d2", {arm: (packer, arm) for arm in ARMS}, scores_of_a_gpt, Packer.validation_rows)


@needs_corpus
def test_the_two_runs_that_ended_apart():
    """Ours and, in our own training, the rows and the tokenizer of the leaderboard's program; 40 minutes each."""
    text = corpus()
    ours, theirs = (Packer(text, tokenizer_of(text, LONG.vocab_size, chars), LONG) for chars in (8_000_000, 10**9))
    runs = {"ours": (ours, "shard"), "theirs": (theirs, "stream")}
    compare("d4", runs, scores_of_a_gpt, Packer.validation_rows, seeds=SEEDS[:1])


SAMPLES = {"8 M of 10 k": (8_000_000, 10_000), "10 k": (10**9, 10_000), "all": (10**9, 10**9)}
TEXTS = [pytest.param(corpus, marks=needs_corpus), embedded]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_a_token_by_the_tokenizer_s_sample(text):
    """Its most characters, of at most so many of a document."""
    text = text()
    size = sum(len(document.encode()) for document in text.held_out)
    for vocab_size, (name, sample) in itertools.product((4096, 8192), SAMPLES.items()):
        tokens = sum(map(len, tokenizer_of(text, vocab_size, *sample).encode_documents(text.held_out)))
        print(f"\nV {vocab_size}, {name:12} {size / tokens:.4f} bytes a token of held-out text", end="", flush=True)


@pytest.mark.parametrize("text", TEXTS)
def test_bpb_by_the_tokenizer_s_sample(text):
    """Of a bigram model on the same whole documents after as many tokens: a longer token is more text."""
    text, shape = text(), dataclasses.replace(SMALL, vocab_size=8192)
    tokenizers = {name: tokenizer_of(text, shape.vocab_size, *sample) for name, sample in SAMPLES.items()}
    runs = {name: (Packer(text, tokenizer, shape), "split") for name, tokenizer in tokenizers.items()}

    def sets_of(packer: Packer) -> dict[str, np.ndarray]:
        return {"all text": packer.pack(packer.held_out, split_long=True)}

    compare(f"bigram, {text.held_out[0][:20]!r} ...", runs, scores_of_a_bigram_model, sets_of)
