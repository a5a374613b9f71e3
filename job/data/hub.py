"""The named datasets, and their shards from the Hugging Face hub: by name, pinned to a commit, checked byte for byte.

    text/<source>/commit.json                   `main` when this folder (or its store) first asked; kept for later runs
    text/<source>/<commit>/files.json           size and SHA-256 of each shard, as the hub states them for that commit
    text/<source>/<commit>/shard_00000.parquet  there only when it is whole and its SHA-256 is the stated one
    text/<source>/<commit>/.shard_00001.parquet.part     bytes so far; a download that was killed begins again

Shards are never listed, they are named: shard 0, 1, 2, ... for training and the dataset's last one for validation
(leaderboard §6). The hub is asked through huggingface_hub, which honours HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE,
proxies, and Retry-After; requests that fail for a passing reason (timeouts, broken connections, 408, 429, 5xx) are
repeated, and a body that broke off is resumed. Shards come by `http_get`, the step of `hf_hub_download` that transfers:
around it `hf_hub_download` asks for each file again what files.json says, and leaves a temporary file of its own name
behind each time it is killed (16 shards are 4 GB).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from job.addresses import user_apart
from job.data.documents import Shard, Source
from job.data.local import parquet_text_bytes, read_parquet, readable
from job.errors import DataError, SpeedrunError, StorageError, first_line
from job.retry import attempts
from job.store.documents import read_document
from job.store.sealed import atomic_write, sha256_file, storage_errors

if TYPE_CHECKING:
    from job.store.stores import Store

PARALLEL = 16
"""downloads at a time"""
ATTEMPTS = 3
RETRIED = (408, 429, 500, 502, 503, 504)
NAMES_PER_QUESTION = 100
ANSWER_SECONDS = 30.0
FREE_BYTES = 1 << 30
"""left free on the disk beyond what is to be written"""
REMEDY = "delete it and run again"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset of `count` shards of about `text_bytes` bytes of text each; the last shard is for validation."""

    repo: str
    count: int
    text_bytes: int = 250_000_000


DATASETS = {
    "climbmix": Dataset("karpathy/climbmix-400b-shuffle", 6543),
    "fineweb-edu": Dataset("karpathy/fineweb-edu-100b-shuffle", 1823),
}
"""as the leaderboard's runs used them (leaderboard §6)"""
CROP_SHARE = 0.346
"""tokens that packing drops, published for FineWeb-Edu in rows of 2048 (leaderboard §6); ClimbMix's never was"""


@dataclasses.dataclass(frozen=True)
class HubShard:
    """A shard of a named dataset. Its text can be read once it has been fetched."""

    name: str
    size: int
    folder: Path

    def texts(self) -> Iterator[str | None]:
        """Documents; DataError when the file is not there or is not what the hub states for its commit."""
        file = self.folder / self.name
        stated = _shards_stated(self.folder).get(self.name)
        if stated is None or not file.is_file():
            raise DataError(f"{file} was never fetched; run speedrun prepare again")
        with readable(file):
            differs = file.stat().st_size != stated["size"] or sha256_file(file) != stated["sha256"]
            if differs:
                raise DataError(
                    f"{file} is not what the hub states for it (size or SHA-256 differs); delete it and run again"
                )
            parquet_text_bytes(file)
            yield from read_parquet(file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubSource(Source):
    """A named dataset; `hub` fetches its shards."""

    val: Shard
    hub: Hub


def open_hub(name: str, text: Path, store: Store | None = None) -> HubSource:
    """The dataset `name`, its files below `text`; DataError when no record and no answer of the hub says its commit."""
    dataset = DATASETS[name]
    hub = Hub(dataset, text / name, store)
    names = (f"shard_{index:05d}.parquet" for index in range(dataset.count))
    *train, val = (HubShard(name, dataset.text_bytes, hub.folder) for name in names)
    return HubSource(_identity(name, hub.commit), tuple(train), val=val, hub=hub)


def recorded_identity(name: str, text: Path, store: Store | None) -> dict[str, Any] | None:
    """That of the dataset `name` at the commit that `text` or the store has a record of; None where the hub would have
    to be asked."""
    record = _commit_record(DATASETS[name].repo, text / name / "commit.json", store)
    return _identity(name, record["commit"]) if record else None


def _identity(name: str, commit: str) -> dict[str, Any]:
    return {"source": name, "repo": DATASETS[name].repo, "commit": commit}


def _commit_key(file: Path) -> str:
    """Where a store has the record that is `file` here."""
    return f"text/{file.parent.name}/{file.name}"


def _commit_record(repo: str, file: Path, store: Store | None) -> dict[str, Any] | None:
    """What `file`, or else the store, has on record of `repo`'s commit; DataError for a record of anything else."""
    where: object = file
    data = _bytes(file) if file.is_file() else None
    if data is None and store:
        where, data = f"{store.url}/{_commit_key(file)}", store.get(_commit_key(file))
    if data is None:
        return None
    record = read_document(data, where, REMEDY, {"repo": str, "commit": str})
    if record["repo"] != repo:
        raise DataError(f"{where} is not a record of {repo}'s commit; {REMEDY}")
    return record


class Hub:
    """A dataset at one commit: its shards on disk and those being downloaded. Close it to stop downloads."""

    def __init__(self, dataset: Dataset, folder: Path, store: Store | None = None) -> None:
        self.repo = dataset.repo
        self.commit = self._pinned(folder / "commit.json", store)
        self.folder = folder / self.commit
        self.progress: Callable[[int, int], None] = lambda done, total: None
        """called with the bytes that have come and those that were wanted, from several threads"""
        self._coming: dict[str, Future[None]] = {}
        self._waiting: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._done = self._total = 0

    def close(self) -> None:
        """End downloads at their next piece. Nobody waits for a silent server."""
        self._stopped.set()

    def want(self, names: Sequence[str], also_bytes: int = 0) -> None:
        """Begin to fetch `names`, in this order, `also_bytes` more being about to be written beside them.

        Raises DataError for a name that the hub does not have, StorageError when the disk has no room.
        """
        new = [name for name in names if name not in self._coming]
        stated = self._stated(new)
        missing = sum(stated[name]["size"] for name in new if _size(self.folder / name) != stated[name]["size"])
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        needed = missing + also_bytes
        if needed and free < needed + FREE_BYTES:
            raise StorageError(
                f"{self.repo} needs {needed / 1e9:.1f} GB more on the disk of {self.folder}, which has"
                f" {free / 1e9:.1f} GB free; free some space or choose another --out"
            )
        self._total += missing
        for name in new:
            self._coming[name] = Future()
            self._waiting.put((name, stated[name]))
        while len(self._threads) < min(PARALLEL, len(self._coming)):
            self._threads.append(threading.Thread(target=self._work, daemon=True))
            self._threads[-1].start()

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

    def _pinned(self, file: Path, store: Store | None) -> str:
        """The commit that this folder has used since its first run, or else the store has, or else the hub names now.

        Recorded in both places, so that every machine with this store makes and finds the same prepared sets.
        """
        record = _commit_record(self.repo, file, store)
        if record is None:
            record = {"repo": self.repo, "commit": self._main(), "endpoint": endpoint()}
            if store and not store.create(_commit_key(file), _json(record)):
                record = _commit_record(self.repo, file, store) or record
        if not file.is_file():
            atomic_write(file, _json(record))
        return record["commit"]

    def _main(self) -> str:
        """The commit that the hub calls `main` now."""
        commit = self._ask("GET", "revision/main").get("sha")
        if not isinstance(commit, str) or len(commit) != 40:
            raise DataError(f"{endpoint()} names no commit for {self.repo}; check HF_ENDPOINT")
        return commit

    def _stated(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """{name: {"size", "sha256"}} as recorded, or else as the hub says now; recorded once for the commit."""
        file = self.folder / "files.json"
        known = _shards_stated(self.folder) if file.is_file() else {}
        unknown = [name for name in names if name not in known]
        for start in range(0, len(unknown), NAMES_PER_QUESTION):
            asked = unknown[start : start + NAMES_PER_QUESTION]
            answers = self._ask("POST", f"paths-info/{self.commit}", json={"paths": asked, "expand": False})
            for answer in answers if isinstance(answers, list) else []:
                with contextlib.suppress(KeyError, TypeError):
                    known[answer["path"]] = {"size": int(answer["lfs"]["size"]), "sha256": answer["lfs"]["oid"]}
            if missing := [name for name in asked if name not in known]:
                raise DataError(
                    f"{self.repo} has no {missing[0]} with a stated SHA-256 at commit {self.commit} on {endpoint()};"
                    " check HF_ENDPOINT, or choose another data.source"
                )
        if unknown:
            atomic_write(file, _json(known))
        return {name: known[name] for name in names}

    def _ask(self, method: Any, question: str, **body: Any) -> Any:
        """The JSON that the hub answers to `question` about the dataset."""
        from huggingface_hub.utils import hf_raise_for_status, http_backoff

        url = f"{endpoint()}/api/datasets/{self.repo}/{question}"
        try:
            response = http_backoff(
                method,
                url,
                headers=headers(),
                timeout=ANSWER_SECONDS,
                max_retries=ATTEMPTS,
                retry_on_status_codes=RETRIED,
                **body,
            )
            hf_raise_for_status(response)
        except MemoryError:
            raise
        except Exception as error:  # a proxy of a kind that is not installed, a token that is no header, ...
            raise DataError(
                f"the hub cannot be asked about {self.repo} ({_reason(error)}); check the network, the proxy settings,"
                f" HF_TOKEN and HF_ENDPOINT ({endpoint()})"
            ) from error
        try:
            return response.json()
        except (ValueError, RecursionError):
            raise DataError(
                f"{url} answered with something else than JSON; check HF_ENDPOINT and the proxy settings"
            ) from None

    # ---- files

    def _fetch(self, name: str, stated: dict[str, Any]) -> None:
        """Bring the shard here, whole and checked, or raise DataError with its name."""
        file, part = self.folder / name, self.folder / f".{name}.part"
        if _size(file) == stated["size"]:
            return
        problem = ""
        for _ in attempts(ATTEMPTS):
            problem = self._download(name, part, stated["size"])
            if not problem and sha256_file(part) == stated["sha256"]:
                with storage_errors(file):
                    os.replace(part, file)
                return
            problem = problem or "its SHA-256 is not the one that the hub states"
            self._arrived(-part.stat().st_size)
            part.unlink()
        raise DataError(
            f"{name} of {self.repo} cannot be fetched: {problem} ({ATTEMPTS} attempts); check HF_ENDPOINT"
            f" ({endpoint()}) and run again"
        )

    def _download(self, name: str, part: Path, size: int) -> str:
        """Write `part` anew; what was wrong, or "" when it has all its `size` bytes. Raises DataError where trying
        again is no use."""
        import httpx2
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.file_download import hf_hub_url, http_get

        url = hf_hub_url(self.repo, name, repo_type="dataset", revision=self.commit, endpoint=endpoint())
        bar = _Bar(self._arrived)
        shown = cast(type, lambda **_: bar)
        try:
            with storage_errors(part), open(part, "wb") as file:
                http_get(url, file, headers=headers(), expected_size=size, tqdm_class=shown)
        except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
            response = getattr(error, "response", None)
            if isinstance(error, OfflineModeIsEnabled) or (
                response is not None and response.status_code not in RETRIED
            ):
                raise DataError(
                    f"{name} of {self.repo} cannot be fetched: {_reason(error)}; check HF_ENDPOINT ({endpoint()})"
                    " and HF_TOKEN"
                ) from error
            return _reason(error)
        except OSError as error:
            if error.errno is not None:
                raise
            return "the answer has another size than the hub states"  # a page of an error or of a login, not the file
        except (SpeedrunError, MemoryError, CancelledError):
            raise
        except Exception as error:
            raise DataError(
                f"{name} of {self.repo} cannot be fetched: {_reason(error)}; check the proxy settings, HF_ENDPOINT"
                f" ({endpoint()}) and HF_TOKEN"
            ) from error
        return ""

    def _arrived(self, count: int) -> None:
        if self._stopped.is_set():
            raise CancelledError
        with self._lock:
            self._done += count
            self.progress(self._done, self._total)


class _Bar(contextlib.nullcontext):
    """A progress bar as http_get sees one: each piece is counted, which is also where a download is stopped."""

    def __init__(self, arrived: Callable[[int], None]) -> None:
        super().__init__(self)
        self.update = arrived


def endpoint() -> str:
    """The hub's address, without a slash at the end and without user and password, which `headers` has."""
    return _endpoint()[0].rstrip("/")


def headers() -> dict[str, str]:
    """What each question to the hub is asked with."""
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers() | _endpoint()[1]


def _endpoint() -> tuple[str, dict[str, str]]:
    return user_apart(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()


def _shards_stated(folder: Path) -> dict[str, Any]:
    """What files.json has of the shards of a commit."""
    return read_document(_bytes(folder / "files.json"), folder / "files.json", REMEDY, {})


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}); {REMEDY}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    return first_line(error)
