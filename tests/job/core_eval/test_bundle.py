from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard

from job.core_eval.bundle import open_bundle
from job.errors import DataError, ExitCode


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def zipped(target: Path, files: dict[str, bytes], top: str = "") -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(top + name, data)
    return target


def tarred(target: Path, files: dict[str, bytes], top: str = "", link: str | None = None) -> Path:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(top + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        if link:
            member = tarfile.TarInfo("eval_data/link.jsonl")
            member.type, member.linkname = tarfile.SYMTYPE, link
            archive.addfile(member)
    target.write_bytes(zstandard.compress(raw.getvalue()))
    return target


def refused(path: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        open_bundle(path)
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
    assert (pick.label, pick.kind, pick.shots, pick.delimiter, pick.baseline) == ("pick", "multiple_choice", 2, "\nAnswer: ", 0.25)
    assert (who.delimiter, who.file, len(following.examples)) == (" ", "eval_data/sub/who.jsonl", 8)
    assert not bundles[0].is_core and bundles[0].metric_name == "smoke_score"


def test_a_folder_may_have_a_top_folder_and_the_id_follows_the_content(make_bundle, tmp_path):
    first = open_bundle(make_bundle()).id
    (tmp_path / "outer").mkdir()
    (tmp_path / "bundle").rename(tmp_path / "outer" / "eval_bundle")
    assert open_bundle(tmp_path / "outer").id == first
    changed = make_bundle(meta="Eval Task,Random baseline\npick,26\nwho,50\nnext,0\n")
    assert open_bundle(changed).id != first


def test_the_real_bundle_is_core(core_bundle):
    assert core_bundle.is_core and core_bundle.metric_name == "core" and core_bundle.require_core() is core_bundle
    assert len(core_bundle.tasks) == 22
    assert sum(len(task.examples) for task in core_bundle.tasks) == 91_037
    assert (
        core_bundle.baselines["boolq"] == pytest.approx(0.62) and core_bundle.baselines["bigbench_language_identification"] == 0.091
    )
    assert {task.label for task in core_bundle.tasks if task.delimiter != " "} == {
        "jeopardy",
        "arc_easy",
        "arc_challenge",
        "piqa",
        "boolq",
    }


def test_another_bundle_is_never_core(make_bundle):
    with pytest.raises(DataError, match="another version than the published CORE bundle"):
        open_bundle(make_bundle()).require_core()


def test_a_manifest_is_believed_only_when_it_holds(make_bundle):
    folder = make_bundle()
    entry = {"file": "pick.jsonl", "sha256": hashlib.sha256((folder / "eval_data/pick.jsonl").read_bytes()).hexdigest()}
    (folder / "MANIFEST.json").write_text(json.dumps({"tasks": [entry]}))
    open_bundle(folder)
    (folder / "MANIFEST.json").write_text(json.dumps({"tasks": [{**entry, "sha256": "0" * 64}]}))
    refused(folder, "eval_data/pick.jsonl", "MANIFEST.json", "SHA-256")
    (folder / "MANIFEST.json").write_text("[]")
    refused(folder, "MANIFEST.json")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "eval_data/../../evil", "c:\\evil", "eval_data\\evil"])
def test_a_member_that_leaves_the_archive_is_refused(make_bundle, tmp_path, name):
    files = {**files_of(make_bundle()), name: b"x"}
    refused(zipped(tmp_path / "a.zip", files), "leaves the archive")
    refused(tarred(tmp_path / "a.tar.zst", files), "leaves the archive")


def test_a_link_in_an_archive_is_refused(make_bundle, tmp_path):
    refused(tarred(tmp_path / "a.tar.zst", files_of(make_bundle()), link="/etc/passwd"), "link.jsonl", "not a plain file")


def test_a_damaged_archive_is_refused(make_bundle, tmp_path):
    files = {**files_of(make_bundle()), "noise": bytes(range(256)) * 40}
    whole = zipped(tmp_path / "a.zip", files).read_bytes()
    middle = len(whole) // 2
    for name, data in {"cut.zip": whole[:middle], "bad.zip": whole[:100] + b"\0\0\0\0\0\0" + whole[106:], "text": b"hello"}.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, name)
    whole = tarred(tmp_path / "a.tar.zst", files).read_bytes()
    for name, data in {"cut.tar.zst": whole[: len(whole) // 2], "not.tar.zst": zstandard.compress(b"no tar" * 500)}.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, name)
    refused(tmp_path / "nowhere.zip", "nowhere.zip", "not there")


TASK = "icl_tasks:\n- {label: pick, dataset_uri: pick.jsonl, num_fewshot: [2], icl_task_type: multiple_choice}\n"
LM = '{"context": "a", "continuation": "b"}\n'


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"core": None}, ["core.yaml is missing"]),
        ({"meta": None}, ["eval_meta_data.csv is missing"]),
        ({"who": None}, ["eval_data/sub/who.jsonl is missing"]),
        ({"next": ""}, ["eval_data/next.jsonl", "no line"]),
        ({"core": "icl_tasks: [}"}, ["core.yaml, line 1", "not YAML"]),
        ({"core": "tasks: 1"}, ["icl_tasks"]),
        ({"core": TASK.replace("multiple_choice", "essay")}, ["'pick'", "unknown task type 'essay'"]),
        ({"core": TASK.replace("[2]", "2")}, ["'pick'", "num_fewshot"]),
        ({"core": TASK.replace("[2]", "[-2]")}, ["'pick'", "num_fewshot"]),
        ({"core": TASK.replace("pick.jsonl", "../pick.jsonl")}, ["'pick'", "dataset_uri '../pick.jsonl'"]),
        ({"core": TASK.replace("label: pick", "label: ../pick")}, ["label"]),
        ({"core": TASK + TASK.removeprefix("icl_tasks:\n")}, ["'pick' twice"]),
        ({"meta": "Eval Task,Random baseline\nwho,50\nnext,0\n"}, ["eval_meta_data.csv", "'pick'"]),
        ({"meta": "Eval Task,Random baseline\npick,many\n"}, ["eval_meta_data.csv, line 2"]),
        ({"meta": "Eval Task\npick\n"}, ["eval_meta_data.csv, line 2"]),
        ({"next": LM + "{broken\n"}, ["eval_data/next.jsonl, line 2", "not JSON"]),
        ({"next": LM + "\n" + LM}, ["eval_data/next.jsonl, line 2", "not JSON"]),
        ({"next": LM.encode() + b'{"context": "\xff"}\n'}, ["eval_data/next.jsonl, line 2", "not JSON"]),
        ({"next": "[1]\n"}, ["eval_data/next.jsonl, line 1", "object"]),
        ({"next": '{"context": "a", "continuation": " "}\n'}, ["eval_data/next.jsonl, line 1", "tokenises to nothing"]),
        ({"next": '{"context": "a"}\n'}, ["eval_data/next.jsonl, line 1", "'continuation'"]),
        (
            {"pick": '{"query": "a", "choices": ["b", "c"], "gold": 2}\n'},
            ["eval_data/pick.jsonl, line 1", "gold 2 is out of range"],
        ),
        (
            {"pick": '{"query": "a", "choices": ["b", "c"], "gold": -1}\n'},
            ["eval_data/pick.jsonl, line 1", "gold -1 is out of range"],
        ),
        ({"pick": '{"query": "a", "choices": ["b", "c"], "gold": true}\n'}, ["eval_data/pick.jsonl, line 1", "gold True"]),
        ({"pick": '{"query": "a", "choices": ["b", ""], "gold": 0}\n'}, ["eval_data/pick.jsonl, line 1", "tokenises to nothing"]),
        ({"pick": '{"query": "a", "choices": ["b"], "gold": 0}\n'}, ["eval_data/pick.jsonl, line 1", "'choices'"]),
        (
            {"who": '{"context_options": "ab", "continuation": "b", "gold": 0}\n'},
            ["eval_data/sub/who.jsonl, line 1", "'context_options'"],
        ),
    ],
)
def test_bad_bundles_are_named_by_file_and_line(make_bundle, changes, words):
    refused(make_bundle(**changes), *words)
