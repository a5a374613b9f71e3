"""Named datasets: which shards, from a hub on loopback, and one sentence for everything that can go wrong on the
way."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from job.data.hub import DATASETS, endpoint, headers, recorded_identity
from job.data.rows import Rows
from job.errors import DataError, StorageError, UsageError
from job.store import open_store

ROOT = Path(__file__).parents[3]
SHARD = "shard_{:05d}.parquet".format
NAMES = [SHARD(index) for index in range(6)]


def text_folder(out: Path) -> Path:
    commit = json.loads((out / "text" / "climbmix" / "commit.json").read_text())["commit"]
    return out / "text" / "climbmix" / commit


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_whole_dataset(hub, tmp_path, helpers, prose, monkeypatch):
    monkeypatch.setattr("job.data.hub.PARALLEL", 1)
    reporter = helpers.Recorder()
    prepared = helpers.small_prepare(tmp_path, helpers.of_the_hub(), reporter=reporter)
    assert hub.fetched() == [NAMES[-1], *NAMES[:-1]]
    assert [len(file) for file in map(np.load, prepared.row_files)] == [
        file["rows"] for file in prepared.metadata["files"]
    ]
    assert prepared.metadata["documents"] == 147 and len(prepared.metadata["files"]) == 5 and prepared.is_whole
    assert prepared.held_out_documents() == prose[150:170] + prose[:3]
    assert {path.name for path in text_folder(tmp_path).iterdir()} == {*NAMES, "files.json"}
    _, done, total, unit = [shown for shown in reporter.shown if shown[0] == "fetch"][-1]
    assert (done, unit) == (total, "bytes") and total == sum(map(len, hub.files.values()))


def test_only_the_shards_that_the_run_needs_by_name(hub, tmp_path, helpers):
    whole = helpers.small_prepare(tmp_path / "whole", helpers.of_the_hub(tokenizer_chars=20_000))
    files = [file["rows"] for file in whole.metadata["files"]]
    hub.requests.clear()
    data, out = helpers.of_the_hub(tokenizer_chars=20_000), tmp_path / "out"
    short = helpers.small_prepare(out, data, rows=files[0] + 1)
    assert (
        short.id == whole.id
        and short.metadata["files"] == whole.metadata["files"][:2]
        and short.train_rows == sum(files[:2])
    )
    assert set(hub.fetched()) <= {NAMES[-1], *NAMES[:3]}
    asked = [path for method, path, _ in hub.requests if method == "GET"]
    assert not any("tree" in path for path in asked)
    hub.requests.clear()
    helpers.small_prepare(out, data, rows=files[0] + 1)
    assert hub.requests == []
    longer = helpers.small_prepare(out, data, rows=sum(files) - 1)
    assert longer.id == whole.id and contents(longer.path) == contents(whole.path)
    assert np.array_equal(Rows(longer, 1).take(0, short.train_rows), Rows(short, 1).take(0, short.train_rows))


def test_the_commit_is_resolved_once_and_the_stated_hashes_are_kept(hub, tmp_path, helpers):
    first = helpers.small_prepare(tmp_path, helpers.of_the_hub())
    commits = [path for _, path, _ in hub.requests if path.endswith("/revision/main")]
    assert len(commits) == 1
    hub.requests.clear()
    second = helpers.small_prepare(tmp_path, helpers.of_the_hub(vocab_size=401))
    assert hub.requests == [] and second.id != first.id
    assert first.inputs["text"] == {
        "source": "climbmix",
        "repo": "karpathy/climbmix-400b-shuffle",
        "commit": second.inputs["text"]["commit"],
    }


def test_same_bytes_with_two_workers(hub, tmp_path, helpers):
    one, two = (helpers.small_prepare(tmp_path / str(n), helpers.of_the_hub(), workers=n) for n in (1, 2))
    assert one.id == two.id and contents(one.path) == contents(two.path)


def test_a_tenth_of_the_documents_of_validation_among_training_is_none(hub, tmp_path, helpers, prose):
    """Three documents of the validation shard stand in training shards too: they are left out there."""
    prepared = helpers.small_prepare(tmp_path, helpers.of_the_hub())
    rows = Rows(prepared, 1).take(0, prepared.train_rows)
    text = prepared.tokenizer.decode(rows.ravel().tolist())
    assert (
        all(document[:30] not in text for document in prose[:3])
        and sum(document[:30] in text for document in prose[3:150]) > 50
    )


def test_max_chars_is_refused(tmp_path, helpers):
    with pytest.raises(UsageError, match=r"data.max_chars=5 cannot be used with climbmix: .*; give 0"):
        helpers.small_prepare(tmp_path, helpers.of_the_hub(max_chars=5))


# ---- faults that pass


@pytest.mark.parametrize(
    ("fault", "seconds"), [("truncated", 0), ("stalled", 1), ("html", 0), ((429, 2), 2), (503, 0)], ids=str
)
def test_a_passing_fault_costs_only_time(hub, tmp_path, helpers, fault, seconds):
    expected = helpers.small_prepare(tmp_path / "undisturbed", helpers.of_the_hub())
    hub.requests.clear()
    hub.times.clear()
    hub.faults[NAMES[1]] = [fault]
    reporter = helpers.Recorder()
    prepared = helpers.small_prepare(tmp_path / "out", helpers.of_the_hub(), reporter=reporter)
    assert contents(prepared.path) == contents(expected.path)
    assert [done == total for stage, done, total, _ in reporter.shown if stage == "fetch"][-1]
    tries = [
        (at, wanted) for at, (_, path, wanted) in zip(hub.times, hub.requests, strict=True) if path.endswith(NAMES[1])
    ]
    assert len(tries) == 2 and tries[1][0] - tries[0][0] >= seconds
    resumed = {"truncated", "stalled"}
    assert (tries[1][1] is not None) == (fault in resumed)
    if fault in resumed:
        half, start = len(hub.files[NAMES[1]]) // 2, int(tries[1][1].removeprefix("bytes=").removesuffix("-"))
        assert half - 1024 < start <= half


@pytest.mark.parametrize("question", ["main", "paths-info"])
def test_a_busy_hub_is_asked_again(hub, tmp_path, helpers, question):
    name = question if question == "main" else "0123456789abcdef0123456789abcdef01234567"
    hub.faults[name] = [(429, 1)]
    helpers.small_prepare(tmp_path, helpers.of_the_hub())
    times = [at for at, (_, path, _) in zip(hub.times, hub.requests, strict=True) if path.endswith("/" + name)]
    assert len(times) >= 2 and times[1] - times[0] >= 1


# ---- faults that stay


def test_another_sha256(hub, tmp_path, helpers):
    hub.serve(NAMES[2], hub.files[NAMES[2]], oid="0" * 64)
    with pytest.raises(
        DataError,
        match=rf"{NAMES[2]} of \S+ cannot be fetched: its SHA-256 is not .* \(3 attempts\); check HF_ENDPOINT",
    ):
        helpers.small_prepare(tmp_path, helpers.of_the_hub())
    assert hub.fetched().count(NAMES[2]) == 3 and not (text_folder(tmp_path) / NAMES[2]).exists()
    assert not list(tmp_path.glob("prepared/*/set"))
    hub.serve(NAMES[2], hub.files[NAMES[2]])
    (text_folder(tmp_path) / "files.json").unlink()
    hub.requests.clear()
    helpers.small_prepare(tmp_path, helpers.of_the_hub())
    assert NAMES[2] in hub.fetched() and NAMES[0] not in hub.fetched()


def test_a_page_in_the_place_of_a_file(hub, tmp_path, helpers):
    hub.faults[NAMES[2]] = ["html"] * 9
    with pytest.raises(
        DataError, match=rf"{NAMES[2]} of \S+ cannot be fetched: the answer has another size than the hub states"
    ):
        helpers.small_prepare(tmp_path, helpers.of_the_hub())


def test_a_page_in_the_place_of_an_answer(hub, tmp_path, helpers):
    hub.faults["main"] = ["html"] * 9
    with pytest.raises(
        DataError, match="answered with something else than JSON; check HF_ENDPOINT and the proxy settings"
    ):
        helpers.small_prepare(tmp_path, helpers.of_the_hub())


def test_a_shard_that_the_hub_does_not_know(hub, tmp_path, helpers):
    del hub.stated[NAMES[3]]
    with pytest.raises(DataError, match=rf"has no {NAMES[3]} with a stated SHA-256 at commit 0123456789"):
        helpers.small_prepare(tmp_path, helpers.of_the_hub())


def test_404_for_one_shard(hub, tmp_path, helpers):
    del hub.files[NAMES[3]]
    with pytest.raises(
        DataError, match=rf"{NAMES[3]} of \S+ cannot be fetched: HTTP 404; check HF_ENDPOINT \(http://127"
    ):
        helpers.small_prepare(tmp_path, helpers.of_the_hub(), workers=2)
    assert hub.fetched().count(NAMES[3]) == 1


def test_no_hub_at_all(tmp_path, helpers, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("job.data.hub.ATTEMPTS", 1)
    with pytest.raises(
        DataError,
        match=r"the hub cannot be asked about karpathy/climbmix-400b-shuffle \(.*refused.*\); check the network",
    ):
        helpers.small_prepare(tmp_path, helpers.of_the_hub())


@pytest.mark.parametrize("token", ["two\nlines", "caf\u00e9", "\u2603"])
def test_a_token_that_is_no_header_is_named(hub, tmp_path, helpers, monkeypatch, token):
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: token)
    with pytest.raises(DataError, match="HF_TOKEN") as refused:
        helpers.small_prepare(tmp_path, helpers.of_the_hub())
    assert token not in str(refused.value)


def test_offline_is_said_and_what_is_here_is_used(hub, tmp_path, helpers, monkeypatch):
    helpers.small_prepare(tmp_path / "out", helpers.of_the_hub(), rows=1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"the hub cannot be asked about karpathy/climbmix-400b-shuffle \(HF_HUB_OFFLINE is set\)"
    ):
        helpers.small_prepare(tmp_path / "new", helpers.of_the_hub())
    (text_folder(tmp_path / "out") / NAMES[0]).unlink()
    with pytest.raises(DataError, match=rf"{NAMES[0]} of \S+ cannot be fetched: HF_HUB_OFFLINE is set"):
        helpers.small_prepare(tmp_path / "out", helpers.of_the_hub(vocab_size=401), rows=1)


def test_too_small_a_disk_is_said_before_anything_is_fetched(hub, tmp_path, helpers):
    hub.serve(NAMES[0], hub.files[NAMES[0]], size=10**16)
    with pytest.raises(
        StorageError,
        match=r"needs 10000000\.\d GB more on the disk of .*climbmix.*; free some space or choose another --out",
    ):
        helpers.small_prepare(tmp_path, helpers.of_the_hub())
    assert hub.fetched() == []


def test_a_parquet_of_another_schema(hub, tmp_path, helpers):
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"content": ["a"]}), sink)
    hub.serve(NAMES[0], sink.getvalue().to_pybytes())
    with pytest.raises(DataError, match=rf"{NAMES[0]} has no column text \(its columns: content\)"):
        helpers.small_prepare(tmp_path, helpers.of_the_hub())


def test_a_shard_damaged_on_disk(hub, tmp_path, helpers):
    helpers.small_prepare(tmp_path, helpers.of_the_hub(), rows=1)
    file = text_folder(tmp_path) / NAMES[0]
    good = file.read_bytes()
    file.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(
        DataError,
        match=rf"{NAMES[0]} is not what the hub states for it \(size or SHA-256 differs\); delete it and run again",
    ):
        helpers.small_prepare(tmp_path, helpers.of_the_hub(vocab_size=401), rows=1)
    file.unlink()
    helpers.small_prepare(tmp_path, helpers.of_the_hub(vocab_size=401), rows=1)


@pytest.mark.parametrize(
    "record", ["not JSON", "[]", "{}", '{"repo": "another", "commit": "c0ffee"}', '{"repo": "REPO", "commit": 5}']
)
def test_a_damaged_record_of_the_commit(hub, tmp_path, helpers, record):
    file = tmp_path / "bucket" / "text" / "climbmix" / "commit.json"
    file.parent.mkdir(parents=True)
    file.write_text(record := record.replace("REPO", DATASETS["climbmix"].repo))
    store = open_store(str(tmp_path / "bucket"))
    with pytest.raises(DataError, match=rf"^{file} .*; delete it and run again"):
        recorded_identity("climbmix", tmp_path / "text", store)
    with pytest.raises(DataError, match=rf"^{file} .*; delete it and run again"):
        helpers.small_prepare(tmp_path, helpers.of_the_hub(), rows=1, store=store)
    file.unlink()
    helpers.small_prepare(tmp_path, helpers.of_the_hub(), rows=1, store=store)
    here = tmp_path / "text" / "climbmix" / "commit.json"
    assert file.read_bytes() == here.read_bytes()
    here.write_text(record)
    with pytest.raises(DataError, match=rf"^{here} .*; delete it and run again"):
        recorded_identity("climbmix", tmp_path / "text", None)
    with pytest.raises(DataError, match=rf"^{here} .*; delete it and run again"):
        helpers.small_prepare(tmp_path, helpers.of_the_hub(vocab_size=401), rows=1)


def test_user_and_password_of_the_hubs_address_are_sent_and_neither_printed_nor_kept(
    hub, tmp_path, helpers, monkeypatch, capfd, caplog
):
    monkeypatch.setenv("HF_ENDPOINT", os.environ["HF_ENDPOINT"].replace("//", "//me:HIDDEN@"))
    assert endpoint() == os.environ["HF_ENDPOINT"].replace("me:HIDDEN@", "")
    assert headers()["authorization"] == f"Basic {base64.b64encode(b'me:HIDDEN').decode()}"
    hub.faults[NAMES[0]] = [503]
    helpers.small_prepare(tmp_path, helpers.of_the_hub(), rows=1)
    assert not any(b"HIDDEN" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    monkeypatch.setenv("HF_ENDPOINT", "http://me:HIDDEN@127.0.0.1:9")
    monkeypatch.setattr("job.data.hub.ATTEMPTS", 1)
    with pytest.raises(DataError, match=r"HF_ENDPOINT \(http://127\.0\.0\.1:9\)"):
        helpers.small_prepare(tmp_path / "new", helpers.of_the_hub())
    said = capfd.readouterr()
    assert "HIDDEN" not in said.out + said.err + caplog.text


# ---- interrupted

SCRIPT = """
import pathlib, sys
from job.recipe.config import DataConfig
from huggingface_hub import constants
from job.data import hub, prepare, tokenizer
from job.reporter import Reporter

constants.DOWNLOAD_CHUNK_SIZE = 1024
tokenizer.SAMPLE_CHARS = 10_000
hub.DATASETS["climbmix"] = hub.Dataset("karpathy/climbmix-400b-shuffle", 6, 40_000)
data = DataConfig(source="climbmix", vocab_size=400, tokenizer_chars=40_000, split_long=True)
prepare.prepare(pathlib.Path(sys.argv[1]), data, 32, Reporter(), 1)
"""


def start(out: Path, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out)], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, **options
    )


def test_killed_in_a_download_that_shard_begins_again(hub, tmp_path, helpers):
    expected = helpers.small_prepare(tmp_path / "undisturbed", helpers.of_the_hub())
    hub.requests.clear()
    hub.faults[NAMES[1]] = ["stalled"]
    process = start(tmp_path / "out")
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size for part in tmp_path.glob(f"out/text/climbmix/*/.{NAMES[1]}.part")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    again = helpers.small_prepare(tmp_path / "out", helpers.of_the_hub())
    ranges = [wanted for _, path, wanted in hub.requests if path.endswith(NAMES[1])]
    assert ranges[0] is None and ranges[-1] is None
    assert contents(again.path) == contents(expected.path)
    assert {path.name for path in text_folder(tmp_path / "out").iterdir()} == {*NAMES, "files.json"}


def test_disk_full_in_a_download(hub, tmp_path, helpers):
    process = start(
        tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000)), stderr=subprocess.PIPE
    )
    errors = process.communicate(timeout=60)[1]
    assert (
        process.returncode == 1
        and "StorageError: the disk is full: writing" in errors
        and ".parquet.part failed" in errors
    )
    helpers.small_prepare(tmp_path, helpers.of_the_hub())
