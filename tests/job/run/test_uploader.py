"""What the uploader finds to upload, in which order, and what it does when the store fails: over a folder, without
processes."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from helpers import Kept, wait_for
from job.console import Console
from job.errors import DataError, StorageError, UsageError
from job.reporter import RankReporter
from job.run import uploader, uploader_client
from job.run.bucket import Bucket
from job.run.supervise import Interrupts
from job.run.uploader import Live, Mirror
from job.store.attempt import Attempt, read_events
from job.store.checkpoint_folder import KIND, folder_of
from job.store.fence import Fenced, TakenOver, newest_claimed
from job.store.sealed import MANIFEST, sealing
from job.store.stores import FolderStore, pull_sealed, push_sealed

RUN = "runs/r"
FINAL = 80


class Failing(FolderStore):
    """A store whose writes fail while `failing`, and that notes what was put."""

    failing = False

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.puts: list[str] = []

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        if self.failing:
            raise StorageError("the store does not answer")
        self.puts.append(key)
        super().put_file(key, path, sha256)


@pytest.fixture
def store(tmp_path: Path) -> Failing:
    return Failing(tmp_path / "bucket")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out" / RUN).mkdir(parents=True)
    (tmp_path / "out" / RUN / "recipe.json").write_text("{}")
    return tmp_path / "out"


def checkpoint(out: Path, rows: int, text: str = "w") -> Path:
    with sealing(folder_of(out / RUN, rows), kind=KIND, made_from={"rows": rows}) as folder:
        (folder.path / "weights-0").write_text(text)
        (folder.path / "optimizer-0").write_text("o")
        folder.facts["slices"] = {"w": [{"file": "weights-0"}], "o": [{"file": "optimizer-0"}]}
    return folder_of(out / RUN, rows)


def seal(path: Path, kind: str = "part") -> None:
    with sealing(path, kind=kind, made_from={"name": path.name}) as folder:
        (folder.path / "data").write_text(path.name)


def mirror(store: FolderStore, out: Path) -> tuple[Mirror, Kept]:
    kept = Kept()
    return Mirror(store, out, out / RUN, FINAL, kept), kept


def upload_all(work: Mirror) -> list[str]:
    done = []
    while key := work.next():
        work.upload(key)
        done.append(key)
    return done


def checkpoints_in(store: FolderStore) -> list[int]:
    return sorted({int(Path(key).parent.name) for key in store.list(f"{RUN}/checkpoints")})


def test_the_newest_checkpoint_comes_first_and_what_makes_a_set_whole_last(store: Failing, out: Path) -> None:
    checkpoint(out, 8), checkpoint(out, 16)
    seal(out / RUN / "eval" / "task")
    for part in ("set", "begun", "tokenizer", "rows/00000", "items/x/y"):
        seal(out / "prepared" / "p" / part)
    seal(out / "prepared" / "foreign" / "tokenizer")
    (out / "prepared" / "p" / ".rows.tmp-1").mkdir()
    (out / "prepared" / "p" / ".rows.tmp-1" / MANIFEST).write_text("{}")
    work, kept = mirror(store, out)
    work.prepared |= {"p"}
    order = upload_all(work)
    assert order == [
        f"{RUN}/recipe.json",
        f"{RUN}/checkpoints/{16:015d}",
        f"{RUN}/checkpoints/{8:015d}",
        f"{RUN}/eval/task",
        "prepared/p/items/x/y",
        "prepared/p/rows/00000",
        "prepared/p/tokenizer",
        "prepared/p/begun",
        "prepared/p/set",
    ]
    assert [e["folder"] for e in kept.events if e["kind"] == "upload.done"] == order[1:]
    assert work.pending() == []


def test_the_bucket_keeps_the_checkpoints_that_the_disk_keeps_and_the_final_one(store: Failing, out: Path) -> None:
    work, _ = mirror(store, out)
    for rows in (8, 16, 24):
        checkpoint(out, rows)
        upload_all(work)
    assert checkpoints_in(store) == [16, 24]
    shutil.rmtree(folder_of(out / RUN, 8))
    checkpoint(out, FINAL)
    upload_all(work)
    assert checkpoints_in(store) == [16, 24, FINAL]


@pytest.mark.parametrize("clock", [0, 7200, -7200])
def test_checkpoints_are_uploaded_so_far_apart_and_at_the_end(
    store: Failing, out: Path, monkeypatch: pytest.MonkeyPatch, clock: int
) -> None:
    """Also where the machine's date is put right by so many seconds meanwhile."""
    now = time.monotonic()
    monkeypatch.setattr("job.run.uploader.time.monotonic", lambda: now)
    work, began = Mirror(store, out, out / RUN, FINAL, Kept(), minutes=45), now
    for minutes, rows in ((10, 8), (46, 16), (60, 24), (92, 32)):
        now, sealed = began + 60 * minutes, checkpoint(out, rows) / MANIFEST
        os.utime(sealed, (time.time() + 60 * minutes + clock,) * 2)
        upload_all(work)
    assert checkpoints_in(store) == [16, 32], "at 46 and 92 minutes"
    checkpoint(out, 40)
    assert work.pending() == []
    work.ending = True
    upload_all(work)
    assert checkpoints_in(store) == [32, 40]
    work = Mirror(store, out, out / RUN, FINAL, Kept(), minutes=45)
    checkpoint(out, FINAL)
    upload_all(work)
    assert checkpoints_in(store) == [32, 40, FINAL]


def test_a_failure_is_an_event_and_a_later_try(store: Failing, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(out, 8)
    work, kept = mirror(store, out)
    store.failing = True
    upload_all(work)
    key = f"{RUN}/checkpoints/{8:015d}"
    assert kept.events == [
        {"kind": "upload.failed", "folder": key, "why": "the store does not answer", "next_try": 1.0}
    ]
    assert work.pending() == [key]
    assert work.next() is None, "it waits for its next try"
    store.failing = False
    monkeypatch.setattr("job.run.uploader.time.monotonic", lambda: 1e12)
    assert upload_all(work) == [key]
    assert work.pending() == []


def test_a_checkpoint_that_is_gone_from_the_disk_is_no_failure(store: Failing, out: Path) -> None:
    folder = checkpoint(out, 8)
    work, kept = mirror(store, out)
    work.upload(work.next())
    key = work.next()
    shutil.rmtree(folder)
    work.upload(key)
    assert (kept.events, work.pending()) == ([], [])


def test_what_never_became_a_checkpoint_is_removed_there_with_the_older_ones(store: Failing, out: Path) -> None:
    """Its upload was cut short, by the end of a machine say: gigabytes that cost every month."""
    for rows in (8, 16, 32):
        store.put(f"{RUN}/checkpoints/{rows:015d}/weights-0", b"w")
    checkpoint(out, 16)
    work, _ = mirror(store, out)
    checkpoint(out, 24)
    work.upload(work.next()), work.upload(work.next())
    assert checkpoints_in(store) == [16, 24, 32], "16 is here and comes next; training is not beyond 32"
    upload_all(work)
    assert (pull_sealed(store, f"{RUN}/checkpoints/{16:015d}", out / "pulled", kind=KIND).path / "weights-0").is_file()


def test_replacing_a_sealed_folder_never_shows_a_damaged_one(store: Failing, out: Path) -> None:
    """While a file of the same name is replaced there is no manifest; what an earlier call put is not put again."""
    key = f"{RUN}/checkpoints/{8:015d}"
    push_sealed(store, key, checkpoint(out, 8, "old"))
    folder = checkpoint(out, 8, "new")
    store.failing = True
    with pytest.raises(StorageError):
        push_sealed(store, key, folder)
    with pytest.raises(DataError, match="was never sealed"):
        pull_sealed(store, key, out / "pulled", kind=KIND)
    store.failing = False
    known = {f"{key}/optimizer-0": json.loads((folder / MANIFEST).read_text())["files"]["optimizer-0"]["sha256"]}
    store.puts.clear()
    push_sealed(store, key, folder, known=known)
    assert store.puts == [f"{key}/weights-0"]
    assert (pull_sealed(store, key, out / "pulled", kind=KIND).path / "weights-0").read_text() == "new"


def test_claims_count_over_machines_and_the_older_may_not_write(store: Failing, tmp_path: Path) -> None:
    first = Attempt.claim(tmp_path / "a" / RUN, store)
    old = Fenced(store, "r", first.number)
    old.put("x", b"1")
    second = Attempt.claim(tmp_path / "b" / RUN, store)
    assert (first.number, second.number, newest_claimed(store, "r")) == (1, 2, 2)
    for write in (
        lambda: old.put("x", b"2"),
        lambda: old.put_file("x", tmp_path, ""),
        lambda: old.create("y", b"2"),
        lambda: old.delete(["x"]),
    ):
        with pytest.raises(TakenOver, match="attempt 2 took over run r; this one \\(attempt 1\\) stopped"):
            write()
    assert (store.get("x"), store.get("y")) == (b"1", None)


def test_earlier_attempts_are_pulled_and_the_longer_file_counts(store: Failing, out: Path, tmp_path: Path) -> None:
    first = Attempt.claim(out / RUN, store)
    first.emit("train.step", step=0)
    live = Live(store, out / RUN, 1, Kept())
    live.events()
    first.emit("train.step", step=1)
    first._file.write(b'{"kind": "cut')
    live.events()
    other = tmp_path / "other" / RUN
    second = Attempt.claim(other, store)
    Bucket(store, 1.0).pull_record(other, before=2)
    assert [e["step"] for e in read_events(other)] == [0, 1]
    assert (other / "attempts" / "1").read_bytes() == (out / RUN / "attempts" / "1").read_bytes()
    second.emit("train.step", step=2)
    (other / "events" / "1.jsonl").write_bytes(b"")
    Live(store, other, 2, Kept()).events()
    assert store.get(f"{RUN}/events/1.jsonl").count(b"\n") == 2, (
        "what is shorter here does not replace what is longer there"
    )
    assert store.get(f"{RUN}/events/2.jsonl").count(b"\n") == 1


@pytest.mark.parametrize("clock", [0, -7200])
def test_the_report_of_this_attempt_is_sealed_there_and_an_earlier_one_is_not(
    store: Failing, out: Path, monkeypatch: pytest.MonkeyPatch, clock: int
) -> None:
    """Whatever the machine's date is when it is sealed."""
    Attempt.claim(out / RUN)
    monkeypatch.setattr(uploader, "report_files", lambda run: ({}, {"report.md": "so far"}))

    def report(text: str) -> None:
        with sealing(out / RUN / "report", kind="report", made_from={}) as folder:
            (folder.path / "report.md").write_text(text)
        os.utime(out / RUN / "report" / MANIFEST, (time.time() + clock,) * 2)

    report("earlier")
    live = Live(store, out / RUN, 1, Kept())
    for text, manifest in (("so far", False), ("now", True)):
        if manifest:
            report(text)
        assert live.publish()
        assert store.get(f"{RUN}/report/report.md") == text.encode()
        assert (store.get(f"{RUN}/report/{MANIFEST}") is not None) == manifest


def test_a_slow_store_gets_the_page_less_often_but_never_that_seldom(
    store: Failing, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "LIVE_EVERY", 0.1)
    monkeypatch.setattr(uploader, "LIVE_MOST", 0.5)
    monkeypatch.setattr(uploader, "POLL", 0.01)
    Attempt.claim(out / RUN)
    reporter, began = RankReporter(io.StringIO()), []
    live = Live(store, out / RUN, 1, reporter)
    monkeypatch.setattr(live, "publish", lambda last: began.append(time.monotonic()) or time.sleep(0.3) or last)
    works = uploader.Uploader(Mirror(store, out, out / RUN, FINAL, reporter), live, reporter)
    thread = threading.Thread(target=works._record)
    thread.start()
    wait_for(lambda: len(began) == 3, 10)
    works._last.set()
    thread.join(10)
    assert 0.4 < (began[2] - began[0]) / 2 < 2.0, "11 times what it takes were 3.3"


@pytest.mark.parametrize("kind", uploader.MILESTONES)
def test_validations_and_checkpoints_are_uploaded_at_once(store: Failing, out: Path, monkeypatch, kind: bytes) -> None:
    monkeypatch.setattr(uploader, "POLL", 0.01)
    attempt, reporter = Attempt.claim(out / RUN), RankReporter(io.StringIO())
    live = Live(store, out / RUN, 1, reporter)
    monkeypatch.setattr(live, "_page", lambda: None)
    works = uploader.Uploader(Mirror(store, out, out / RUN, FINAL, reporter), live, reporter)
    thread = threading.Thread(target=works._record)
    attempt.emit("attempt.started")
    thread.start()

    def stored() -> int:
        return (store.get(f"{RUN}/events/1.jsonl") or b"").count(b"\n")

    wait_for(lambda: stored() == 1, 10)
    attempt.emit("train.step", step=0)
    time.sleep(0.1)
    assert stored() == 1, "steps come with the minute"
    attempt.emit(json.loads(b"{%b}" % kind)["kind"])
    wait_for(lambda: stored() == 3, 10)
    works._last.set()
    thread.join(10)


def test_another_run_of_the_same_name_is_refused(store: Failing, out: Path, tmp_path: Path) -> None:
    bucket, mine, theirs = Bucket(store, 1.0), out / RUN, tmp_path / "other" / RUN
    Attempt.claim(mine)
    bucket.check_history(mine)
    Attempt.claim(theirs, store)
    with pytest.raises(UsageError, match="is not the one in"):
        bucket.check_history(mine)
    bucket.check_history(theirs)
    Attempt.claim(tmp_path / "third" / RUN, store, fresh=True)
    with pytest.raises(UsageError, match=r"was begun anew in .* by attempt 2"):
        bucket.check_history(theirs)


def test_fresh_leaves_the_claims(store: Failing, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Attempt.claim(out / RUN, store)
    push_sealed(store, f"{RUN}/checkpoints/{8:015d}", checkpoint(out, 8))
    seal(out / "prepared" / "p" / "tokenizer")
    push_sealed(store, "prepared/p/tokenizer", out / "prepared" / "p" / "tokenizer")
    Bucket(store, 1.0).discard("r", Console())
    assert sorted(store.list(RUN)) == [f"{RUN}/attempts/1"]
    assert len(store.list("prepared")) == 2
    assert capsys.readouterr().err == f"--fresh: discarded what {store.url}/{RUN} had\n"


def test_an_uploader_that_does_not_answer_is_started_again(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(uploader_client, "ASK_AFTER", 2.0)
    monkeypatch.setattr(uploader_client, "RESTART_AFTER", 0.0)
    bucket = Bucket(FolderStore(tmp_path / "bucket"), 60.0)
    attempt = Attempt.claim(out / RUN, bucket.store)
    with uploader_client.uploading(bucket, out, out / RUN, attempt, FINAL, Console(), Interrupts()) as uploads:
        uploads.start()
        first = uploads._child.process.pid
        os.kill(first, signal.SIGSTOP)
        until = time.monotonic() + 60
        while uploads._child.process.pid == first or uploads._child.closed:
            assert time.monotonic() < until
            uploads.check()
            time.sleep(0.05)
        checkpoint(out, 8)
        uploads.flush()
    assert "warning: the uploader does not answer for 4 s and is started again" in capsys.readouterr().err
    assert checkpoints_in(bucket.store) == [8]
