"""The store: one set of expectations for a folder and for a real S3 server, then what is said about servers that cannot
be used."""

from __future__ import annotations

import builtins
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import s3_server
from job.errors import DataError, StorageError, UsageError
from job.store import open_store
from job.store.s3 import S3Store
from job.store.sealed import MANIFEST, open_sealed, sealing, sha256_file
from job.store.stores import FolderStore, Store, pull_sealed, push_sealed, sealed_names, stored_manifest

RACERS, ROUNDS = 16, 20


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path: Path, monkeypatch) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    s3 = request.getfixturevalue("s3")
    s3.enter(monkeypatch)
    return open_store(s3.url)


def a_folder(path: Path, **files: bytes) -> Path:
    with sealing(path, kind="thing", made_from={"of": sorted(files)}) as folder:
        for name, data in files.items():
            (folder.path / name).parent.mkdir(exist_ok=True)
            (folder.path / name).write_bytes(data)
    return path


# --- what both do


KEYS = ["a", "b c", "d/e", "d/f", "d/g/h", "d-e", "ü/é.json"]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["put", "create", "delete", "get", "list"]), st.sampled_from(KEYS), st.binary(max_size=8)
        ),
        max_size=12,
    )
)
def test_a_store_is_a_dictionary(store: Store, steps: list[tuple[str, str, bytes]]) -> None:
    top = f"runs/{os.urandom(6).hex()}"
    model: dict[str, bytes] = {}
    for action, name, data in steps:
        key = f"{top}/{name}"
        match action:
            case "put":
                store.put(key, data)
                model[key] = data
            case "create":
                assert store.create(key, data) is (model.setdefault(key, data) == data)
            case "delete":
                store.delete([key, f"{top}/never/there"])
                model.pop(key, None)
            case "get":
                assert store.get(key) == model.get(key)
            case "list":
                assert store.list(top) == {key: len(data) for key, data in model.items()}
                assert store.list(f"{top}/d") == {
                    k: len(data) for k, data in model.items() if k.startswith(f"{top}/d/")
                }


def race(store: Store, rounds: int) -> None:
    """Rounds of claims of one key by all racers at once: exactly one wins, and it is the one that is there."""
    with ThreadPoolExecutor(RACERS) as pool:
        for number in range(rounds):
            key, barrier = f"runs/t/attempts/{number}", threading.Barrier(RACERS)
            claims = [f"{racer} {os.urandom(8).hex()}".encode() for racer in range(RACERS)]

            def claim(data: bytes, key: str = key, barrier: threading.Barrier = barrier) -> bool:
                barrier.wait()
                return store.create(key, data)

            won = list(pool.map(claim, claims))
            assert [data for data, mine in zip(claims, won, strict=True) if mine] == [store.get(key)]


def test_of_racing_claims_exactly_one_wins(store: Store) -> None:
    race(store, ROUNDS if isinstance(store, FolderStore) else 2)


@pytest.mark.slow
def test_of_racing_claims_exactly_one_wins_in_many_rounds(s3, monkeypatch) -> None:
    """Of 16 that meet, this server lets some wait a second or more: 20 rounds take the better part of a minute."""
    s3.enter(monkeypatch)
    race(open_store(s3.url), ROUNDS)


def test_a_sealed_folder_goes_there_and_comes_back(store: Store, tmp_path: Path) -> None:
    files = {"weights.safetensors": os.urandom(200_000), "empty": b"", "deeper/ü 1.json": b"{}"}
    there = a_folder(tmp_path / "x", **files)
    assert sealed_names(store, "things") == []
    assert push_sealed(store, "things/x", there) == 200_002
    assert sealed_names(store, "things") == ["x"]
    assert push_sealed(store, "things/x", there) == 0
    back = pull_sealed(store, "things/x", tmp_path / "back" / "x", kind="thing").verify()
    assert {name: (back.path / name).read_bytes() for name in back.files} == files
    assert open_sealed(there, kind="thing").id == back.id
    assert store.list("things").keys() == {f"things/x/{name}" for name in [*files, MANIFEST]}


def test_without_its_manifest_a_folder_does_not_exist(store: Store, tmp_path: Path) -> None:
    def not_any_more() -> None:
        raise UsageError("another attempt took over")

    with pytest.raises(UsageError, match="took over"):
        push_sealed(store, "things/x", a_folder(tmp_path / "x", a=b"1"), before_manifest=not_any_more)
    assert sealed_names(store, "things") == []
    assert stored_manifest(store, "things/x") is None
    with pytest.raises(DataError, match="was never sealed"):
        pull_sealed(store, "things/x", tmp_path / "back", kind="thing")


@pytest.mark.parametrize("damage", ["other bytes", "shorter", "gone"])
def test_damage_in_the_store_is_found_and_nothing_of_it_stays_here(store: Store, tmp_path: Path, damage: str) -> None:
    push_sealed(store, "things/x", a_folder(tmp_path / "x", a=b"right", b=b"also"))
    store.delete(["things/x/a"]) if damage == "gone" else store.put(
        "things/x/a", b"wrong" if damage == "other bytes" else b"r"
    )
    with pytest.raises(DataError, match=r"things/x/a is not .*delete its folder there and run again"):
        pull_sealed(store, "things/x", tmp_path / "back" / "x", kind="thing")
    assert list((tmp_path / "back").iterdir()) == []


def test_a_manifest_that_is_none_is_a_sentence(store: Store) -> None:
    store.put(f"things/x/{MANIFEST}", b"[]")
    with pytest.raises(DataError, match=r"manifest.json holds no JSON object; delete that folder there"):
        stored_manifest(store, "things/x")


def test_prepare_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    store.prepare()
    assert store.list("things") == {}
    if isinstance(store, FolderStore):
        assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../../up"])
def test_no_key_leaves_the_store(store: Store, key: str) -> None:
    with pytest.raises(ValueError, match="is no key of a store"):
        store.get(key)


def test_the_link_is_an_address_that_a_browser_can_open(s3, monkeypatch) -> None:
    import urllib.request

    s3.enter(monkeypatch)
    store = open_store(s3.url)
    store.put("report.html", b"<p>page</p>", "text/html")
    with urllib.request.urlopen(store.link("report.html", 60)) as page:
        assert (page.read(), page.headers["Content-Type"]) == (b"<p>page</p>", "text/html")


# --- what killed writers leave


def test_the_sweep_takes_unfinished_uploads_below_its_folder_and_no_others(s3, monkeypatch) -> None:
    s3.enter(monkeypatch)
    store, client = open_store(s3.url), s3.client()
    for key in ("runs/t/checkpoints/1/w", "runs/t2/checkpoints/1/w", "prepared/p/w"):
        client.create_multipart_upload(Bucket=s3.bucket, Key=f"{s3.prefix}/{key}")
    store.put("runs/t/recipe.json", b"{}")
    assert store.sweep("runs/t") == 1
    assert s3.uploads() == ["prepared/p/w", "runs/t2/checkpoints/1/w"]
    assert store.sweep("prepared", older_than=3600) == 0
    time.sleep(1.1)
    assert store.sweep("prepared", older_than=1) == 1
    assert s3.keys() == ["runs/t/recipe.json"]


def test_the_sweep_of_a_folder_takes_temporary_files(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put("runs/t/recipe.json", b"{}")
    (tmp_path / "runs/t/.recipe.json.tmp-1-ab").write_bytes(b"{")
    assert store.sweep("runs/t", older_than=60) == 0
    assert store.sweep("runs/t") == 1
    assert store.list("runs") == {"runs/t/recipe.json": 2}


# --- stores that cannot be used


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UsageError, match=r"--bucket .*file/x cannot be used \(Not a directory\); choose another folder"
    ):
        open_store(str(tmp_path / "file" / "x")).prepare()


def test_a_folder_that_fails_later_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"the store .* failed \(.*\); everything sealed is safe on the local disk"):
        open_store(str(tmp_path)).put("file/x", b"")


@pytest.mark.parametrize(
    ("refuses", "sentence"),
    [("bucket/there/f", "the store .*/bucket failed"), ("here/f", r".*/here/f cannot be written")],
)
def test_a_pull_that_is_refused_names_the_side_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str, sentence: str
) -> None:
    """As for a user who may not read there, or not write here: root may do both."""
    store, opened = FolderStore(tmp_path / "bucket"), open
    store.put("there/f", b"1")

    def refusing(file: object, *given: object, **named: object) -> object:
        if str(file) == str(tmp_path / refuses):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *given, **named)

    monkeypatch.setattr(builtins, "open", refusing)
    with pytest.raises(StorageError, match=rf"^{sentence} \(Permission denied\)"):
        store.get_file("there/f", tmp_path / "here" / "f", 1, sha256(b"1").hexdigest())


@pytest.mark.parametrize("url", ["s3://", "s3://B/x", "gs://bucket/x", "s3:///x"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=f"--bucket {url} cannot be used: write s3://bucket/prefix"):
        open_store(url)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            "there are no credentials: set AWS_ACCESS_KEY_ID and ",
        ),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "Partial credentials found in env, missing: AWS_SECRET_ACCESS_KEY"),
        (
            {"AWS_ACCESS_KEY_ID": "stranger"},
            r"does not know these credentials \(InvalidAccessKeyId\): check AWS_ACCESS_KEY_ID",
        ),
        ({"AWS_SECRET_ACCESS_KEY": "guessed"}, r"does not know these credentials \(SignatureDoesNotMatch\): check "),
        (
            {"AWS_ENDPOINT_URL": "localhost:1"},
            "the AWS settings cannot be used .*; correct the AWS_ variables or files",
        ),
        ({"AWS_PROFILE": "nobody"}, "the AWS settings cannot be used .*nobody"),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_WEB_IDENTITY_TOKEN_FILE": "/gone", "AWS_ROLE_ARN": "arn:aws:iam::1:role/x"},
            "the AWS settings cannot be used .*/gone",
        ),
    ],
)
def test_settings_that_cannot_work_are_usage_errors_at_once(
    s3, monkeypatch, change: dict[str, str], sentence: str
) -> None:
    s3.enter(monkeypatch)
    for name, value in change.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(UsageError, match=sentence) as refused:
        open_store(s3.url).prepare()
    assert s3.secret not in str(refused.value)
    assert "guessed" not in str(refused.value)


def test_a_bucket_that_is_not_there_is_refused(s3, monkeypatch) -> None:
    s3.enter(monkeypatch)
    with pytest.raises(UsageError, match="has no bucket nowhere: create it, or correct --bucket"):
        open_store("s3://nowhere/x").prepare()


def test_a_region_is_not_needed(s3, monkeypatch) -> None:
    s3.enter(monkeypatch)
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    open_store(s3.url).prepare()


def test_a_server_that_is_not_there_is_a_storage_error_in_seconds(s3, monkeypatch) -> None:
    s3.enter(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(
        StorageError, match=r"does not answer \(http://127.0.0.1:1 cannot be reached\); check AWS_ENDPOINT_URL and"
    ):
        S3Store.at(s3.url, patience=0.5).prepare()


@pytest.fixture
def weak_server(tmp_path: Path) -> Iterator[str]:
    """A server that ignores conditional writes, with a bucket."""
    (tmp_path / "data" / "bucket").mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rclone = Path(sys.executable).with_name("rclone")
    words = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", "user,secret", str(tmp_path / "data")]
    environment = os.environ | {"RCLONE_CONFIG": os.devnull}
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        process.kill()


def test_a_server_that_ignores_conditional_writes_is_refused_with_a_sentence(weak_server: str, monkeypatch) -> None:
    weak = s3_server.S3(weak_server, "bucket", "", "user", "secret")
    weak.enter(monkeypatch)
    sentence = (
        r"its server ignores conditional writes \(2 of 2 writers created the same object\), so two attempts at one run"
        " could both publish"
    )
    with pytest.raises(UsageError, match=sentence):
        open_store(f"{weak.url}/x").prepare()
    assert weak.keys() == []


def test_a_folder_without_links_is_refused(tmp_path: Path, monkeypatch) -> None:
    """As on a mounted bucket: without them nothing fences."""

    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(UsageError, match=r"cannot be used \(Operation not permitted\); choose another folder"):
        FolderStore(tmp_path).prepare()
    assert list(tmp_path.iterdir()) == []


def test_the_store_moves_whole_files_of_several_parts(s3, monkeypatch, tmp_path: Path) -> None:
    s3.enter(monkeypatch)
    store, file = S3Store.at(s3.url, part=5 << 20), tmp_path / "f"
    file.write_bytes(os.urandom(12 << 20))
    store.put_file("f", file, sha256_file(file))
    assert s3.client().head_object(Bucket=s3.bucket, Key=f"{s3.prefix}/f")["ETag"].endswith('-3"')
    store.get_file("f", tmp_path / "g", 12 << 20, sha256_file(file))
    assert (tmp_path / "g").read_bytes() == file.read_bytes()
