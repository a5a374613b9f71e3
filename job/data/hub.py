"""The named datasets, and their shards from the Hugging Face hub: by name, pinned to a commit, checked byte for byte.

    text/<source>/commit.json                   what `main` was when this folder (or its store) first asked; every later run uses it
    text/<source>/<commit>/files.json           size and SHA-256 of each shard, as the hub states them for that commit
    text/<source>/<commit>/shard_00000.parquet  there only when it is whole and its SHA-256 is the stated one
    text/<source>/<commit>/.shard_00001.parquet.part     bytes so far; a download goes on where it was interrupted

Shards are never listed, they are named: shard 0, 1, 2, ... for training and the dataset's last one for validation (leaderboard §6).
The hub is asked through huggingface_hub, which honours HF_ENDPOINT, HF_TOKEN, proxies, and Retry-After; requests that fail for
a passing reason (timeouts, broken connections, 408, 429, 5xx) are repeated, and a body is resumed. `hf_hub_download` is not used: since
version 2 it throws away what an interrupted process had fetched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from job.data.local import parquet_text_bytes, read_parquet, readable
from job.data.sources import Source
from job.errors import DataError, StorageError
from job.sealed import atomic_write, sha256_file, storage_errors

if TYPE_CHECKING:
    from job.store import Store

PARALLEL = 16
"""downloads at a time"""
ATTEMPTS = 3
RETRIED = (408, 429, 500, 502, 503, 504)
NAMES_PER_QUESTION = 100
ANSWER_SECONDS = 30.0
FREE_BYTES = 1 << 30
"""left free on the disk beyond what is to be written"""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset of `count` shards of about `text_bytes` bytes of text each; the last shard is for validation."""

    repo: str
    count: int
    text_bytes: int = 250_000_000

    @staticmethod
    def shard_name(index: int) -> str:
        return f"shard_{index:05d}.parquet"


DATASETS = {
    "climbmix": Dataset("karpathy/climbmix-400b-shuffle", 6543),
    "fineweb-edu": Dataset("karpathy/fineweb-edu-100b-shuffle", 1823),
}
"""as the leaderboard's runs used them (leaderboard §6)"""


@dataclasses.dataclass(frozen=True)
class HubShard:
    """A shard of a named dataset. Its text can be read once it has been fetched."""

    name: str
    size: int
    folder: Path

    def texts(self) -> Iterator[str | None]:
        """Documents; DataError when the file is not there or is not what the hub states for its commit."""
        file = self.folder / self.name
        stated = _read_json(self.folder / "files.json").get(self.name)
        if stated is None or not file.is_file():
            raise DataError(f"{file} was never fetched; run speedrun prepare again")
        with readable(file):
            differs = file.stat().st_size != stated["size"] or sha256_file(file) != stated["sha256"]
            if differs:
                raise DataError(f"{file} is not what the hub states for it (size or SHA-256 differs); delete it and run again")
            parquet_text_bytes(file)
            yield from read_parquet(file)


def open_hub(name: str, text: Path, store: Store | None = None) -> Source:
    """The dataset called `name`, its files below `text`; DataError when its commit is not recorded and the hub cannot be asked."""
    dataset = DATASETS[name]
    hub = Hub(dataset, text / name, store)
    *train, val = (HubShard(dataset.shard_name(i), dataset.text_bytes, hub.folder) for i in range(dataset.count))
    return Source({"source": name, "repo": dataset.repo, "commit": hub.commit}, tuple(train), val, hub)


class Hub:
    """A dataset at one commit, and the shards of it that are on disk or on their way here. Close it to stop downloads."""

    def __init__(self, dataset: Dataset, folder: Path, store: Store | None = None) -> None:
        self.repo = dataset.repo
        self.commit = self._pinned(folder / "commit.json", store, f"text/{folder.name}/commit.json")
        self.folder = folder / self.commit
        self._progress: Callable[[int, int], None] = lambda done, total: None
        self._coming: dict[str, Future[None]] = {}
        self._waiting: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._done = self._total = 0

    def close(self) -> None:
        """End downloads at their next piece; what they have fetched so far is kept. Nobody waits for a silent server."""
        self._stopped.set()

    def on_progress(self, progress: Callable[[int, int], None]) -> None:
        """`progress(done, total)` in bytes is called from several threads."""
        self._progress = progress

    def want(self, names: Sequence[str], also_bytes: int = 0) -> None:
        """Begin to fetch `names`, in this order, `also_bytes` more being about to be written beside them.

        Raises DataError for a name that the hub does not have, StorageError when the disk has no room.
        """
        new = [name for name in names if name not in self._coming]
        stated = self._stated(new)
        missing = {name: self._missing_bytes(name, stated[name]) for name in new}
        self._check_room(sum(missing.values()) + also_bytes)
        self._total += sum(missing.values())
        for name in new:
            self._coming[name] = Future()
            self._waiting.put((name, stated[name]))
        while len(self._threads) < min(PARALLEL, len(self._coming)):
            self._threads.append(threading.Thread(target=self._work, daemon=True))
            self._threads[-1].start()

    def has(self, name: str) -> bool:
        """Whether the shard `name` is on disk, wanted or not."""
        return (self.folder / name).is_file()

    def is_here(self, name: str) -> bool:
        """Whether the wanted shard `name` has arrived; raises what went wrong with it."""
        future = self._coming[name]
        return future.done() and future.result() is None

    def wait(self, name: str) -> None:
        """Until the wanted shard `name` has arrived; raises what went wrong with it."""
        self._coming[name].result()

    def _work(self) -> None:
        """One of the fetching threads: whatever happens to a shard is what its future holds."""
        while not self._stopped.is_set():
            name, stated = self._waiting.get()
            try:
                self._fetch(name, stated)
            except BaseException as error:
                self._coming[name].set_exception(error)
            else:
                self._coming[name].set_result(None)

    # ---- what the hub says

    def _pinned(self, file: Path, store: Store | None, key: str) -> str:
        """The commit that this folder has used since its first run, or else the store has, or else the hub names now.

        Recorded in both places, so that every machine with this store makes and finds the same prepared sets.
        """
        if not file.is_file():
            record = store.get(key) if store else None
            if record is None:
                record = self._main()
                if store and not store.create(key, record):
                    record = store.get(key) or record
            atomic_write(file, record)
        pinned = _read_json(file)
        if pinned.get("repo") == self.repo and isinstance(pinned.get("commit"), str):
            return pinned["commit"]
        raise DataError(f"{file} is not a record of {self.repo}'s commit; delete it and run again")

    def _main(self) -> bytes:
        """The record of the commit that the hub calls `main` now."""
        commit = self._ask("GET", "revision/main").get("sha")
        if not isinstance(commit, str) or len(commit) != 40:
            raise DataError(f"{_endpoint()} names no commit for {self.repo}; check HF_ENDPOINT")
        return json.dumps({"repo": self.repo, "commit": commit, "endpoint": _endpoint()}, indent=1).encode()

    def _stated(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """{name: {"size", "sha256"}} as recorded, or else as the hub says now; recorded once for the commit."""
        file = self.folder / "files.json"
        known = _read_json(file) if file.is_file() else {}
        unknown = [name for name in names if name not in known]
        for start in range(0, len(unknown), NAMES_PER_QUESTION):
            known |= self._ask_about(unknown[start : start + NAMES_PER_QUESTION])
        if unknown:
            atomic_write(file, json.dumps(known, indent=1).encode())
        return {name: known[name] for name in names}

    def _ask_about(self, names: list[str]) -> dict[str, dict[str, Any]]:
        answers = self._ask("POST", f"paths-info/{self.commit}", json={"paths": names, "expand": False})
        found = {}
        for answer in answers if isinstance(answers, list) else []:
            with contextlib.suppress(KeyError, TypeError):
                found[answer["path"]] = {"size": int(answer["lfs"]["size"]), "sha256": answer["lfs"]["oid"]}
        for name in names:
            if name not in found:
                raise DataError(
                    f"{self.repo} has no {name} with a stated SHA-256 at commit {self.commit} on {_endpoint()};"
                    " check HF_ENDPOINT, or choose another data.source"
                )
        return found

    def _ask(self, method: Any, question: str, **body: Any) -> Any:
        """The JSON that the hub answers to `question` about the dataset."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        url = f"{_endpoint()}/api/datasets/{self.repo}/{question}"
        try:
            response = http_backoff(
                method,
                url,
                headers=build_hf_headers(),
                timeout=ANSWER_SECONDS,
                max_retries=ATTEMPTS,
                retry_on_status_codes=RETRIED,
                **body,
            )
            hf_raise_for_status(response)
            return response.json()
        except (HfHubHTTPError, httpx2.HTTPError) as error:
            raise DataError(
                f"the hub cannot be asked about {self.repo} ({_reason(error)}); check the network and HF_ENDPOINT ({_endpoint()})"
            ) from error
        except ValueError:
            raise DataError(f"{url} answered with something else than JSON; check HF_ENDPOINT and the proxy settings") from None

    # ---- files

    def _missing_bytes(self, name: str, stated: dict[str, Any]) -> int:
        file, part = self.folder / name, self._part(name)
        if _size(file) == stated["size"]:
            return 0
        return max(0, stated["size"] - (_size(part) or 0))

    def _check_room(self, needed: int) -> None:
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        if needed and free < needed + FREE_BYTES:
            raise StorageError(
                f"{self.repo} needs {needed / 1e9:.1f} GB more on the disk of {self.folder}, which has {free / 1e9:.1f} GB free;"
                " free some space or choose another --out"
            )

    def _part(self, name: str) -> Path:
        return self.folder / f".{name}.part"

    def _fetch(self, name: str, stated: dict[str, Any]) -> None:
        """Bring the shard here, whole and checked, or raise DataError with its name."""
        file, part = self.folder / name, self._part(name)
        if _size(file) == stated["size"]:
            return
        problem = ""
        for attempt in range(ATTEMPTS):
            problem = self._download(name, part, stated["size"])
            if not problem and sha256_file(part) == stated["sha256"]:
                with storage_errors(file):
                    os.replace(part, file)
                return
            if not problem:
                part.unlink()
                problem = "its SHA-256 is not the one that the hub states"
            elif attempt < ATTEMPTS - 1:
                time.sleep(2.0**attempt)
        raise DataError(
            f"{name} of {self.repo} cannot be fetched: {problem} ({ATTEMPTS} attempts); check HF_ENDPOINT ({_endpoint()}) and run again"
        )

    def _download(self, name: str, part: Path, size: int) -> str:
        """Complete `part`; what was wrong, or "" when it has all its `size` bytes. Raises DataError where trying again is no use."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.file_download import hf_hub_url, http_get
        from huggingface_hub.utils import build_hf_headers

        if (_size(part) or 0) > size:
            part.unlink()
        url = hf_hub_url(self.repo, name, repo_type="dataset", revision=self.commit, endpoint=_endpoint())
        try:
            with storage_errors(part), open(part, "ab+") as handle:
                sink = _Sink(handle, self._arrived)
                http_get(url, sink, resume_size=handle.tell(), headers=build_hf_headers(), expected_size=size)
        except HfHubHTTPError as error:
            if error.response.status_code not in RETRIED:
                raise DataError(
                    f"{name} of {self.repo} cannot be fetched: {_reason(error)}; check HF_ENDPOINT ({_endpoint()}) and HF_TOKEN"
                ) from error
            return _reason(error)
        except httpx2.HTTPError as error:
            return _reason(error)
        except OSError as error:
            if error.errno is not None:
                raise
            part.unlink()  # a whole answer of another length: a page of an error or of a login, not the file
            return "the answer has another size than the hub states"
        return ""

    def _arrived(self, count: int) -> None:
        if self._stopped.is_set():
            raise CancelledError
        with self._lock:
            self._done += count
            self._progress(self._done, self._total)


class _Sink:
    """The file that http_get writes to; each piece is counted, which is also where a download is stopped."""

    def __init__(self, handle: IO[bytes], arrived: Callable[[int], None]) -> None:
        self._handle, self._arrived = handle, arrived
        self.seek, self.tell = handle.seek, handle.tell

    def write(self, data: bytes) -> int:
        self._arrived(len(data))
        return self._handle.write(data)

    def truncate(self) -> int:
        self._arrived(self._handle.tell() - self._handle.seek(0, os.SEEK_END))
        self._handle.seek(0)
        return self._handle.truncate()


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); delete it and run again") from error
    if not isinstance(value, dict):
        raise DataError(f"{file} holds no record; delete it and run again")
    return value


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    return (str(error).splitlines() or [""])[0] or type(error).__name__
