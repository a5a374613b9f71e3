"""A run and its bucket, from the supervisor's side.

at the start    recipe compared, a claim beyond all others, events of earlier attempts, answers, the finished model if
                there is one; a checkpoint when training asks for it; prepare itself pulls the prepared set
meanwhile       the uploader (job/run/uploader.py) mirrors sealed folders, and says when a newer attempt has taken over
at the end      uploads are waited for, at most `wait` seconds; what did not arrive is on the local disk
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from job.console import Console
from job.errors import DataError, UsageError
from job.evaluation.ledger import ANSWERS, LEDGER
from job.recipe.names import no_run
from job.store import VARIABLE, open_store
from job.store.attempt import Attempt, newest_attempt
from job.store.checkpoint_folder import KIND as CHECKPOINT
from job.store.checkpoint_folder import folder_of
from job.store.fence import claimed, read_claim, run_key, stored_claim
from job.store.sealed import MANIFEST, atomic_write, is_sealed
from job.store.stores import PATIENCE, S3_URL, Store, pull_sealed, sealed_names

PULLS = 8
"""small files and folders that are pulled at once"""
LINK_SECONDS = 7 * 24 * 3600
"""as long as S3 lets an address of the live page be valid"""
SHARED_FOR = 24 * 3600.0
"""seconds after which an unfinished upload of what other runs may be uploading too is nobody's any more"""
BPB = "bpb"


def check_place(url: str, out: Path, *, strict: bool = False) -> None:
    """UsageError unless `url` is s3://..., or plainly a folder (absolute, ./x, ../x, or existing) apart from `out`.

    A misspelled bucket must not become a folder on a machine that goes away: with `strict` no folder will do.
    """
    if not url.strip():
        raise UsageError(
            "--bucket is empty: write s3://bucket/prefix (is the variable that you gave set?), or leave --bucket out"
        )
    if url.startswith("s3://"):
        if not S3_URL.fullmatch(url):
            raise UsageError(
                f"--bucket {json.dumps(url)} names no bucket: write s3://bucket/prefix, the bucket in small letters"
            )
        return
    if mistyped := re.fullmatch(r"s3[an]?(?::/*|/+)([^/].*)?", url.strip(), re.IGNORECASE):
        if ":" in url or not os.path.isdir(url):
            raise UsageError(f"--bucket {url} cannot be used: write s3://{mistyped[1] or 'bucket/prefix'}")
    elif "://" in url:
        raise UsageError(f"--bucket {url} cannot be used: write s3://bucket/prefix, or a folder")
    if url.startswith("~"):
        raise UsageError(f"--bucket {url} was not expanded by the shell: write {os.path.expanduser(url)}, or ./{url}")
    if strict:
        raise UsageError(
            f"--strict is for machines that go away, and the folder {url} would go with it: give --bucket"
            " s3://bucket/prefix"
        )
    if _is_inside(Path(url), out):
        raise UsageError(
            f"--bucket {Path(url)} is --out {out} or inside it, and would be mirrored into itself: choose a folder"
            " elsewhere, or s3://bucket/prefix"
        )
    if any(_is_inside(out, Path(url) / name) for name in ("prepared", "compiled", "runs")):
        raise UsageError(f"--out {out} is among the copies that --bucket {Path(url)} holds: choose an --out elsewhere")
    if not (url.startswith(("/", "./", "../")) or os.path.isdir(url)):
        name = url.strip("/ ")
        raise UsageError(
            f"--bucket {url} may mean a bucket or a folder, and no such folder is there: write s3://{name}, or ./{name}"
            " for a new folder"
        )


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or below it, whatever links or mounts lead there; neither need exist."""
    real, target = Path(os.path.realpath(path)), os.path.realpath(folder)

    def is_target(each: str) -> bool:
        return each == target or (os.path.isdir(each) and os.path.isdir(target) and os.path.samefile(each, target))

    return any(is_target(str(each)) for each in (real, *real.parents))


class Bucket:
    """The store of one command, ready to be written. `wait`: seconds that the end of a run waits for its uploads."""

    def __init__(self, store: Store, wait: float) -> None:
        self.store, self.wait = store, wait

    @property
    def place(self) -> str:
        """Where it is, in words that leave no doubt whether it is a folder."""
        return self.store.url if "://" in self.store.url else f"the folder {Path(self.store.url).resolve()}"

    @classmethod
    def at(cls, url: str, wait: float = 600.0, patience: float = PATIENCE, *, dry: bool = False) -> Bucket:
        """UsageError for a store that cannot be used, StorageError for one that does not answer; a `dry` run leaves
        nothing behind there."""
        store = open_store(url, patience)
        missing = [path for path in (Path(url), *Path(url).parents) if "://" not in url and not path.exists()]
        store.prepare()
        if not dry:
            os.environ[VARIABLE] = url  # for the children: they pull prepared sets from there
        for folder in missing if dry else ():
            folder.rmdir()
        return cls(store, wait)

    def recipe(self, run_id: str) -> bytes | None:
        """The stored `recipe.json` of a run; None where the bucket has no such run."""
        return self.store.get(f"{run_key(run_id)}/recipe.json")

    def run_ids(self) -> set[str]:
        """The runs that the bucket has a recipe of."""
        return {PurePosixPath(key).parts[1] for key in self.store.list("runs") if key.endswith("/recipe.json")}

    def pull_run(self, out: Path, run_id: str) -> Path:
        """A folder below `out` with a run as the bucket has it, without checkpoints; UsageError where it has none."""
        run, stored = out / run_key(run_id), self.recipe(run_id)
        if stored is None:
            raise no_run(run_id, self.store.url, self.run_ids())
        atomic_write(run / "recipe.json", stored)
        self.pull_results(run)
        return run

    def check_history(self, run: Path) -> None:
        """UsageError when the run of this name on this disk is not the one in the bucket."""
        mine, stored = newest_attempt(run), claimed(self.store, run.name)
        both = [number for number in stored if (run / "attempts" / str(number)).is_file()]
        remedy = "take another --run-id or --out, or --fresh to discard both"
        if both:
            here = read_claim((run / "attempts" / str(both[-1])).read_bytes())
            there = stored_claim(self.store, run.name, both[-1])
            if here and there and here != there:
                raise UsageError(
                    f"run {run.name} in {self.store.url} is not the one in {run}, though it has the same name; {remedy}"
                )
        later = [number for number in stored if mine and number > mine]
        with ThreadPoolExecutor(PULLS) as pool:
            claims = list(pool.map(lambda n: stored_claim(self.store, run.name, n), later))
        if anew := [number for number, claim in zip(later, claims, strict=True) if claim.get("fresh")]:
            raise UsageError(
                f"run {run.name} was begun anew in {self.store.url} by attempt {anew[-1]}; {run} holds what it was"
                f" before: {remedy}"
            )

    def discard(self, run_id: str, console: Console) -> None:
        """Remove what the bucket has of a run; its claims stay, so that an older attempt still learns of this one."""
        keys = [key for key in self.store.list(run_key(run_id)) if not key.startswith(f"{run_key(run_id)}/attempts/")]
        if keys:
            self.store.delete([key for key in keys if key.endswith(f"/{MANIFEST}")])
            self.store.delete(keys)
            console.say(f"--fresh: discarded what {self.store.url}/{run_key(run_id)} had")

    def begin(self, run: Path, attempt: Attempt, final_rows: int, console: Console, *, fresh: bool) -> None:
        """After the claim: sweep, discard or restore, and say where the run is mirrored to and can be watched."""
        console.say(f"mirroring run {run.name} to {self.place}")
        self.store.sweep(run_key(run.name))
        for shared in ("prepared", "compiled"):
            self.store.sweep(shared, older_than=SHARED_FOR)
        if fresh:
            self.discard(run.name, console)
        self.restore(run, attempt, final_rows, console)
        page = f"{run_key(run.name)}/report/report.html"
        if not sys.stderr.isatty():  # a log keeps what is printed, and whoever reads it could use the address
            console.say(f"live page, renewed every minute: {self.store.url}/{page}")
        elif link := self.store.link(page, LINK_SECONDS):
            sooner = ", with these temporary credentials much sooner" if "X-Amz-Security-Token" in link else ""
            days = LINK_SECONDS // 86400
            console.say(f"live page, renewed every minute (the address expires in {days} days{sooner}):\n{link}")

    def restore(self, run: Path, attempt: Attempt, final_rows: int, console: Console) -> None:
        """Pull what this disk lacks of the run: claims, events, answers, and the finished model."""
        began = time.monotonic()
        self.pull_record(run, before=attempt.number)
        wanted = [*self._answers(run), (folder_of(run, final_rows), CHECKPOINT)]
        keys = [self._key(run, folder) for folder, _ in wanted]
        with ThreadPoolExecutor(PULLS) as pool:
            answers = list(pool.map(lambda key, item: self._pull(key, *item), keys, wanted))
        for key, error in zip(keys, answers, strict=True):
            if isinstance(error, DataError):
                attempt.emit("restore.refused", folder=key, why=str(error))
                console.say(f"{error}; it is made again")
        if pulled := [key for key, answer in zip(keys, answers, strict=True) if answer is True]:
            attempt.emit("restore.done", folders=pulled, seconds=time.monotonic() - began)
            console.say(f"taken from {self.store.url}: {len(pulled)} sealed folders of run {run.name}")

    def pull_results(self, run: Path) -> None:
        """What a report is made from: claims, events and answers. What is damaged is not there."""
        self.pull_record(run)
        with ThreadPoolExecutor(PULLS) as pool:
            list(pool.map(lambda item: self._pull(self._key(run, item[0]), *item), self._answers(run)))

    def pull_record(self, run: Path, before: int | None = None) -> None:
        """Claims and events of attempts (numbered below `before`), where the bucket has more of them."""
        sizes = self.store.list(f"{run_key(run.name)}/attempts") | self.store.list(f"{run_key(run.name)}/events")
        wanted = []
        for key, size in sizes.items():
            file, number = run / PurePosixPath(key).relative_to(run_key(run.name)), PurePosixPath(key).stem
            has = file.stat().st_size if file.is_file() else -1
            if number.isdigit() and (before is None or int(number) < before) and size > has:
                wanted.append((key, file))
        with ThreadPoolExecutor(PULLS) as pool:
            for (_, file), data in zip(wanted, pool.map(lambda item: self.store.get(item[0]), wanted), strict=True):
                if data is not None:
                    atomic_write(file, data)

    def checkpoints(self, run: Path) -> list[Path]:
        """Where the checkpoints that are sealed in the bucket would stand on this disk, newest first."""
        names = sealed_names(self.store, f"{run_key(run.name)}/checkpoints")
        return [folder_of(run, int(name)) for name in sorted(names, reverse=True) if name.isdigit()]

    def pull_checkpoint(self, run: Path, folder: Path) -> None:
        """Make `folder` the checkpoint that the bucket has; DataError when it is damaged there."""
        pull_sealed(self.store, self._key(run, folder), folder, kind=CHECKPOINT)

    def _answers(self, run: Path) -> list[tuple[Path, str]]:
        kinds = {"ledger": LEDGER, BPB: BPB}
        keys = map(PurePosixPath, self.store.list(f"{run_key(run.name)}/eval"))
        folders = sorted(key.parent.relative_to(run_key(run.name)) for key in keys if key.name == MANIFEST)
        return [(run / folder, kinds.get(folder.name, ANSWERS)) for folder in folders]

    def _pull(self, key: str, folder: Path, kind: str) -> bool | DataError:
        """Whether there was something to pull; DataError, not raised, where it is damaged."""
        try:
            if is_sealed(folder) or self.store.get(f"{key}/{MANIFEST}") is None:
                return False
            pull_sealed(self.store, key, folder, kind=kind)
        except DataError as error:
            return error
        return True

    def _key(self, run: Path, folder: Path) -> str:
        return f"{run_key(run.name)}/{folder.relative_to(run).as_posix()}"
