"""Where checkpoints stand, how their parts become one, and which one counts. Needs no torch: the supervisor's side.

    checkpoints/000000000409600/    weights-00000.safetensors  optimizer-00000.safetensors ...  manifest.json
                                    (409,600 rows consumed)

Each rank writes its two files into the hidden folder of its attempt, and last part-<rank>.json, which says what is in
them; when those of all ranks are there, the supervisor writes the manifest and renames. Ranks never wait for each
other's disks, and the training loop waits for neither.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from job.console import Console
from job.errors import DataError, SpeedrunError
from job.recipe.config import Recipe
from job.recipe.derive import derive, differing_values
from job.store.attempt import Attempt
from job.store.documents import canonical_json
from job.store.fence import run_key
from job.store.sealed import Sealed, atomic_write, is_sealed, open_sealed, seal_written

KIND = "checkpoint"
OPTIMIZER = "optimizer-"
"""what the names of files begin with that only a resumed training needs"""
KEEP = 2
"""newest checkpoints that stay on disk beside the final one"""


def folder_of(run: Path, rows: int) -> Path:
    """Where the checkpoint after `rows` rows stands, or will."""
    return run / "checkpoints" / f"{rows:015d}"


def key_of(run: Path, rows: int) -> str:
    """Where a store has it."""
    return f"{run_key(run.name)}/checkpoints/{folder_of(run, rows).name}"


def parts_folder(run: Path, rows: int, attempt: int) -> Path:
    """Where the ranks of `attempt` write their parts of it."""
    return run / "checkpoints" / f".{rows:015d}.tmp-{attempt}"


def write_part(folder: Path, rank: int, part: Mapping[str, Any]) -> None:
    """The last that `rank` writes into `folder`: rows, step, files, slices, made_from, and seconds and stall of it."""
    atomic_write(folder / f"part-{rank:05d}.json", json.dumps(part).encode())


def read_part(file: Path) -> dict[str, Any]:
    """What `write_part` wrote, which no sealed folder keeps."""
    part = json.loads(file.read_bytes())
    file.unlink()
    return part


def written_parts(run: Path, attempt: int) -> list[tuple[Path, list[Path]]]:
    """The hidden folders of `attempt`, oldest first, and the parts that stand whole in each."""
    hidden = sorted((run / "checkpoints").glob(f".*.tmp-{attempt}"))
    return [(folder, sorted(folder.glob("part-*.json"))) for folder in hidden]


def folders(run: Path) -> list[Path]:
    """The sealed checkpoints of a run, newest first."""
    parent = run / "checkpoints"
    found = [p for p in parent.iterdir() if p.name.isdigit() and is_sealed(p)] if parent.is_dir() else []
    return sorted(found, key=lambda p: int(p.name), reverse=True)


def files_hash(files: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 over names and hashes of a manifest's `files`, without optimizer state."""
    hashes = {name: entry["sha256"] for name, entry in files.items() if not name.startswith(OPTIMIZER)}
    return hashlib.sha256(canonical_json(hashes).encode()).hexdigest()


def identity(recipe: Recipe, prepared: str) -> dict[str, Any]:
    """What a checkpoint belongs to: the values that decide what a step computes, and the rows."""
    return {"mathematics": derive(recipe).mathematics(recipe), "prepared": prepared}


class Elsewhere(Protocol):
    """Another place that has checkpoints of the run: the bucket."""

    def checkpoints(self, run: Path) -> list[Path]:
        """Where they would stand on this disk, newest first."""

    def pull_checkpoint(self, run: Path, folder: Path) -> None:
        """Put one there; DataError when it is damaged."""


def newest_usable(
    run: Path, belongs_to: Mapping[str, Any], attempt: Attempt, console: Console, elsewhere: Elsewhere | None = None
) -> Path | None:
    """The newest checkpoint whose every byte is right and that belongs to this run; None when there is none at all.

    Of equally new ones the one on this disk is tried first. One that is damaged or foreign is passed over with a
    sentence and an event. DataError when none of several is left.
    """
    refused: list[str] = []
    candidates = [(folder, False) for folder in folders(run)]
    candidates += [(folder, True) for folder in elsewhere.checkpoints(run)] if elsewhere else []
    for folder, pull in sorted(candidates, key=lambda c: (-int(c[0].name), c[1])):
        try:
            if pull and elsewhere:
                elsewhere.pull_checkpoint(run, folder)
            sealed = open_sealed(folder, kind=KIND, verify=not pull)  # a pull has hashed each byte
            _check_usable(sealed, belongs_to)
        except DataError as error:
            attempt.emit("checkpoint.refused", folder=folder.name, why=str(error))
            console.say(f"{error}; taking the checkpoint before it")
            refused.append(str(error))
            continue
        if "mathematics" not in sealed.made_from:
            text = f"{folder} is of an earlier version, which noted no derived values: only the recipes were compared"
            attempt.emit("warning", text=text)
            console.say(f"warning: {text}")
        return folder
    if refused:
        raise DataError(
            f"no checkpoint below {run / 'checkpoints'} can be used; delete that folder to train from the first step"
            f" again (of the newest: {refused[0]})"
        )
    return None


def _check_usable(sealed: Sealed, belongs_to: Mapping[str, Any]) -> None:
    made_from = sealed.made_from
    if made_from.get("prepared") != belongs_to["prepared"]:
        raise DataError(f"{sealed.path} was trained on other rows")
    if changed := differing_values(made_from.get("mathematics", belongs_to["mathematics"]), belongs_to["mathematics"]):
        raise DataError(f"{sealed.path} was trained with other values than this version derives: {'; '.join(changed)}")
    if not any(name.startswith(OPTIMIZER) for name in sealed.files):
        raise DataError(f"{sealed.path} has no optimizer state: its run was finished")


def sweep_parts(run: Path) -> None:
    """Remove parts of checkpoints that nobody is going to seal."""
    for leftover in (run / "checkpoints").glob(".*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


class CheckpointManager:
    """Seals checkpoints from the parts that ranks have written, says when the next is due, keeps the folder small."""

    def __init__(self, run: Path, attempt: Attempt, *, world_size: int, final_rows: int, minutes: float) -> None:
        self._run, self._attempt, self._world_size = run, attempt, world_size
        self._final_rows, self._seconds = final_rows, minutes * 60
        self._whole_before: set[Path] = set()
        self.seconds = 0.0
        """that the last checkpoint took to write"""
        self._last = math.inf  # until the first step: compiling loses nothing that a checkpoint could keep
        sweep_parts(run)

    def due(self) -> bool:
        return 0 < self._seconds <= time.monotonic() - self._last

    def restart_clock(self) -> None:
        """Training begins, or a checkpoint is on its way: the next one is due a whole interval later."""
        self._last = time.monotonic()

    def check(self) -> None:
        """Several times a second: seal what all ranks have written. UsageError after another attempt's claim.

        What was whole at the last look is sealed at this one: what ranks had reported before they wrote it is in the
        events by then, and nothing that a checkpoint is beyond is missing there when this process is killed.
        """
        whole = {
            f: parts for f, parts in written_parts(self._run, self._attempt.number) if len(parts) == self._world_size
        }
        for folder in sorted(whole.keys() & self._whole_before):
            self._seal(folder, [read_part(part) for part in whole[folder]])
        self._whole_before = set(whole)

    def _seal(self, written: Path, parts: list[dict[str, Any]]) -> None:
        self._attempt.check_newest()
        seal_written(written, folder_of(self._run, parts[0]["rows"]), kind=KIND, **self._manifest(parts))
        self._record(parts)
        others = [old for old in folders(self._run) if int(old.name) != self._final_rows]
        for old in others[KEEP:]:
            shutil.rmtree(old)

    def _manifest(self, parts: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """What the manifest says: made_from, facts, files."""
        facts = {
            "rows": parts[0]["rows"],
            "step": parts[0]["step"],
            "world_size": self._world_size,
            "slices": _by_name(parts),
        }
        files = {name: entry for part in parts for name, entry in part["files"].items()}
        return {"made_from": parts[0]["made_from"], "facts": facts, "files": files}

    def _record(self, parts: list[dict[str, Any]]) -> None:
        self.restart_clock()
        rows, step = parts[0]["rows"], parts[0]["step"]
        times = {key: max(part[key] for part in parts) for key in ("seconds", "stall")}
        self.seconds = times["seconds"]
        size = sum(entry["size"] for part in parts for entry in part["files"].values())
        folder = folder_of(self._run, rows).name
        self._attempt.emit("checkpoint.sealed", step=step, rows=rows, folder=folder, bytes=size, **times)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """When the ranks have ended: seal what is whole, and remove parts that became no checkpoint."""
        try:
            self.check()
            self.check()
        except SpeedrunError:
            if error is None:
                raise
        finally:
            sweep_parts(self._run)


def final_checkpoint(run: Path, rows: int, *, verify: bool = True) -> Sealed:
    """The sealed checkpoint of the last step, its files hashed if `verify`; DataError with the command that makes it
    otherwise."""
    folder = folder_of(run, rows)
    if not is_sealed(folder):
        raise DataError(
            f"run {run.name} has no finished model ({folder} is not there): `speedrun status {run.name}` says how it is"
            " finished"
        )
    return open_sealed(folder, kind=KIND, verify=verify)


def _by_name(parts: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    slices: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        for name, file, start, stop in part["slices"]:
            slices.setdefault(name, []).append({"file": file, "start": start, "stop": stop})
    for entries in slices.values():
        entries.sort(key=lambda e: e["start"])
    return dict(sorted(slices.items()))
