"""What --bucket may name: s3://, or plainly a folder apart from --out; said in one sentence, with the right
spelling."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from job.cli.commands import main
from job.errors import UsageError
from job.run.bucket import check_place


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPEEDRUN_BUCKET", raising=False)
    (tmp_path / "there").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("", "--bucket is empty: write s3://bucket/prefix"),
        (" ", "--bucket is empty: write s3://bucket/prefix"),
        ("s3:/mine/gpt2", "--bucket s3:/mine/gpt2 cannot be used: write s3://mine/gpt2"),
        ("s3:mine", "write s3://mine"),
        ("S3://mine/gpt2", "write s3://mine/gpt2"),
        ("s3a://mine", "write s3://mine"),
        ("s3//mine", "write s3://mine"),
        ("s3:", "write s3://bucket/prefix"),
        ("s3://", '--bucket "s3://" names no bucket: write s3://bucket/prefix'),
        ("s3:///mine", '"s3:///mine" names no bucket'),
        ("s3://Mine", '"s3://Mine" names no bucket: write s3://bucket/prefix, the bucket in small letters'),
        ("s3://mine/gpt2 ", '"s3://mine/gpt2 " names no bucket'),
        ("s3://mine/gpt2\n", '"s3://mine/gpt2\\n" names no bucket'),
        ("gs://mine", "--bucket gs://mine cannot be used: write s3://bucket/prefix, or a folder"),
        ("my-bucket/gpt2", "no such folder is there: write s3://my-bucket/gpt2, or ./my-bucket/gpt2 for a new folder"),
        ("my-bucket", "write s3://my-bucket, or ./my-bucket for a new folder"),
        ("~/mirror", f"was not expanded by the shell: write {Path.home()}/mirror, or ./~/mirror"),
    ],
)
def test_what_is_no_place(url: str, sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_place(url, Path("out"))
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://mine",
        "s3://mine/",
        "s3://mine/gpt2",
        "s3://mine/a b/",
        "/mirror",
        "./mirror",
        "../mirror",
        "there",
        "there/",
        ".",
        "outer",
    ],
)
def test_what_is_a_place(url: str, here: Path) -> None:
    (here / "outer").mkdir()
    check_place(url, Path("out"))


@pytest.mark.parametrize(
    ("url", "out"),
    [
        ("out", "out"), ("./out", "out"), ("./out/", "out"), ("out/mirror", "out"), ("./there/../out", "out"),
        ("out/runs/r/eval", "out"), ("./link", "out"), ("./link/x", "out"), ("out", "link"), (".", "."), ("./x", "."),
        ("./new", "new"), ("/x", "/"),
    ],
)  # fmt: skip
def test_a_mirror_in_what_it_mirrors_is_refused(url: str, out: str, here: Path) -> None:
    (here / "out").mkdir()
    (here / "link").symlink_to("out")
    with pytest.raises(UsageError, match=r"would be mirrored into itself: choose a folder elsewhere"):
        check_place(str(here / url) if url.startswith("out") else url, Path(out))


@pytest.mark.parametrize("out", ["there/runs", "there/runs/x", "there/prepared/out", "there/compiled"])
def test_a_run_among_the_copies_is_refused(out: str) -> None:
    with pytest.raises(
        UsageError, match=f"--out {out} is among the copies that --bucket there holds: choose an --out elsewhere"
    ):
        check_place("there", Path(out))


def test_a_folder_by_another_mount_is_the_same_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two paths without a link between them, one device and inode: what a bind mount makes (simulated: mounting needs
    root)."""
    (here / "out").mkdir()
    (here / "mounted").mkdir()
    inode, stat = os.stat(here / "out"), os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, **how: inode if os.fspath(path) == str(here / "mounted") else stat(path, **how)
    )
    with pytest.raises(UsageError, match="mirrored into itself"):
        check_place("./mounted/x", Path("out"))


def command(*words: str) -> Result:
    return CliRunner().invoke(main, [*words, "--dry-run"])


@pytest.mark.parametrize("words", [["run"], ["pretrain"], ["smoke"], ["prepare"]])
def test_a_dry_run_refuses_it_too(words: list[str], here: Path) -> None:
    refused = command(*words, "--bucket", "mine/gpt2")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert [p.name for p in here.iterdir()] == ["there"]


def test_an_empty_variable_is_none_and_a_misspelled_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEEDRUN_BUCKET", "")
    assert command("smoke").exit_code == 0
    monkeypatch.setenv("SPEEDRUN_BUCKET", "mine")
    assert command("smoke").exit_code == 2


@pytest.mark.parametrize("name", ["run", "pretrain"])
def test_a_paid_machine_wants_a_bucket(name: str, monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    refused = command(name, "--strict", "--bucket", "./mirror")
    assert refused.exit_code == 2
    assert refused.stderr == (
        "speedrun: --strict is for machines that go away, and the folder ./mirror would go with it: give --bucket"
        " s3://bucket/prefix\n"
    )
    check_place("s3://mine", here / "out", strict=True)
    monkeypatch.setattr("job.run.admission.gpu_count", lambda: 8)
    refused = CliRunner().invoke(main, [name, "--strict"])
    assert (
        refused.exit_code == 2
        and "what is on this one would go with it: give --bucket s3://bucket/prefix\n" in refused.stderr
    )
    assert [p.name for p in here.iterdir()] == ["there"]
