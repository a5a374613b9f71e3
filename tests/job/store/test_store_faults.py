"""Every fault of a network, a server, a disk or a killed client: recovered intact, or a sentence with all that is
sealed safe on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fault_proxy as fault
import s3_server
from job.errors import DataError, ExitCode, StorageError, UsageError
from job.store import open_store
from job.store.s3 import S3Store
from job.store.sealed import MANIFEST, open_sealed, sealing
from job.store.stores import pull_sealed, push_sealed, sealed_names

ROOT = Path(__file__).parents[3]
PART = 5 << 20
KEY = "runs/t/checkpoints/000000000000042"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A sealed folder of a file of two parts and two small ones."""
    path = tmp_path_factory.mktemp("local") / "checkpoint"
    with sealing(path, kind="checkpoint", made_from={}) as unsealed:
        for name, size in (("weights", PART + 1000), ("optimizer", 70_000), ("empty", 0)):
            (unsealed.path / name).write_bytes(os.urandom(size))
    return path


@pytest.fixture
def store(faults, monkeypatch) -> S3Store:
    """The store behind the proxy, with small parts; a request is given up after a second, a call after five."""
    faults.s3.enter(monkeypatch)
    return S3Store.at(faults.s3.url, patience=20.0, timeout=1.0, part=PART)


def pulled(store: S3Store, path: Path, key: str = KEY) -> dict[str, bytes]:
    sealed = pull_sealed(store, key, path, kind="checkpoint").verify()
    return {name: (path / name).read_bytes() for name in sealed.files}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != MANIFEST}


# --- on the way up

UP = {
    "503 twice": ("UploadPart", "error(503, 'SlowDown')", 2),
    "503 twice for a small file": ("PutObject", "error(503, 'SlowDown')", 2),
    "reset in the body": ("UploadPart", "reset", 1),
    "reset in a small body": ("PutObject", "reset", 1),
    "stall": ("UploadPart", "stall", 1),
    "black hole": ("UploadPart", "black_hole", 1),
    "black hole at the manifest": ("PutObject", "black_hole", 3),
    "lost acknowledgement of a part": ("UploadPart", "lost", 1),
    "lost acknowledgement of Complete": ("CompleteMultipartUpload", "lost", 1),
    "lost acknowledgement of Complete every time": ("CompleteMultipartUpload", "lost", 3),
    "200 with an error on Complete": ("CompleteMultipartUpload", "error(200, 'InternalError')", 1),
    "500 on Complete": ("CompleteMultipartUpload", "error(500, 'InternalError')", 4),
    "409 on Complete": ("CompleteMultipartUpload", "error(409, 'OperationAborted')", 1),
    "bit flip in a part": ("UploadPart", "flip_up", 1),
    "bit flip in a small file": ("PutObject", "flip_up", 1),
    "404 on Complete": ("CompleteMultipartUpload", "error(404, 'NoSuchUpload')", 1),
}


@pytest.mark.parametrize("case", UP)
def test_up(case: str, store, faults, folder: Path, tmp_path: Path) -> None:
    operation, name, times = UP[case]
    faults.on(operation, eval(name, vars(fault)), times)
    push_sealed(store, KEY, folder)
    assert faults.left() == 0, "the fault was not met"
    assert pulled(store, tmp_path / "back") == contents(folder)
    assert faults.s3.uploads() == []


@pytest.mark.parametrize("case", ["bit flip in a part", "bit flip in a small file"])
def test_a_flipped_bit_is_noticed_whatever_the_environment_says_of_checksums(
    case: str, store, faults, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    test_up(case, store, faults, folder, tmp_path)


# --- on the way down

DOWN = {
    "bit flip in a range": ("GetObject", "flip_down", 2, 1),
    "bit flip in a small object": ("GetObject", "flip_down", 1, 0),
    "truncated download": ("GetObject", "truncate", 3, 0),
    "reset": ("GetObject", "reset", 3, 0),
    "stall": ("GetObject", "stall", 1, 1),
    "black hole": ("GetObject", "black_hole", 1, 1),
    "503 twice": ("GetObject", "error(503, 'SlowDown')", 2, 0),
    "500 on looking": ("HeadObject", "error(500, '')", 2, 0),
}


@pytest.mark.parametrize("case", DOWN)
def test_down(case: str, store, faults, folder: Path, tmp_path: Path) -> None:
    push_sealed(store, KEY, folder)
    operation, name, times, skip = DOWN[case]
    faults.on(operation, eval(name, vars(fault)), times, skip)
    assert pulled(store, tmp_path / "back") == contents(folder)
    assert faults.left() == 0, "the fault was not met"


def test_wrong_bytes_every_time_are_data_errors_and_nothing_of_them_stays(
    store, faults, folder: Path, tmp_path: Path
) -> None:
    push_sealed(store, KEY, folder)
    faults.on("GetObject", fault.flip_down, times=float("inf"), skip=1)
    with pytest.raises(DataError, match=r"is not the file that was sealed; delete its folder there and run again"):
        pull_sealed(store, KEY, tmp_path / "back" / "x", kind="checkpoint")
    assert list((tmp_path / "back").iterdir()) == []


@pytest.mark.parametrize("name", ["error(503, 'SlowDown')", "truncate", "black_hole"])
def test_a_list_is_whole_or_is_asked_again(name: str, store, faults) -> None:
    store.put("runs/t/recipe.json", b"{}")
    faults.on("ListObjects", eval(name, vars(fault)), 1)
    assert store.list("runs/t") == {"runs/t/recipe.json": 2}


# --- at the start


def test_an_address_names_the_region_of_the_bucket(store, faults) -> None:
    assert "%2Fus-east-1%2Fs3%2F" in store.link("runs/t/report/report.html", 60)
    faults.on("HeadBucket", fault.in_region("eu-central-1"))
    store.prepare()
    assert "%2Feu-central-1%2Fs3%2F" in store.link("runs/t/report/report.html", 60)
    store.put("runs/t/report/report.html", b"page")
    assert store.get("runs/t/report/report.html") == b"page"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "RequestTimeTooSkewed",
            r"this machine's clock differs from that of http.* \(RequestTimeTooSkewed\): set it right",
        ),
        ("XMinioStorageFull", r"has no room left \(XMinioStorageFull\): delete something there, or use another store"),
    ],
)
def test_what_no_waiting_heals_is_said_with_its_remedy(code: str, said: str, store, faults) -> None:
    faults.on("PutObject.*", fault.error(403 if "Skewed" in code else 507, code), times=float("inf"))
    with pytest.raises(UsageError, match=said):
        store.prepare()


# --- claims

CLAIM = ["lost", "black_hole", "reset", "flip_up", "error(409, 'ConditionalRequestConflict')", "error(503, 'SlowDown')"]


@pytest.mark.parametrize("name", CLAIM)
def test_a_claim_is_won_once_and_known_to_be_won(name: str, store, faults) -> None:
    faults.on("PutObjectIfNone", eval(name, vars(fault)), 1)
    assert store.create("runs/t/attempts/1", b"nonce of mine") is True
    assert store.get("runs/t/attempts/1") == b"nonce of mine"
    assert store.create("runs/t/attempts/1", b"nonce of another") is False


def test_a_lost_claim_that_another_won_is_lost(store, faults) -> None:
    """The answer is lost, and the answer is that another was first."""
    store.create("runs/t/attempts/1", b"another")
    faults.on("PutObjectIfNone", fault.lost, 1)
    faults.on("GetObject", fault.flip_down, 1)
    assert store.create("runs/t/attempts/1", b"mine") is False


# --- for ever

FOR_EVER = {
    "503": (".*", "error(503, 'SlowDown')", "SlowDown"),
    "black hole": (".*", "black_hole", "fell silent"),
    "stall": ("UploadPart", "stall", ""),
    "reset": ("UploadPart|PutObject", "reset", ""),
    "500 on Complete": ("CompleteMultipartUpload", "error(500, 'InternalError')", "InternalError"),
    "bit flips": ("UploadPart", "flip_up", "BadDigest"),
    "expired": ("UploadPart|PutObject", "error(400, 'ExpiredToken')", "ExpiredToken"),
    "denied": ("UploadPart|PutObject", "error(403, 'AccessDenied')", "AccessDenied"),
}


@pytest.mark.parametrize("case", FOR_EVER)
def test_for_ever_is_12_with_everything_on_disk_and_then_the_same_call_goes_on(
    case: str, store, faults, folder: Path, tmp_path: Path
) -> None:
    impatient = S3Store.at(faults.s3.url, patience=0.5, timeout=0.5, part=PART)
    operation, name, why = FOR_EVER[case]
    faults.on(operation, eval(name, vars(fault)), times=float("inf"))
    with pytest.raises(
        StorageError, match=rf"in {impatient.url} failed for \d+ s \(.*{why}.*\); .* safe on the local disk: "
    ) as failed:
        push_sealed(impatient, KEY, folder)
    assert failed.value.exit_code is ExitCode.STORAGE
    open_sealed(folder, kind="checkpoint")
    faults.clear()
    assert sealed_names(store, "runs/t/checkpoints") == []
    push_sealed(store, KEY, folder)
    assert pulled(store, tmp_path / "back") == contents(folder)


@pytest.mark.parametrize("name", ["error(503, 'SlowDown')", "black_hole"])
def test_at_the_start_a_server_that_does_not_answer_is_12_in_seconds(name: str, store, faults) -> None:
    faults.on(".*", eval(name, vars(fault)), times=float("inf"))
    impatient = S3Store.at(faults.s3.url, patience=0.5, timeout=0.5)
    with pytest.raises(StorageError, match=r"does not answer \(.*\); check AWS_ENDPOINT_URL and the network"):
        impatient.prepare()


@pytest.mark.parametrize("operation", ["ListObjects", "PutObjectIfNone", "DeleteObject"])
def test_at_the_start_a_missing_permission_is_2_and_is_named(operation: str, store, faults) -> None:
    faults.on(operation, fault.error(403, "AccessDenied"), times=float("inf"))
    with pytest.raises(
        UsageError, match=r"refuses \w+ \(AccessDenied\): these credentials need s3:ListBucket, GetObject, PutObject"
    ):
        store.prepare()


def test_at_the_start_a_lost_answer_does_not_make_a_store_weak(store, faults) -> None:
    faults.on("PutObjectIfNone", fault.lost, 2)
    store.prepare()
    assert faults.s3.keys() == []


# --- credentials that expire


def test_expired_credentials_are_read_again(faults, folder: Path, tmp_path: Path, monkeypatch) -> None:
    """What a node's role does: the file gets new ones while the upload goes on."""
    faults.s3.enter(monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    credentials = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    words = "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    credentials.write_text(words.format("old", "old"))
    faults.on(".*", fault.expired("old"), times=float("inf"))
    store = S3Store.at(faults.s3.url, patience=20.0, timeout=1.0, part=PART)
    renewal = threading.Timer(1.0, lambda: credentials.write_text(words.format(faults.s3.user, faults.s3.secret)))
    renewal.start()
    push_sealed(store, KEY, folder)
    renewal.join()
    assert pulled(store, tmp_path / "back") == contents(folder)


# --- killed: the server, the client


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Any]:
    server = s3_server.Server(tmp_path / "server").start()
    yield server
    server.kill()


@pytest.mark.slow
def test_kill_9_of_the_server_in_mid_upload(own_server, folder: Path, tmp_path: Path, monkeypatch) -> None:
    with fault.Faults(own_server.s3.place()) as faults:
        faults.s3.enter(monkeypatch)
        store = S3Store.at(faults.s3.url, patience=60.0, timeout=5.0, part=PART)
        push_sealed(store, "runs/t/checkpoints/1", folder)
        restarted = threading.Thread(target=own_server.start)

        def kill(exchange: Any) -> None:
            exchange.read()
            own_server.kill()
            restarted.start()
            exchange.hang_up()

        faults.on("UploadPart", kill, skip=1)
        push_sealed(store, KEY, folder)
        restarted.join()
        for key in ("runs/t/checkpoints/1", KEY):
            assert pulled(store, tmp_path / key, key) == contents(folder)


CLIENT = """
    import sys
    from pathlib import Path
    from job.store.stores import push_sealed
    from job.store.s3 import S3Store
    push_sealed(S3Store.at(sys.argv[1], part=5 << 20), sys.argv[2], Path(sys.argv[3]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_client_killed_in_mid_upload(number: int, store, faults, folder: Path, tmp_path: Path) -> None:
    """Nothing of it is visible; the next start sweeps what it left, and the same upload succeeds."""
    faults.on("UploadPart", fault.black_hole, skip=1)
    command = [sys.executable, "-c", textwrap.dedent(CLIENT), faults.s3.url, KEY, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, env=faults.s3.environment()) as client:
        while faults.left():
            assert client.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)
        client.send_signal(number)
        assert client.wait(timeout=10) == -number
    assert sealed_names(store, "runs/t/checkpoints") == []
    visible = faults.s3.keys()
    assert not [key for key in visible if key.endswith(("weights", MANIFEST))]
    assert faults.s3.uploads() == [f"{KEY}/weights"]
    assert store.sweep("runs/t") == 1
    assert faults.s3.uploads() == []
    push_sealed(store, KEY, folder)
    assert pulled(store, tmp_path / "back") == contents(folder)


# --- the local disk


def test_a_full_disk_is_12_and_nothing_partial_stays(s3, folder: Path, tmp_path: Path, monkeypatch) -> None:
    s3.enter(monkeypatch)
    store = open_store(s3.url)
    push_sealed(store, KEY, folder)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(
            StorageError, match=r"the disk is full: writing .* failed; free some space and run the same command again"
        ):
            pull_sealed(store, KEY, disk / "x", kind="checkpoint")
        assert list(disk.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
        assert pulled(store, disk / "x") == contents(folder)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
