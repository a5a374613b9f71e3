"""Sources: fixed order, identity, the split, and one sentence for everything that can be wrong with text."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data import embedded, local
from job.data.documents import ByHash, Counts, documents, group
from job.data.sources import open_source
from job.errors import DataError
from job.recipe.config import DataConfig


def local_source(*paths, max_chars=0):
    return open_source(DataConfig(source="local", paths=tuple(map(str, paths)), max_chars=max_chars), Path())


def all_texts(source):
    return [text for shard in source.shards for text in shard.texts()]


def write_parquet(file, texts, **options):
    pq.write_table(pa.table({"text": texts}), file, **options)
    return file


def test_a_folder_is_its_own_text_files_by_name(tmp_path):
    (tmp_path / "b.txt").write_text("from b\n")
    (tmp_path / "a.jsonl").write_text('{"text": "from a", "n": 1}\n\n{"text": null}\n{"text": ""}\n')
    write_parquet(tmp_path / "c.parquet", ["from c", None])
    (tmp_path / "README.md").write_text("not this")
    (tmp_path / ".hidden.txt").write_text("not this")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "d.txt").write_text("not this")
    source = local_source(tmp_path)
    assert all_texts(source) == ["from a", None, "", "from b\n", "from c", None]
    assert [file["name"] for file in source.identity["files"]] == ["a.jsonl", "b.txt", "c.parquet"]
    assert source.left_out == ("README.md", "inner")
    counts = Counts()
    kept = [text for shard in source.shards for text in documents(shard, ByHash(0.0), held_out=False, counts=counts)]
    assert kept == ["from a", "from b\n", "from c"] and (counts.documents, counts.skipped) == (3, 3)
    assert counts.bytes == sum(map(len, kept))


def test_files_come_in_the_order_given(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    assert all_texts(local_source(tmp_path / "b.txt", tmp_path / "a.txt")) == ["b", "a"]


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_file_that_changes_after_it_was_hashed_is_refused(tmp_path, when):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n' * 3)
    (shard,) = local_source(tmp_path).shards
    assert list(shard.texts()) == ["one"] * 3
    texts = shard.texts()
    if when == "while":
        next(texts)
    with open(file, "a") as more:
        more.write('{"text": "two"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl was changed while it was in use; run the same command again"):
        list(texts)


def test_identity_is_the_text_not_its_place(tmp_path):
    for folder, text in (("x", "same"), ("y", "same"), ("z", "Same")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
    identities = [json.dumps(local_source(tmp_path / name).identity) for name in "xyz"]
    assert identities[0] == identities[1] != identities[2]


@given(st.lists(st.integers(0, 6 << 20), max_size=30))
def test_small_files_are_grouped_in_order(sizes):
    runs = [sizes[run] for run in group(sizes)]
    assert [size for run in runs for size in run] == sizes
    assert all(run and (len(run) == 1 or sum(run) <= 4 << 20) for run in runs)


def test_a_long_text_file_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"Paragraph {n}. " + "word " * 300 + "\n\n" for n in range(40)]
    (tmp_path / "book.txt").write_text("".join(paragraphs))
    (tmp_path / "lines.txt").write_text("no blank line\n" * 4000)
    book, lines = (list(local.read_txt(tmp_path / name)) for name in ("book.txt", "lines.txt"))
    assert "".join(book) == "".join(paragraphs) and len(book) == 6
    assert all(piece.endswith("\n\n") and 10_000 <= len(piece) < 12_000 for piece in book[:-1])
    assert "".join(lines) == "no blank line\n" * 4000 and len(lines) == 3


@given(st.binary(max_size=40), st.floats(0, 1), st.floats(0, 1))
def test_the_split_depends_on_the_document_alone(document, one, other):
    low, high = sorted((one, other))
    assert ByHash(low)(document) <= ByHash(high)(document)
    assert not ByHash(0.0)(document) and ByHash(1.0)(document)


def test_both_sides_are_all_documents_and_share_none(corpus):
    shards = local_source(corpus).shards
    sides = [
        [t for shard in shards for t in documents(shard, ByHash(0.2), held_out=side, counts=Counts())]
        for side in (False, True)
    ]
    assert set(sides[0]).isdisjoint(sides[1]) and len(sides[0]) + len(sides[1]) == 400
    assert 0.1 < len(sides[1]) / 400 < 0.3


def test_max_chars_takes_whole_documents_from_the_start(corpus, one_file_shards):
    everything = all_texts(local_source(corpus))
    for max_chars in (1, 5_000, 60_000, 10**9):
        some = all_texts(local_source(corpus, max_chars=max_chars))
        assert some == everything[: len(some)] and sum(map(len, some)) <= max_chars
        assert len(some) == len(everything) or sum(map(len, everything[: len(some) + 1])) > max_chars


def test_embedded_text_is_prose_and_code_without_tables_or_tests():
    source = embedded.open_embedded()
    names = [name for shard in source.shards for name in shard.documents]
    assert len(names) == len(set(names)) == source.identity["documents"] > 300
    assert {"topic:assert", "argparse.py", "json/decoder.py"} <= set(names)
    assert not any(name.startswith(("test/", "encodings/", "site-packages/")) or "/tests/" in name for name in names)
    assert 5e6 < sum(shard.size for shard in source.shards) <= embedded.MOST_CHARS * 1.1
    assert source == embedded.open_embedded()


# ---- bad input: one sentence each, naming the place and the remedy


def bad(match, *paths):
    """The DataError, from opening or from reading."""
    with pytest.raises(DataError, match=match) as caught:
        all_texts(local_source(*paths))
    message = str(caught.value)
    assert "\n" not in message and "; " in message
    return message


def test_nothing_there(tmp_path):
    bad("nowhere does not exist; point --data", tmp_path / "nowhere")
    bad(r"has no .parquet, .jsonl, .ndjson, .txt file in it", tmp_path)
    (tmp_path / "a.csv").write_text("x")
    bad(r"a.csv is not one of .parquet, .jsonl, .ndjson, .txt", tmp_path / "a.csv")
    with pytest.raises(DataError, match="no path is given"):
        local.open_local(())


def test_parquet_without_text(tmp_path):
    pq.write_table(pa.table({"content": ["x"], "url": ["y"]}), tmp_path / "a.parquet")
    bad(r"a.parquet has no column text \(its columns: content, url\)", tmp_path)
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    bad("its column text holds int64, not string", tmp_path)


def test_damaged_parquet(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [f"some words {n} " * 50 for n in range(2000)], row_group_size=500)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    bad("a.parquet cannot be read .*; fetch it again", tmp_path)
    file.write_bytes(whole[:1000] + bytes(2000) + whole[3000:])
    bad("a.parquet cannot be read .*; fetch it again", tmp_path)
    file.write_bytes(b"<html>not found</html>")
    bad("a.parquet cannot be read", tmp_path)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"first line\nsecond \xff line\n")
    bad(r"a.txt, line 2 \(byte 18\) is not UTF-8 \(invalid start byte\)", tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    bad(r"b.jsonl, line 1 \(byte 13\) is not UTF-8", tmp_path)
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"text": "half \\ud83d of a pair"}\n')
    bad(r"b.jsonl:2 is not UTF-8 \(surrogates not allowed\)", tmp_path)
    (tmp_path / "b.jsonl").unlink()
    array = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"okb\xff"))
    pq.write_table(pa.table({"text": array}), tmp_path / "c.parquet")
    bad("c.parquet, row 2 is not UTF-8", tmp_path)


@pytest.mark.parametrize(
    "line", ['{"text": "no end', '{"content": "x"}', '["text"]', '{"text": 5}', "plain words", "[" * 100_000]
)
def test_bad_jsonl_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    bad("a.jsonl:2 is not ", tmp_path)


def test_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(local, "sha256_file", refuse)
    bad(r"a.txt cannot be read \(Permission denied\)", tmp_path)


def test_compressed_text_is_read_and_suffixes_count_in_any_case(tmp_path):
    line = json.dumps({"text": "some words"}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line) * 2)
    (tmp_path / "b.TXT.Zst").write_bytes(pa.compress(b"prose\n", codec="zstd", asbytes=True))
    (tmp_path / "c.NDJSON").write_bytes(line)
    (tmp_path / "d.parquet.gz").write_bytes(b"")
    source = local_source(tmp_path)
    assert all_texts(source) == ["some words", "some words", "prose\n", "some words"]
    assert source.left_out == ("d.parquet.gz",)
    for damaged in (gzip.compress(line * 99)[:-20], b"no gzip"):
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        bad("a.jsonl.gz cannot be read", tmp_path)


def test_a_link_to_nothing_and_a_name_that_is_not_utf8_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").symlink_to("/nowhere/blob")
    bad("b.jsonl is a link to nothing", tmp_path)
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    bad(r"caf\\udce9.txt is not UTF-8; rename", tmp_path)


def test_a_column_twice_is_refused(tmp_path):
    column = pa.array(["x"])
    pq.write_table(pa.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "a.parquet")
    bad("a.parquet has several columns text", tmp_path)
