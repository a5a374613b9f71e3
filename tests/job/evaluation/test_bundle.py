from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

from job.errors import DataError, ExitCode
from job.evaluation.bundle import open_bundle


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
    }


def zipped(target: Path, files: dict[str, bytes], top: str = "") -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(top + name, data)
    return target


def tarred(target: Path, files: dict[str, bytes], top: str = "", link: tuple[str, str] | None = None) -> Path:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(top + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        if link:
            member = tarfile.TarInfo(link[0])
            member.type, member.linkname = tarfile.SYMTYPE, link[1]
            archive.addfile(member)
    target.write_bytes(compressed(raw.getvalue()))
    return target


def compressed(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def refused(path: Path, *words: str, only_core: bool = False) -> None:
    with pytest.raises(DataError) as caught:
        open_bundle(path, only_core=only_core)
    assert caught.value.exit_code == ExitCode.DATA
    for word in words:
        assert word in str(caught.value)


def test_a_bundle_is_the_same_as_folder_zip_and_tar(make_bundle, tmp_path):
    folder = make_bundle()
    files = files_of(folder)
    bundles = [
        open_bundle(folder),
        open_bundle(zipped(tmp_path / "a.zip", files)),
        open_bundle(zipped(tmp_path / "b.zip", files, top="eval_bundle/")),
        open_bundle(tarred(tmp_path / "c.tar.zst", files, top="./")),
        open_bundle(tarred(tmp_path / "d.tar.zst", files, top="eval_bundle/")),
    ]
    assert len({bundle.id for bundle in bundles}) == 1
    assert all([t.examples for t in b.tasks] == [t.examples for t in bundles[0].tasks] for b in bundles)
    pick, who, following = bundles[0].tasks
    assert (pick.label, pick.kind, pick.shots, pick.delimiter, pick.baseline) == (
        "pick",
        "multiple_choice",
        2,
        "\nAnswer: ",
        0.25,
    )
    assert (who.delimiter, who.file, len(following.examples)) == (" ", "eval_data/sub/who.jsonl", 8)
    assert not bundles[0].is_core and bundles[0].metric_name == "smoke_score"


def test_a_folder_may_have_a_top_folder_and_the_id_follows_the_content(make_bundle, tmp_path):
    first = open_bundle(make_bundle()).id
    (tmp_path / "outer").mkdir()
    (tmp_path / "bundle").rename(tmp_path / "outer" / "eval_bundle")
    assert open_bundle(tmp_path / "outer").id == first
    changed = make_bundle(meta="Eval Task,Random baseline\npick,26\nwho,50\nnext,0\n")
    assert open_bundle(changed).id != first


def test_the_real_bundle_is_core(core_archive, core_bundle):
    assert core_bundle.is_core and core_bundle.metric_name == "core"
    assert open_bundle(core_archive, only_core=True).files == core_bundle.files
    assert len(core_bundle.tasks) == 22
    assert sum(len(task.examples) for task in core_bundle.tasks) == 91_037
    baselines = {task.label: task.baseline for task in core_bundle.tasks}
    assert baselines["boolq"] == pytest.approx(0.62) and baselines["bigbench_language_identification"] == 0.091
    assert {task.label for task in core_bundle.tasks if task.delimiter != " "} == {
        "jeopardy",
        "arc_easy",
        "arc_challenge",
        "piqa",
        "boolq",
    }


def test_another_bundle_is_never_core(make_bundle):
    refused(make_bundle(), "another version than the published CORE bundle", "core.yaml differs", only_core=True)


def test_no_line_of_core_is_parsed_before_its_hash_is_right(make_bundle, monkeypatch):
    monkeypatch.setattr("job.evaluation.bundle.CORE_SHA256", dict(open_bundle(make_bundle()).files))
    assert open_bundle(make_bundle(), only_core=True).is_core
    for changes, name in (
        ({"core": "[}"}, "core.yaml"),
        ({"meta": "\0"}, "eval_meta_data.csv"),
        ({"next": "{"}, "eval_data/next.jsonl"),
    ):
        refused(make_bundle(**changes), f"{name} differs", only_core=True)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "eval_data/../../evil", "c:\\evil", "eval_data\\evil"])
def test_what_else_an_archive_holds_is_not_looked_at(make_bundle, tmp_path, name):
    """Nothing is unpacked, so that no name and no link can lead anywhere."""
    folder = make_bundle()
    archives = tmp_path / "archives"
    archives.mkdir()
    files = {**files_of(folder), name: b"x"}
    for archive in (
        zipped(archives / "a.zip", files),
        tarred(archives / "a.tar.zst", files, link=("also", "/etc/passwd")),
    ):
        assert open_bundle(archive).id == open_bundle(folder).id
    assert {path.name for path in archives.rglob("*")} == {"a.zip", "a.tar.zst"}


def test_a_link_in_an_archive_is_no_file(make_bundle, tmp_path):
    files, link = (
        files_of(make_bundle(next=None)),
        ("eval_data/next.jsonl", str(tmp_path / "bundle/eval_data/pick.jsonl")),
    )
    refused(tarred(tmp_path / "a.tar.zst", files, link=link), "eval_data/next.jsonl is missing")


def test_an_archive_that_unpacks_to_too_much_is_refused(make_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("job.evaluation.bundle.MAX_UNPACKED_BYTES", 1 << 10)
    files = files_of(make_bundle())
    for archive in (zipped(tmp_path / "a.zip", files), tarred(tmp_path / "a.tar.zst", files)):
        refused(archive, archive.name, "more than")


def test_an_archive_larger_than_any_bundle_is_refused_before_its_list_of_entries_is_read(tmp_path):
    with open(tmp_path / "a.zip", "wb") as file:
        file.truncate((2 << 30) + 1)
    refused(tmp_path / "a.zip", "a.zip has more than 2 GiB")


def test_a_damaged_archive_is_refused(make_bundle, tmp_path):
    files = {**files_of(make_bundle()), "noise": bytes(range(256)) * 40}
    whole = zipped(tmp_path / "a.zip", files).read_bytes()
    middle = len(whole) // 2
    for name, data in {
        "cut.zip": whole[:middle],
        "bad.zip": whole[:100] + b"\0\0\0\0\0\0" + whole[106:],
        "text": b"hello",
    }.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, name)
    whole = tarred(tmp_path / "a.tar.zst", files).read_bytes()
    for name, data in {"cut.tar.zst": whole[: len(whole) // 2], "not.tar.zst": compressed(b"no tar" * 500)}.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, name)
    refused(tmp_path / "nowhere.zip", "nowhere.zip", "not there")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"core": None}, ["core.yaml is missing"]),
        ({"meta": None}, ["eval_meta_data.csv is missing"]),
        ({"who": None}, ["eval_data/sub/who.jsonl is missing"]),
        ({"core": "icl_tasks: [}"}, ["no evaluation bundle"]),
        ({"core": "tasks: 1"}, ["no evaluation bundle", "icl_tasks"]),
        ({"core": "- 1"}, ["no evaluation bundle"]),
        ({"meta": "Eval Task,Random baseline\nwho,50\nnext,0\n"}, ["no evaluation bundle", "'pick'"]),
        ({"meta": "Eval Task,Random baseline\npick,many\n"}, ["no evaluation bundle", "'many'"]),
        ({"meta": "Eval Task\npick\n"}, ["no evaluation bundle", "Random baseline"]),
        ({"next": "{broken\n"}, ["no evaluation bundle"]),
    ],
)
def test_what_is_no_bundle_is_said_in_one_sentence(make_bundle, changes, words):
    refused(make_bundle(**changes), *words)
