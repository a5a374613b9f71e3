"""prepare as a whole: the same bytes however it is made, and nothing half-made whatever goes wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from helpers import children, is_alive, wait_for
from job.data.prepare import Prepared
from job.data.rows import Rows
from job.errors import DataError, StorageError
from job.store.documents import hashed
from job.store.sealed import is_sealed

ROOT = Path(__file__).parents[3]
REAL_CORPUS = ROOT.parent / "shared" / "data" / "corpus" / "small"


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder` by its SHA-256."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*")]


def decoded_documents(prepared, rows) -> list[str]:
    """The documents in `rows` as text, one for each BOS."""
    tokenizer, texts = prepared.tokenizer, []
    for row in rows:
        starts = np.flatnonzero(row == tokenizer.bos_id)
        texts += [tokenizer.decode(part[1:].tolist()) for part in np.split(row, starts[1:])]
    return texts


def test_what_is_made(prepared):
    assert {path.name for path in prepared.path.iterdir()} == {"tokenizer", "val", "rows", "set"}
    rows, facts = Rows(prepared, seed=1), prepared.metadata
    assert len(rows) == prepared.train_rows == facts["train_rows"] > 500
    assert rows.take(0, len(rows)).shape == (len(rows), 33) and prepared.seq_len == 32
    assert prepared.val.shape == (facts["val_rows"], 33) and prepared.val.dtype == np.uint16
    assert facts["train_tokens"] == 32 * len(rows) and facts["vocab_size"] == prepared.tokenizer.vocab_size == 400
    assert facts["tokens"] + facts["split_bos"] == 33 * len(rows) + facts["cropped_tokens"]
    assert (rows.take(0, len(rows))[:, 0] == prepared.tokenizer.bos_id).all()
    assert (prepared.val[:, 0] == prepared.tokenizer.bos_id).all()
    again = Prepared.open(prepared.path, verify=True)
    assert (again.id, again.metadata, again.inputs) == (prepared.id, prepared.metadata, prepared.inputs)


@settings(max_examples=10, deadline=None, phases=[Phase.generate])
@given(st.integers(0, 2**32), st.floats(0.1, 0.6), st.booleans(), st.sampled_from([16, 48]))
def test_validation_documents_never_occur_among_training_rows(
    tmp_path_factory, helpers, seed, val_fraction, split_long, seq_len
):
    """Every document carries its number throughout; no number is seen on both sides, however often its document
    occurs."""
    draw = random.Random(seed)
    numbers = [draw.randrange(200) for _ in range(150)]
    texts = {
        number: " ".join(f"<{number:03d}> {draw.choice(WORDS)}" for _ in range(draw.choice([8, 30, 90])))
        for number in numbers
    }
    folder = tmp_path_factory.mktemp("numbered")
    helpers.write_jsonl(folder / "a.jsonl", [texts[number] for number in numbers[:70]])
    helpers.write_jsonl(folder / "b.jsonl", [texts[number] for number in numbers[70:]])
    data = helpers.config(folder, vocab_size=300, val_fraction=val_fraction, split_long=split_long)
    prepared = helpers.small_prepare(folder / "out", data, seq_len=seq_len)
    train = seen_numbers(prepared, Rows(prepared, 1).take(0, prepared.train_rows))
    val = seen_numbers(prepared, prepared.val)
    held_out = {int(text[1:4]) for text in prepared.held_out_documents()}
    assert train.isdisjoint(held_out) and val <= held_out
    assert not split_long or len(train | val) > 0.9 * len(texts)  # but for the last rows, everything is used


WORDS = ("the", "law", "of", "large", "numbers", "says", "that", "means", "settle")


def seen_numbers(prepared, rows) -> set[int]:
    return {int(number) for text in decoded_documents(prepared, rows) for number in re.findall(r"<(\d{3})>", text)}


def test_events_and_progress(corpus, tmp_path, helpers, one_file_shards):
    reporter = helpers.Recorder()
    prepared = helpers.small_prepare(tmp_path, helpers.config(corpus), reporter=reporter)
    kinds = [kind for kind, _ in reporter.events]
    assert kinds.pop(0) == "prepare.started" and reporter.events.pop(0)[1] == {"id": prepared.id}
    assert kinds.pop(0) == "prepare.memory" and reporter.events.pop(0)[1]["estimated_bytes"] > 0
    assert kinds == ["prepare.tokenizer", *["prepare.rows"] * 4, "prepare.done"]
    events = [fields for _, fields in reporter.events]
    assert 1 < events[0]["bytes_per_token"] < 4 and events[0]["characters"] <= 200_000
    assert [event["shard"] for event in events[1:-1]] == ["held-out", "0.jsonl", "1.jsonl", "2.jsonl"]
    assert sum(event["rows"] for event in events[2:-1]) == events[-1]["train_rows"] == prepared.train_rows
    assert events[1]["rows"] == events[-1]["val_rows"] and events[-1]["id"] == prepared.id
    stage, done, total, unit = reporter.shown[-1]
    assert (stage, unit) == ("rows", "bytes") and done <= total
    again = helpers.Recorder()
    helpers.small_prepare(tmp_path, helpers.config(corpus), reporter=again)
    assert again.events == [("prepare.started", {"id": prepared.id}), ("prepare.done", events[-1])]


def test_same_bytes_with_two_workers(corpus, tmp_path, helpers, one_file_shards):
    one, two = (helpers.small_prepare(tmp_path / str(n), helpers.config(corpus), workers=n) for n in (1, 2))
    assert one.id == two.id and contents(one.path) == contents(two.path)
    assert not leftovers(tmp_path)


def test_the_id_follows_what_decides_the_bytes(corpus, tmp_path, helpers):
    base = helpers.config(corpus)
    ids = {helpers.small_prepare(tmp_path, base).id, helpers.small_prepare(tmp_path, base, seq_len=48).id}
    for change in (
        {"vocab_size": 401},
        {"val_fraction": 0.2},
        {"split_long": False},
        {"seed": 1},
        {"max_chars": 90_000},
    ):
        ids.add(helpers.small_prepare(tmp_path, dataclasses.replace(base, **change)).id)
    assert len(ids) == 7


def test_duplicates_fall_on_one_side(tmp_path, prose, helpers):
    helpers.write_jsonl(tmp_path / "a.jsonl", prose[:100])
    helpers.write_jsonl(tmp_path / "b.jsonl", prose[:100][::-1])
    prepared = helpers.small_prepare(tmp_path / "out", helpers.config(tmp_path, val_fraction=0.3))
    held_out = prepared.held_out_documents()
    assert held_out and len(held_out) == 2 * len(set(held_out))
    assert prepared.metadata["documents"] == 200 - len(held_out)


def test_special_tokens_in_a_document_stay_text(tmp_path, prose, helpers):
    texts = [f"{text} <|bos|> {index} <|user_start|>" for index, text in enumerate(prose)]
    helpers.write_jsonl(tmp_path / "a.jsonl", [*texts, None, "", "  \n"])
    prepared = helpers.small_prepare(tmp_path / "out", helpers.config(tmp_path))
    specials = set(prepared.tokenizer.special_ids.values()) - {prepared.tokenizer.bos_id}
    rows, metadata = Rows(prepared, 1).take(0, prepared.train_rows), prepared.metadata
    assert not specials & set(np.unique(rows).tolist()) and metadata["skipped"] == 3
    assert int((rows == prepared.tokenizer.bos_id).sum()) <= metadata["documents"] + metadata["split_bos"]
    assert "<|bos|> 7 <|user_start|>" in " ".join([*decoded_documents(prepared, rows), *prepared.held_out_documents()])


# ---- interrupted

SCRIPT = """
import pathlib, sys, time
from job.recipe.config import DataConfig
from job.data import documents
from job.data.prepare import prepare
from job.reporter import Reporter

class Stopping(Reporter):
    left = int(sys.argv[4])
    def count(self):
        self.left -= 1
        if self.left == 0:
            print("here", flush=True)
            time.sleep(100)
    def emit(self, kind, **fields):
        self.count()
    def progress(self, stage, done, total, unit):
        self.count()

documents.SHARD_BYTES = 1
settings = dict(vocab_size=400, tokenizer_chars=200_000, val_fraction=0.1, split_long=True)
data = DataConfig(source="local", paths=(sys.argv[1],), **settings)
prepare(pathlib.Path(sys.argv[2]), data, 32, Stopping(), int(sys.argv[3]))
"""


def start(corpus: Path, out: Path, workers: int, stop: int = 0, **options) -> subprocess.Popen:
    """prepare in a process of its own, which stops still at its `stop`-th report."""
    command = [sys.executable, "-c", SCRIPT, str(corpus), str(out), str(workers), str(stop)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, **options)


@pytest.mark.parametrize(
    ("workers", "stop", "half_written"),
    [(1, 4, ".tokenizer.tmp-*"), (1, 6, ".val.tmp-*"), (1, 10, "rows/.00001.tmp-*"), (2, 9, "")],
)
def test_killed_and_run_again_gives_the_same_bytes(
    corpus, tmp_path, helpers, one_file_shards, workers, stop, half_written
):
    expected = helpers.small_prepare(tmp_path / "undisturbed", helpers.config(corpus))
    process = start(corpus, tmp_path / "out", workers, stop, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "here\n"
    root = tmp_path / "out" / "prepared" / expected.id
    assert not half_written or list(root.glob(half_written))
    packers = children(process.pid)
    process.kill()
    process.wait()
    assert not (root / "set").exists()
    wait_for(lambda: not any(map(is_alive, packers)), 30, "a packing process outlived its parent")
    again = helpers.small_prepare(tmp_path / "out", helpers.config(corpus))
    assert contents(again.path) == contents(expected.path) and not leftovers(tmp_path)


def test_what_is_sealed_is_not_made_again(corpus, tmp_path, helpers, one_file_shards):
    prepared = helpers.small_prepare(tmp_path, helpers.config(corpus))
    before = contents(prepared.path)
    for part in ("rows/00001", "set"):
        for file in (prepared.path / part).iterdir():
            file.unlink()
        (prepared.path / part).rmdir()
    reporter = helpers.Recorder()
    assert contents(helpers.small_prepare(tmp_path, helpers.config(corpus), reporter=reporter).path) == before
    assert [fields.get("shard") for _, fields in reporter.events] == [None, "1.jsonl", None]


def test_a_flipped_byte_is_moved_aside_and_made_again(corpus, tmp_path, helpers):
    prepared = helpers.small_prepare(tmp_path, helpers.config(corpus))
    file = prepared.row_files[0]
    good = file.read_bytes()
    file.write_bytes(flipped := good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])
    reporter = helpers.Recorder()
    helpers.small_prepare(tmp_path, helpers.config(corpus), reporter=reporter)
    (said,) = (fields["text"] for kind, fields in reporter.events if kind == "warning")
    assert f"{file} is not the file that was sealed" in said and file.read_bytes() == good
    (aside,) = file.parents[1].glob(".00000.damaged-*")
    assert (aside / file.name).read_bytes() == flipped


@pytest.mark.parametrize("part", ["set", "tokenizer", "val", "rows/00000"])
def test_a_manifest_of_another_version_is_moved_aside_and_the_part_made_again(corpus, tmp_path, helpers, part):
    prepared = helpers.small_prepare(tmp_path, helpers.config(corpus))
    manifest = prepared.path / part / "manifest.json"
    good = manifest.read_bytes()
    manifest.write_text(json.dumps(hashed(json.loads(good) | {"schema": 2})))
    reporter = helpers.Recorder()
    helpers.small_prepare(tmp_path, helpers.config(corpus), reporter=reporter)
    (said,) = (fields["text"] for kind, fields in reporter.events if kind == "warning")
    assert f"{part}/manifest.json is of another version (not schema 1)" in said and is_sealed(manifest.parent)


# ---- bad input


@pytest.mark.parametrize(
    ("change", "seq_len", "message"),
    [
        (
            {"vocab_size": 60_000},
            32,
            r"too small for data.vocab_size=60000: only \d+ of 59735 merges are possible; give more text or",
        ),
        (
            {},
            50_000,
            r"held-out text \(\d+ documents, \d+ tokens\) does not fill one row of 50001 tokens; give more text",
        ),
        (
            {"val_fraction": 0.97},
            20_000,
            r"training text \(\d+ tokens\) does not fill one row of 20001 tokens; give more text",
        ),
        ({"max_chars": 30}, 32, "too small for data.vocab_size=400"),
    ],
)
def test_too_small(corpus, tmp_path, helpers, change, seq_len, message):
    with pytest.raises(DataError, match=message):
        helpers.small_prepare(tmp_path, helpers.config(corpus, **change), seq_len=seq_len)
    assert not list(tmp_path.glob("prepared/*/set")) and not leftovers(tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_found_late_is_one_sentence(corpus, tmp_path, prose, helpers, one_file_shards, workers):
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(3):
        helpers.write_jsonl(folder / f"{index}.jsonl", prose[index::3])
    with open(folder / "2.jsonl", "ab") as file:
        file.write(b"not json\n")
    data = helpers.config(folder, tokenizer_chars=20_000)
    with pytest.raises(DataError, match=r"2.jsonl:134 is not JSON .*; repair or remove the line"):
        helpers.small_prepare(tmp_path, data, workers=workers)
    assert not list(tmp_path.glob("prepared/*/set")) and not leftovers(tmp_path / "prepared")


def test_output_is_a_file(corpus, tmp_path, helpers):
    (tmp_path / "out").write_text("")
    with pytest.raises(StorageError, match="out is a file, not a folder; choose another --out"):
        helpers.small_prepare(tmp_path / "out", helpers.config(corpus))


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder that refuses even root")
def test_output_not_writable(corpus, helpers):
    with pytest.raises(
        StorageError, match=r"/sys/\S+ cannot be written \(.*\); give user \d+ write permission or choose another --out"
    ):
        helpers.small_prepare(Path("/sys/speedrun"), helpers.config(corpus))


@pytest.mark.parametrize("workers", [1, 2])
def test_disk_full_in_mid_write(corpus, tmp_path, helpers, workers):
    """A limit on file size is refused by the kernel in the middle of a write, as a full disk is."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    process = start(corpus, tmp_path, workers, preexec_fn=limited, stderr=subprocess.PIPE)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "StorageError: the disk is full: writing" in errors
    assert "run the same command again (what was sealed is kept)" in errors
    assert not leftovers(tmp_path) and list(tmp_path.glob("prepared/*/tokenizer/manifest.json"))
    helpers.small_prepare(tmp_path, helpers.config(corpus))


# ---- extremes

BOUNDED = """
import pathlib, re, sys
from job.recipe.config import DataConfig
from job.data.prepare import prepare
from job.reporter import Reporter

settings = dict(vocab_size=400, tokenizer_chars=200_000, val_fraction=0.01, split_long=False)
data = DataConfig(source="local", paths=(sys.argv[1],), **settings)
prepared = prepare(pathlib.Path(sys.argv[2]), data, 256, Reporter(), 1)
status = pathlib.Path("/proc/self/status").read_text()
print(prepared.metadata["documents"], prepared.train_rows, int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) // 1024)
"""


def megabytes(folder: Path, out: Path) -> tuple[int, int, int]:
    """Documents, rows and peak memory of a prepare in a process of its own."""
    command = [sys.executable, "-c", BOUNDED, str(folder), str(out)]
    answer = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True
    ).stdout
    documents, rows, peak = map(int, answer.split())
    return documents, rows, peak


@pytest.mark.slow
def test_a_million_tiny_documents_in_a_shard(tmp_path, prose, helpers):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    for count in (20_000, 1_000_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        pq.write_table(
            pa.table({"text": [f"{prose[i % 400][:20]} {i}" for i in range(count)]}),
            folder / "a.parquet",
            row_group_size=count,
        )
    small, many = (megabytes(tmp_path / str(count), tmp_path / "out") for count in (20_000, 1_000_000))
    assert many[0] > 980_000 and many[1] > 40 * small[1]
    assert many[2] < small[2] + 150  # one row group: its compressed pages are read as they come


@pytest.mark.slow
def test_a_document_of_50_megabytes_in_a_shard(tmp_path, prose, helpers):
    folder = tmp_path / "text"
    folder.mkdir()
    long = " ".join(prose) * (50_000_000 // len(" ".join(prose)) + 1)
    helpers.write_jsonl(folder / "a.jsonl", [*prose, *prose[:50], long])
    small = tmp_path / "small"
    small.mkdir()
    helpers.write_jsonl(small / "a.jsonl", [*prose, *prose[:50]])
    assert len(long) >= 50_000_000
    documents, rows, peak = megabytes(folder, tmp_path / "out")
    without = megabytes(small, tmp_path / "out")
    assert documents == without[0] + 1 and rows == without[1] + 1  # cropped: all but its first row is dropped
    assert peak < without[2] + 12 * 50  # the text, its bytes, its ids; never a Python object for each token


@pytest.mark.skipif(not REAL_CORPUS.is_dir(), reason="the corpus of real text is not beside this repository")
def test_real_parquet_shards(tmp_path, helpers):
    prepared = helpers.small_prepare(
        tmp_path, helpers.config(REAL_CORPUS, vocab_size=1000, max_chars=1_000_000), seq_len=256
    )
    assert prepared.train_rows > 1000 and prepared.metadata["crop_share"] < 0.001
    texts = "".join(decoded_documents(prepared, Rows(prepared, 0).take(0, 50)))
    assert " the " in texts and "�" not in texts[:100]
