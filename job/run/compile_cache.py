"""The compile cache: what one start of a run has compiled, the next one loads.

On a GPU a warm-up compiles every kind of block, the loss and the updates. A preempted run comes back on a machine that
has none of it, and its GPUs would wait for the compilers again. All of these keep what they make in a folder, by a hash
of the source:

    Inductor            graphs (FX and AOTAutograd), generated code, C++ libraries, and the Triton kernels of a graph
    Triton              its kernels and their launchers
    FlashAttention 4    its kernels, where it is installed; unless it is asked to, it keeps nothing

The ranks of a node share one folder: a temporary one, because libraries are loaded from it, which a mounted --out may
forbid. Ranks on different devices compile different graphs (a device's number is part of a graph), so it is whole when
all of them are warm. Then the supervisor, beside the training, seals it as one archive: in the bucket one object
instead of hundreds, with one hash.

    <out>/compiled/<id>/    caches.zip  manifest.json        the same key in the bucket: the uploader mirrors it

The id is a hash of what can be compiled and run here: versions, GPU, driver, CPU, the sources of `model/`, and whatever
of the recipe may shape a graph. It needs no torch: the supervisor fetches the folder before the ranks start. Runs share
it, so a second seed compiles nothing either. Whether a graph fits is decided by the compilers' own hashes, not by the
id: what they do not find, they compile, and the larger folder is sealed in the place of the old one. A folder of the
bucket that no run asks for any more stays until it is deleted.

**It is code that is executed**, unlike a checkpoint: whoever can write to the bucket can run programs on the machines
that train from it. So it comes from nowhere but the run's own --out and bucket, every byte as its manifest says;
train.compile_cache=false does without.

**It never fails a run.** What is damaged, foreign, too large or unreadable is said, removed, and compiled. Hashes
cannot tell that a cache was broken when it was sealed: where ranks that loaded one end before they are warm, it is
removed too, and the next start compiles.

Triton notes the files of a kernel by absolute paths, which loading changes to the new folder's. torch's
`save_cache_artifacts` would be one process's graphs without C++ libraries and FlashAttention 4's kernels, and would
have to be called in ranks that train.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job.console import Console
from job.errors import DataError, SpeedrunError, StorageError
from job.machine import host
from job.recipe.config import Recipe
from job.recipe.derive import RATES, SCHEDULE
from job.reporter import Reporter
from job.run.nodes import NodeContext
from job.store.sealed import MANIFEST, Sealed, content_id, is_sealed, open_sealed, sealing, sha256_file
from job.store.stores import Store, pull_sealed, stored_manifest

KIND = "compile_cache"
ARCHIVE = "caches.zip"
LIMIT = 1 << 30
"""bytes of all files together: a larger cache is neither sealed nor taken"""
KEEP = 4
"""newest caches that stay in --out"""
PACKAGES = ("torch", "triton", "torchao", "flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels")
NO_GRAPH = frozenset(
    {"steps", "param_data_ratio", "total_batch_size", "lr_scale", "seed", "threads", "val_tokens", "compile_cache"}
    | {"checkpoint_every", "checkpoint_minutes", "upload_minutes", "val_every", "keep_optimizer"}
    | {"silence_seconds", *RATES.values(), *SCHEDULE}
)
"""keys of the train section that shape no graph; one that should be here and is not costs an id for each of its values,
and no more"""


def made_from(recipe: Recipe, gpu: str) -> dict[str, Any]:
    """What decides what is compiled, and whether this machine can run it. `gpu`: as `machine.gpu_names` says."""
    sources = {file.name: sha256_file(file) for file in (Path(__file__).parents[2] / "model").glob("*.py")}
    values = recipe.values()
    return {
        "versions": host.versions(*PACKAGES),
        "gpu": gpu,
        "cpu": host.cpu_name(),
        "code": content_id("sources", sources),
        "model": values["model"] | {"vocab_size": values["data"]["vocab_size"]},
        "train": {key: value for key, value in values["train"].items() if key not in NO_GRAPH},
    }


def environment(work: Path) -> dict[str, str]:
    """What makes the compilers of a rank keep what they make in `work`."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TRITON_CACHE_DIR": str(work / "triton"),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(work / "flash_attention"),
    }


class Caches(Reporter):
    """One node's caches while a stage runs: its ranks are started at `node`, and report through this reporter.

    For a stage that compiles nothing, without a GPU, and with train.compile_cache=false `node` stays as it is, and
    nothing is kept.
    """

    def __init__(
        self, stage: str, node: NodeContext, recipe: Recipe, console: Console, reporter: Reporter, attempt: int = 0
    ) -> None:
        """Fetch what there is. attempt: the run's, on the first node, which seals what there will be; 0 on the
        others."""
        self.node, self._console, self._reporter, self._attempt = node, console, reporter, attempt
        self._local = node.nodes.ranks_of(node.nodes.number)
        self._warm: set[int] = set()
        self._loaded: set[str] = set()
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._outcome: dict[str, Any] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        gpu = host.gpu_names() if stage == "pretrain" and recipe.train.compile_cache else ""
        if gpu:
            self._made_from = made_from(recipe, gpu)
            self.key = f"compiled/{content_id(KIND, self._made_from)}"
            self.folder = node.out / self.key
            self._temporary = tempfile.TemporaryDirectory(prefix="speedrun-compiled-", ignore_cleanup_errors=True)
            self.work = Path(self._temporary.name)
            self.node = dataclasses.replace(node, environment=environment(self.work))
            if not self._load(self._open, None) and node.store:
                self._load(self._pull, node.store)

    def emit(self, kind: str, **fields: Any) -> None:
        self._reporter.emit(kind, **fields)
        if self._temporary and kind == "train.warm" and fields["rank"] in self._local:
            self._warm.add(fields["rank"])
            if self._attempt and len(self._warm) == len(self._local) and _files(self.work).keys() - self._loaded:
                self._thread = threading.Thread(target=self._seal, daemon=True)
                self._thread.start()
        self._tell()

    def end(self, *, interrupted: bool) -> None:
        """When the ranks have ended; `interrupted`: because a signal said so."""
        if not self._temporary:
            return
        self._ended.set()
        if self._thread:
            self._thread.join()
        self._tell()
        if self._attempt and self._loaded and len(self._warm) < len(self._local) and not interrupted:
            self._refuse("ranks that had loaded it ended before they were warm")
            self._remove(self.node.store)
        self._temporary.cleanup()

    def _load(self, sealed: Callable[[], Sealed | None], store: Store | None) -> bool:
        """Fill the work folder from what `sealed` gives, which is from `store` or this disk; whether there was anything
        of use."""
        began = time.monotonic()
        try:
            if not (found := sealed()):
                return False
            if found.made_from != self._made_from or found.files.keys() != {ARCHIVE}:
                raise DataError("it was made by or for something else")
            _unpack(found, self.work)
        except (OSError, StorageError) as error:
            self._refuse(_reason(error))
            return False
        except Exception as error:  # whatever is wrong with it, the compilers are there
            self._refuse(_reason(error))
            self._remove(store)
            return False
        self._loaded = set(_files(self.work))
        origin, size = store.url if store else str(self.folder), found.files[ARCHIVE]["size"]
        seconds = time.monotonic() - began
        self._reporter.emit("compile_cache.loaded", folder=self.key, origin=origin, bytes=size, seconds=seconds)
        self._console.say(f"loaded from {origin} what was compiled before: {size / 1e6:.1f} MB in {seconds:.1f} s")
        return True

    def _open(self) -> Sealed | None:
        return open_sealed(self.folder, kind=KIND) if is_sealed(self.folder) else None

    def _pull(self) -> Sealed | None:
        store = self.node.store
        manifest = stored_manifest(store, self.key) if store else None
        if store is None or manifest is None:
            return None
        if sum(entry["size"] for entry in manifest["files"].values()) > LIMIT:
            raise DataError(f"it has more than {LIMIT / 1e9:.2f} GB")
        return pull_sealed(store, self.key, self.folder, kind=KIND)

    def _refuse(self, why: str) -> None:
        self._reporter.emit("compile_cache.refused", folder=self.key, why=why)
        self._console.say(f"warning: what was compiled before ({self.key}) is not used, and is compiled anew: {why}")
        for path in self.work.iterdir():
            shutil.rmtree(path, ignore_errors=True)

    def _remove(self, store: Store | None) -> None:
        """Remove it here, and by the node that will seal another from `store`."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if store and self._attempt:
            with contextlib.suppress(SpeedrunError):
                self.node.fenced(self._attempt).delete([f"{self.key}/{MANIFEST}"])

    def _seal(self) -> None:
        """In a thread beside the training."""
        began = time.monotonic()
        self._outcome = {"kind": "compile_cache.sealed", "folder": self.key}
        try:
            with sealing(self.folder, kind=KIND, made_from=self._made_from) as folder:
                folder.facts["work"] = str(self.work)
                _pack(self.work, folder.path / ARCHIVE, self._ended)
            self._outcome |= {"bytes": (self.folder / ARCHIVE).stat().st_size, "seconds": time.monotonic() - began}
            ages = {path.parent: path.stat().st_mtime for path in self.folder.parent.glob(f"*/{MANIFEST}")}
            for old in sorted(ages, key=lambda folder: ages[folder])[:-KEEP]:
                shutil.rmtree(old, ignore_errors=True)
        except Exception as error:
            self._outcome |= {"kind": "compile_cache.not_sealed", "why": _reason(error)}

    def _tell(self) -> None:
        """From the supervisor's own thread, which alone writes events: what became of the sealing."""
        if self._outcome and (self._ended.is_set() or not (self._thread and self._thread.is_alive())):
            self._reporter.emit(**self._outcome)
            self._outcome = {}


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, SpeedrunError) else repr(error)


def _files(work: Path) -> dict[str, Path]:
    """Every finished file below `work` by its name in the archive: no locks, and nothing that is still being
    written."""

    def finished(name: Path) -> bool:
        return not any(part.startswith("tmp.") or part.endswith((".tmp", ".lock")) for part in name.parts)

    found = {path.relative_to(work): path for path in sorted(work.rglob("*")) if path.is_file()}
    return {name.as_posix(): path for name, path in found.items() if finished(name)}


def _pack(work: Path, archive: Path, ended: threading.Event) -> None:
    """Write the files below `work` as `archive`; DataError when they are too many, or when the stage has ended."""
    files = _files(work)
    if sum(path.stat().st_size for path in files.values()) > LIMIT:
        raise DataError(f"what was compiled has more than {LIMIT / 1e9:.2f} GB")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1, strict_timestamps=False) as packed:
        for name, path in files.items():
            if ended.is_set():
                raise DataError("the training ended first")
            packed.write(path, name)


def _unpack(sealed: Sealed, work: Path) -> None:
    with zipfile.ZipFile(sealed.path / ARCHIVE) as packed:
        packed.extractall(work)
    for group in work.rglob("__grp__*"):
        group.write_bytes(group.read_bytes().replace(sealed.facts["work"].encode(), str(work).encode()))
