"""Tables about the data stage: encoding and packing, reading rows, training the tokenizer, bytes per token.

    pytest tests/bench/bench_data.py --override-ini "python_files=bench_*.py" --capture=no

Two ways of doing the same are measured in turns, chunk by chunk, in processor seconds of one thread, so that the
ratio holds on a busy machine.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiktoken

from job.data import embedded
from job.data.pack import PackCounts, pack
from job.data.rows import Rows
from job.data.tokenizer import SPLIT_PATTERN, Tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
TRAIN = sorted((DATA / "corpus").glob("shard_0000[0-3].parquet"))
CHUNK = 256
ROW_TOKENS = 2049

pytestmark = pytest.mark.skipif(not TRAIN, reason="the corpus of real text is not beside this repository")


def texts(file: Path) -> list[str]:
    return [text for text in pq.read_table(file, columns=["text"]).column(0).to_pylist() if text]


@pytest.fixture(scope="module", params=[4096, 32768])
def tokenizer(request) -> Tokenizer:
    return train_tokenizer(texts(TRAIN[0]), vocab_size=request.param, max_chars=10**9, document_chars=10_000)[0]


def linear_rows(documents: Iterable[list[int]], bos: int, counts: PackCounts) -> Iterator[np.ndarray]:
    """The straightforward way: 1000 lists of ids in a list, all of them looked at for each one taken (leaderboard
    §6)."""
    source, buffer = iter(documents), []
    row, filled = np.empty(ROW_TOKENS, np.uint16), 0
    while True:
        while len(buffer) < 1000 and (ids := next(source, None)) is not None:
            counts.tokens += len(ids) + 1
            buffer.append([bos, *ids])
        if not buffer:
            counts.cropped_tokens += filled
            return
        space, best, longest = ROW_TOKENS - filled, -1, 0
        for index, ids in enumerate(buffer):
            if longest < len(ids) <= space:
                best, longest = index, len(ids)
        if best >= 0:
            ids = buffer.pop(best)
        else:
            ids = buffer.pop(min(range(len(buffer)), key=lambda index: len(buffer[index])))
            counts.cropped_tokens += len(ids) - space
            ids = ids[:space]
        row[filled : filled + len(ids)] = ids
        filled += len(ids)
        if filled == ROW_TOKENS:
            counts.rows += 1
            yield row
            row, filled = np.empty(ROW_TOKENS, np.uint16), 0


class Clock:
    """Processor seconds spent in an iterator, without those of its consumer."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, items: Iterable) -> Iterator:
        iterator = iter(items)
        while True:
            began = time.process_time()
            item = next(iterator, None)
            self.seconds += time.process_time() - began
            if item is None:
                return
            yield item


def in_turns(*iterators: Iterator) -> None:
    """Exhaust iterators, CHUNK items of each in turn."""
    left = list(iterators)
    while left:
        left = [iterator for iterator in left if len(list(itertools.islice(iterator, CHUNK))) == CHUNK]


def test_encode_and_pack(tokenizer):
    print(f"\n\nV {tokenizer.vocab_size}: million tokens a second and core, 15 MB shards of text, T = {ROW_TOKENS - 1}")
    print(f"{'':28}{'tiktoken + linear':>20}{'ours':>10}{'ratio':>8}{'crop, linear':>15}{'crop, ours':>13}")
    tokenizer.encode("")
    list(tokenizer.encode_documents([""]))
    for file in TRAIN[1:]:
        documents = texts(file)
        plain, ours, plain_counts, our_counts = Clock(), Clock(), PackCounts(), PackCounts()
        linear = linear_rows(map(tokenizer.encode, documents), tokenizer.bos_id, plain_counts)
        encoded = tokenizer.encode_documents(documents)
        fast = pack(encoded, row_tokens=ROW_TOKENS, bos=tokenizer.bos_id, split_long=False, counts=our_counts)
        in_turns(plain.timed(linear), ours.timed(fast))
        assert plain_counts.tokens == our_counts.tokens
        rates = [our_counts.tokens / clock.seconds / 1e6 for clock in (plain, ours)]
        crops = [counts.cropped_tokens / counts.tokens for counts in (plain_counts, our_counts)]
        name = f"{file.name}, encode + pack"
        print(f"{name:36}{rates[0]:12.2f}{rates[1]:10.2f}{rates[1] / rates[0]:8.2f}{crops[0]:15.4f}{crops[1]:13.4f}")
        plain, ours = Clock(), Clock()
        in_turns(plain.timed(map(tokenizer.encode, documents)), ours.timed(tokenizer.encode_documents(documents)))
        rates = [(our_counts.tokens - len(documents)) / clock.seconds / 1e6 for clock in (plain, ours)]
        print(f"{'    encode alone, text seen before':36}{rates[0]:12.2f}{rates[1]:10.2f}{rates[1] / rates[0]:8.2f}")


def test_rows(tmp_path):
    class Stored:
        is_whole, seq_len, row_files = True, ROW_TOKENS - 1, [tmp_path / "0.npy", tmp_path / "1.npy"]

    for file in Stored.row_files:
        np.save(file, np.zeros((4000, ROW_TOKENS), np.uint16))
    rows, buffer = Rows(Stored(), seed=1), np.empty((32, ROW_TOKENS), np.uint16)
    print("\n\nRows.take into a preallocated buffer of 32 rows, million tokens a second and process")
    for epoch in (0, 1):
        rows.take(epoch * len(rows), len(rows))
        began = time.process_time()
        for start in range(0, len(rows), 32):
            rows.take(epoch * len(rows) + start, 32, out=buffer)
        speed = len(rows) * ROW_TOKENS / (time.process_time() - began) / 1e6
        print(f"epoch {epoch} {'as stored' if epoch == 0 else 'permuted':10} {speed:8.0f}")


TRAINERS = {
    "rustbpe (ours)": """
from job.data.tokenizer import train_tokenizer
train_tokenizer(documents(), vocab_size=V, max_chars=10**9, document_chars=10_000)
""",
    "tokenizers": """
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from job.data.tokenizer import SPLIT_PATTERN
tokenizer = Tokenizer(models.BPE())
split = pre_tokenizers.Split(Regex(SPLIT_PATTERN.replace("?+", "?").replace("++", "+")), "isolated")
as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=V - 9, initial_alphabet=alphabet, show_progress=False)
tokenizer.train_from_iterator((text[:10_000] for text in documents()), trainer)
""",
}
PROLOGUE = """
import re, sys, time
import pyarrow.parquet as pq
V = 32768
def megabytes(key):
    with open("/proc/self/status") as status:
        return int(re.search(rf"{key}:\\s+(\\d+) kB", status.read())[1]) / 1024
def documents():
    for file in sys.argv[1:]:
        for batch in pq.ParquetFile(file).iter_batches(256, columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text)
characters = sum(min(len(text), 10_000) for text in documents())
import rustbpe, tokenizers
before, began, cpu = megabytes("VmRSS"), time.perf_counter(), time.process_time()
"""
EPILOGUE = """
peak = megabytes("VmHWM")
print(characters, time.perf_counter() - began, time.process_time() - cpu, peak, peak - before)
"""


def test_tokenizer_training():
    pytest.importorskip("tokenizers", reason="the other trainer is not a dependency: pip install tokenizers")
    print("\n\ntraining a vocabulary of 32768 on one thread")
    print(f"{'':20}{'text':>12}{'seconds':>10}{'CPU s':>8}{'peak MB':>10}{'above start MB':>16}")
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for files in (TRAIN[:1], TRAIN[:2], TRAIN):
        for name, code in TRAINERS.items():
            command = [sys.executable, "-c", PROLOGUE + code + EPILOGUE, *map(str, files)]
            answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
            characters, seconds, cpu, peak, above = map(float, answer)
            print(f"{name:20}{characters / 1e6:9.1f} MB{seconds:10.2f}{cpu:8.2f}{peak:10.0f}{above:16.0f}")


def kinds() -> dict[str, list[str]]:
    shards = embedded.open_embedded().shards
    code = [text for text in itertools.islice(shards[0].texts(), 200) if text and "import " in text]
    kinds = {
        "books, textbooks, web (held out)": texts(DATA / "corpus" / "shard_00008.parquet")[:500],
        "Python's reference": list(topics.values()),
        "Python's sources": code,
        "numbers": [" ".join(str(number**3) for number in range(start, start + 500)) for start in range(0, 5000, 500)],
    }
    core = DATA / "core" / "core_bundle.tar.zst"
    if core.is_file():
        from job.evaluation.bundle import open_bundle

        kinds["CORE's items"] = [
            json.dumps(example, ensure_ascii=False)
            for task in open_bundle(core).tasks
            for example in task.examples[:100]
        ]
    return kinds


GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT4_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)


def published(name: str, pattern: str) -> Callable[[str], list[int]]:
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(DATA / "tokenizers" / name))
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_ordinary


def test_bytes_per_token():
    own = train_tokenizer(
        itertools.chain.from_iterable(map(texts, TRAIN)), vocab_size=32768, max_chars=10**9, document_chars=10_000
    )[0]
    encoders = {
        "GPT-2, 50257": published("r50k_base.tiktoken", GPT2_PATTERN),
        "GPT-4, 100277": published("cl100k_base.tiktoken", GPT4_PATTERN),
        "ours, 32768": own.encode,
    }
    assert own.pattern == SPLIT_PATTERN
    print("\n\nbytes per token, ours trained on 60 MB of books, textbooks and web pages")
    print(f"{'':36}" + "".join(f"{name:>16}" for name in encoders))
    for kind, samples in kinds().items():
        size = sum(len(text.encode()) for text in samples)
        figures = [size / sum(len(encode(text)) for text in samples) for encode in encoders.values()]
        print(f"{kind:36}" + "".join(f"{figure:16.3f}" for figure in figures))
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
