"""A command becomes a run: its folder, its recipe, and the stages that are not yet done.

    open_run  ->  execute(stages)  ->  exit code
                    claim an attempt, then for each stage: done already? skip; else supervise its ranks

The same command with the same run id goes on after what is sealed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from job.addresses import recorded_argv
from job.console import Console
from job.data.local import text_files
from job.errors import ExitCode, SpeedrunError, StorageError, UsageError
from job.evaluation.rescore import FROM_BUCKET, Asked, fullness_asked, fullness_of_score
from job.machine import container, host
from job.plan.cap import UNBOUNDED, Cap, Quote
from job.recipe.config import SCHEMA, Recipe, differing_keys
from job.recipe.derive import derive, differing_values, micro_steps
from job.recipe.names import no_run
from job.report import postmortem
from job.report.render import write_report
from job.run.adopt import adopt
from job.run.bucket import Bucket
from job.run.budget import Budget
from job.run.compile_cache import Caches
from job.run.fruitless import RankDied, judged
from job.run.node_checkpoints import SplitCheckpointManager, fetch, share
from job.run.node_link import NodeLink, first_link
from job.run.nodes import LaunchSpec, NodeContext, Nodes, same_command
from job.run.preemption import Preemption
from job.run.processes import GRACE, LocalRank, free_port
from job.run.supervise import Interrupts, supervise
from job.run.uploader_client import AnnouncingReporter, Uploads, uploading
from job.run.wandb_client import wandb_logging
from job.run.watch import Watch
from job.store.attempt import Attempt, discard, fold
from job.store.checkpoint_folder import CheckpointManager, folder_of, identity, newest_usable
from job.store.documents import hashed, read_recipe
from job.store.fence import run_key
from job.store.sealed import atomic_write, is_sealed
from job.store.stores import Store

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_writable(out: Path, option: str = "--out") -> None:
    """UsageError unless `out`, that of `option`, is or can become a folder we can write in, which is not made yet;
    PreflightError without temporary files."""
    container.check_temporary_folder()
    try:
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        probe = there / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        remedy = f"choose another folder or give user {os.getuid()} write permission"
        if container.inside():
            remedy = container.remedy_for(out)
        raise UsageError(f"{option} {out} cannot be written ({error.strerror}); {remedy}") from None


def check_text(out: Path, recipe: Recipe) -> None:
    """`check_writable`, and DataError unless the text's files are there."""
    check_writable(out)
    if recipe.data.source == "local":
        text_files(recipe.data.paths)


def recipe_document(recipe: Recipe, run_id: str, begun: Mapping[str, Any] | None = None) -> dict:
    """What `recipe.json` holds: the values, where each came from, what follows from them, and what checkpoint of
    another run this one was `begun` from (job/run/go_on.py)."""
    document = {
        "schema": SCHEMA,
        "run_id": run_id,
        "preset": recipe.preset,
        "evidence": recipe.evidence,
        "recipe": recipe.values(),
        "sources": dict(recipe.sources),
        "derived": derive(recipe).explained(),
        "provenance": host.provenance(),
        **({"from": dict(begun)} if begun else {}),
    }
    return hashed(document)


def run_folder(out: Path, run_id: str) -> Path:
    if not RUN_ID.fullmatch(run_id):
        raise UsageError(
            f"--run-id {run_id!r} cannot be used: write letters, digits, dots, dashes and underscores, at most 100"
        )
    return out / "runs" / run_id


def fresh_would_discard(run: Path, bucket: Bucket | None) -> str | None:
    """What `--fresh` would discard that took a whole run or lies in the bucket, in words; None where it is neither."""
    if bucket and bucket.recipe(run.name):
        return f"what {bucket.store.url}/{run_key(run.name)} has"
    finished = any(life.exit_code == ExitCode.DONE for life in fold(run).attempts)
    return f"the finished run {run}" if finished else None


def check_run(
    out: Path,
    run_id: str,
    recipe: Recipe,
    *,
    fresh: bool,
    ranks: int,
    bucket: Bucket | None,
    origin: Mapping[str, Any] | None = None,
) -> tuple[Path, bytes]:
    """The folder of `run_id` and what its recipe.json has to hold; nothing is written or discarded.

    origin: `from` in a new run's recipe.json. UsageError when another one is there or in the bucket, DataError when the
    text is not there.
    """
    run = run_folder(out, run_id)
    check_text(out, recipe)
    micro_steps(recipe, derive(recipe), ranks)
    container.check(recipe)
    if bucket and not fresh:
        bucket.check_history(run)
    file = run / "recipe.json"
    here = file.read_bytes() if file.is_file() and not fresh else None
    stored = bucket.recipe(run_id) if bucket and not fresh else None
    places = ((here, file), (stored, f"the recipe of {run_id} in the bucket"))
    begun = [read_recipe(data, name) for data, name in places if data is not None]
    document = recipe_document(recipe, run_id, begun[0].get("from") if begun else origin)
    remedy = f"take another --run-id (--from {run_id} goes on with its weights), or --fresh to discard the old run"
    for other in begun:
        if changed := differing_keys(other["recipe"], document["recipe"]):
            raise UsageError(f"run {run_id} was begun with another recipe ({'; '.join(changed)}); {remedy}")
        both = other["derived"].keys() & document["derived"].keys()
        old, new = ({name: of["derived"][name].get("value") for name in both} for of in (other, document))
        if changed := differing_values(old, new):
            raise UsageError(
                f"run {run_id} was begun by a version that derives other values ({'; '.join(changed)}); go on with"
                f" that version, or {remedy}"
            )
    kept = here or stored
    if not begun or differing_keys(begun[0]["recipe"], document["recipe"], free=True):
        kept = json.dumps(document, indent=1).encode()
    assert kept
    return run, kept


def open_run(
    out: Path,
    run_id: str,
    recipe: Recipe,
    *,
    fresh: bool,
    ranks: int = 1,
    bucket: Bucket | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """The folder of `run_id`, its recipe written, after `check_run`."""
    run, document = check_run(out, run_id, recipe, fresh=fresh, ranks=ranks, bucket=bucket, origin=origin)
    if fresh and run.exists():
        discard(run)
    file = run / "recipe.json"
    if not file.is_file() or file.read_bytes() != document:
        atomic_write(file, document)
    (run / FROM_BUCKET).unlink(missing_ok=True)
    return run


def existing_run(out: Path, run_id: str, bucket: Bucket | None = None) -> Path:
    """The folder of a run that was begun, here or in the bucket; UsageError naming those there are here otherwise."""
    run = run_folder(out, run_id)
    if bucket:
        check_writable(out)
        bucket.check_history(run)
        if not (run / "recipe.json").is_file() and (stored := bucket.recipe(run_id)):
            read_recipe(stored, f"the recipe of {run_id} in the bucket")
            atomic_write(run / FROM_BUCKET, b"")
            atomic_write(run / "recipe.json", stored)
    if not (run / "recipe.json").is_file():
        parent = out / "runs"
        known = {path.name for path in parent.iterdir()} if parent.is_dir() else set()
        place = f"{parent}, or in {bucket.store.url}" if bucket else parent
        raise no_run(run_id, place, known | (bucket.run_ids() if bucket else set()))
    return run


def is_done(stage: str, run: Path, recipe: Recipe) -> bool:
    """Whether sealed folders say that `stage` has nothing left to do."""
    final = folder_of(run, derive(recipe).rows)
    if stage == "pretrain":
        return is_sealed(final)
    if stage == "export":
        return is_sealed(final) and is_sealed(run / "export")
    if stage == "evaluate":
        return is_sealed(final) and fullness_of_score(run, derive(recipe).rows) >= fullness_asked(recipe.eval)
    return False


def _claim(
    run: Path, recipe: Recipe, nodes: Nodes, store: Store | None, console: Console, cap: Cap, *, fresh: bool
) -> Attempt:
    """A new attempt, begun; a person is told of the one that it takes over from."""
    notes = ({"fresh": True} if fresh else {}) | ({"same": same_command(recipe, nodes)} if nodes.count > 1 else {})
    attempt = Attempt.claim(run, store, **notes)
    here = {"nodes": nodes.count, "bucket": store and store.url, **dataclasses.asdict(cap), **host.describe()}
    attempt.emit("attempt.started", argv=recorded_argv(), **here)
    if text := attempt.rival():
        attempt.emit("warning", text=text)
        console.say(f"warning: {text}")
    return attempt


def execute(
    out: Path,
    run: Path,
    recipe: Recipe,
    stages: Sequence[str],
    *,
    console: Console,
    nodes: Nodes,
    asked: Asked | None = None,
    bucket: Bucket | None = None,
    fresh: bool = False,
    cap: Cap = UNBOUNDED,
    quote: Quote | None = None,
) -> None:
    """On the first node: claim an attempt and bring every stage of `stages` to its end; with `asked`, that evaluation
    too if one is done.

    With a `bucket` the run goes on from what is there, unless `fresh` discards that, and is mirrored there. Where it
    has a `quote` it stops, with BudgetReached, in time to stay within the `cap`.
    Raises SpeedrunError as the stage that failed did; the attempt's last event says why it ended.
    """
    store, interrupts = bucket.store if bucket else None, Interrupts()
    attempt = _claim(run, recipe, nodes, store, console, cap, fresh=fresh)
    final_rows, every = derive(recipe).rows, recipe.train.upload_minutes
    node = NodeContext(out, run, nodes, recipe.train.threads, store, asked=asked.document if asked else None)
    with (
        interrupts,
        Preemption(interrupts).watched(),
        first_link(nodes, interrupts, console, attempt.number) as link,
        uploading(bucket, out, run, attempt, final_rows, console, interrupts, minutes=every) as uploads,
        _last_word(attempt, uploads, store),
    ):
        link.meet()
        if bucket:
            bucket.begin(run, attempt, final_rows, console, fresh=fresh)
        uploads.start()
        attempt.heard = Watch(record := fold(run), recipe, console).take
        budget = Budget(cap, quote, record, interrupts, attempt, trained=is_done("pretrain", run, recipe))
        start = _Start(node, recipe, attempt, console, interrupts, link, uploads, bucket, budget)
        with budget.explaining(), wandb_logging(run, attempt, console):  # wandb's id follows from the first event
            for stage in stages:
                interrupts.check(stage)
                link.check()
                if not asked and is_done(stage, run, recipe):
                    attempt.emit("stage.skipped", stage=stage, why="sealed")
                    console.say(f"{stage}: done already")
                    continue
                attempt.check_newest()
                started = time.monotonic()
                attempt.emit("stage.started", stage=stage)
                if stage == "report":
                    write_report(run)
                else:
                    _run_ranks(stage, start)
                attempt.emit("stage.done", stage=stage, seconds=time.monotonic() - started)
                console.say(f"{stage}: done in {time.monotonic() - started:.1f} s")


@dataclasses.dataclass(frozen=True)
class _Start:
    """What the stages of one attempt share."""

    node: NodeContext
    recipe: Recipe
    attempt: Attempt
    console: Console
    interrupts: Interrupts
    link: NodeLink
    uploads: Uploads
    bucket: Bucket | None
    budget: Budget


def _run_ranks(stage: str, start: _Start) -> None:
    """Start the ranks of `stage`, have other nodes do so, and see them to their end."""
    node, run, attempt, link = start.node, start.node.run, start.attempt, start.link
    manager, resume, final_rows = None, None, derive(start.recipe).rows
    prepared = fold(run).prepared.get("id", "")
    if stage == "pretrain":
        manager = _manager(start, final_rows)
        belongs_to = identity(start.recipe, prepared)
        adopt(run, belongs_to, attempt, start.console, start.bucket)
        resume = newest_usable(run, belongs_to, attempt, start.console, start.bucket)
        if link.split and resume:
            share(node.fenced(attempt.number), run, int(resume.name))
    resume_rows = int(resume.name) if resume else None
    spec = LaunchSpec(stage, attempt.number, prepared, resume_rows, free_port(), link.split)
    everywhere = node.nodes.count > 1 and (stage == "pretrain" or (stage == "prepare" and link.split))
    reporter = AnnouncingReporter(start.budget, start.uploads)
    caches = Caches(stage, node, start.recipe, start.console, reporter, attempt.number)
    try:
        with manager or contextlib.nullcontext():
            if everywhere:
                spec.write(node)
                link.say(launched=stage)
                link.wait("all nodes were ready", lambda record: record.get("ready") == stage)
            _supervise(caches.node.start(spec), stage, start, caches, manager)
            if everywhere:
                link.wait("all nodes had ended", lambda record: record.get("done") == stage)
    except RankDied as died:
        raise judged(run, attempt.number, died) from None
    finally:
        caches.end(interrupted=start.interrupts.count > 0)
    if stage == "pretrain" and link.split:
        fetch(node.documents, run, final_rows)  # the evaluation is the first node's


def _supervise(
    ranks: Sequence[LocalRank], stage: str, start: _Start, caches: Caches, manager: CheckpointManager | None
) -> None:
    """See this node's ranks to their end; raises what failed on another node where it explains what failed here."""

    def meanwhile() -> None:
        start.uploads.check()
        start.budget.check()
        for text in start.link.new_warnings():
            caches.emit("warning", text=text)
            start.console.say(f"warning: {text}")
        start.link.check(GRACE)

    try:
        supervise(
            stage,
            ranks,
            reporter=caches,
            console=start.console,
            interrupts=start.interrupts,
            manager=manager,
            meanwhile=meanwhile,
            silence=start.recipe.train.silence_seconds,
            alone=start.node.nodes.count == 1,
        )
    except SpeedrunError as error:
        error = start.budget.explained(error)
        start.link.fail(error)
        raise error from None
    except RuntimeError as error:
        raise start.link.cause(error) from None


def _manager(start: _Start, final_rows: int) -> CheckpointManager:
    node, attempt, link = start.node, start.attempt, start.link
    given: dict[str, Any] = {
        "world_size": node.nodes.world_size,
        "final_rows": final_rows,
        "minutes": start.recipe.train.checkpoint_minutes,
    }
    if not link.split:
        return CheckpointManager(node.run, attempt, **given)

    def others_ended() -> bool:
        return link.all_others(lambda record: record.get("failed") or record.get("done") == "pretrain")

    return SplitCheckpointManager(node.run, attempt, node.fenced(attempt.number), others_ended, **given)


@contextlib.contextmanager
def _last_word(attempt: Attempt, uploads: Uploads, store: Store | None) -> Iterator[None]:
    """However the attempt ends, its last event says with which code and why, when what it sealed is in the bucket."""
    try:
        yield
        uploads.flush()
        attempt.emit("attempt.ended", exit_code=int(ExitCode.DONE), reason="done")
        (attempt.run / postmortem.NAME).unlink(missing_ok=True)
        uploads.last()
    except BaseException as error:
        uploads.flush(after=error)
        ended: dict[str, Any] = {"exit_code": int(ExitCode.BUG), "reason": repr(error)}
        if isinstance(error, SpeedrunError):
            ended = {"exit_code": int(error.exit_code), "reason": str(error), **error.noted}
        attempt.emit("attempt.ended", **ended)
        with contextlib.suppress(StorageError):  # a full disk has no room for it, and is not why the run ends
            postmortem.write_postmortem(attempt.run, attempt.number, recorded_argv(), store.url if store else None)
        uploads.last(after=error)
        raise
    finally:
        attempt.close()
