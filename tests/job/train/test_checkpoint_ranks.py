"""Checkpoints of one number of ranks, gone on from on another: over gloo, the loop the real one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from job.data.prepare import Prepared
from job.data.rows import Rows
from job.errors import InterruptedRun
from job.machine import host
from job.recipe.config import Recipe
from job.recipe.derive import derive
from job.store.attempt import Attempt
from job.store.checkpoint_folder import (
    CheckpointManager,
    folders,
    identity,
    newest_usable,
)
from job.store.sealed import open_sealed
from job.train import checkpoint, loop
from job.train.context import SIGNALS, RankContext, StopSignal
from tiny_training import CPU, QUIET, InProcess


def _rank(
    rank: int, world: int, recipe: Recipe, prepared: str, run: str, resume: str, stop_at: int, attempt: int, fp64: bool
) -> None:
    if fp64:
        torch.set_default_dtype(torch.float64)
        host.compute_dtype = lambda *_, **__: torch.float64
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{run}/store-{attempt}", rank=rank, world_size=world)
    reporter = InProcess()
    stop_signal = StopSignal()
    stop_signal.agreed(SIGNALS.index("stop"), before=stop_at)
    folder = Path(run)
    context = RankContext(
        folder.parent, folder, folder, rank, world, reporter, stop_signal, attempt, Path(resume) if resume else None
    )
    opened = Prepared.open(Path(prepared))
    with contextlib.suppress(InterruptedRun):
        loop.train(loop.build(context, recipe, derive(recipe), opened, Rows(opened, seed=recipe.data.seed), CPU))
    if rank == 0:
        (folder / f"losses-{attempt}.json").write_text(json.dumps(reporter.losses()))
    dist.destroy_process_group()


def train_on(world: int, material: tuple[Recipe, Path], run: Path, *, stop_at: int, fp64: bool) -> list[float]:
    """Train up to `stop_at` on `world` gloo ranks from the newest checkpoint, and seal the one they stop with."""
    recipe, prepared = material
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, device_batch_size=1))
    attempt = Attempt.claim(run)
    manager = CheckpointManager(run, attempt, world_size=world, final_rows=derive(recipe).rows, minutes=0)
    resume = newest_usable(run, identity(recipe, Prepared.open(prepared).id), attempt, QUIET)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "job.train.loop"])
    arguments = (recipe, str(prepared), str(run), str(resume or ""), stop_at, attempt.number, fp64)
    ranks = [context.Process(target=_rank, args=(rank, world, *arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0] * world
    manager.check()
    manager.check()
    return json.loads((run / f"losses-{attempt.number}.json").read_text())


def gathered(run: Path) -> dict[str, torch.Tensor]:
    """Every slice of the newest checkpoint, whole."""
    sealed = open_sealed(folders(run)[0], kind="checkpoint")
    read = checkpoint.Reader(sealed)
    return {name: read(name, 0, max(e["stop"] for e in entries)) for name, entries in sealed.facts["slices"].items()}


@pytest.fixture
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0")))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
@pytest.mark.usefixtures("_loopback")
def test_eight_four_one_eight_ranks_train_the_same_rows(material: tuple[Recipe, Path], tmp_path: Path) -> None:
    """fp64, 20 steps after a checkpoint of 8 ranks: on 4, then 1, then 8 ranks, and on 1 alone: weights within 1e-9.

    The first steps are common: while the output projections are zero some gradients are rounding noise, which Adam's
    eps of 1e-10 makes steps of. Three layers, because with fewer backout takes away a part of the last layer's own
    output, which the norm undoes.
    """
    recipe, prepared = material
    model, longer = dataclasses.replace(recipe.model, depth=3), dataclasses.replace(recipe.train, steps=30)
    material = (dataclasses.replace(recipe, model=model, train=longer), prepared)
    elastic, single = tmp_path / "elastic", tmp_path / "single"
    train_on(8, material, elastic, stop_at=3, fp64=True)
    shutil.copytree(elastic, single)
    changing = [(10, 4), (16, 1), (23, 8)]
    losses = [loss for stop, world in changing for loss in train_on(world, material, elastic, stop_at=stop, fp64=True)]
    reported_in_fp32 = 1e-6
    assert losses == pytest.approx(train_on(1, material, single, stop_at=23, fp64=True), rel=reported_in_fp32)
    assert len(losses) == 20
    found, wanted = gathered(elastic), gathered(single)
    assert found.keys() == wanted.keys()
    for name in (name for name in wanted if name.startswith("weight/")):
        scale = wanted[name].abs().max().item()
        assert (found[name] - wanted[name]).abs().max().item() <= 1e-9 * scale, name
    assert len(list(folders(elastic)[0].glob("*.safetensors"))) == 16


@pytest.mark.slow
@pytest.mark.usefixtures("_loopback")
def test_a_checkpoint_of_eight_ranks_is_the_same_state_on_four_and_on_one(
    material: tuple[Recipe, Path], tmp_path: Path
) -> None:
    """Loading and writing again at once (0 steps) on another number of ranks keeps every bit; the next loss agrees in
    fp32."""
    train_on(8, material, tmp_path / "8", stop_at=4, fp64=False)
    before = gathered(tmp_path / "8")
    first = {}
    for world in (8, 4, 1):
        run = tmp_path / f"on-{world}"
        shutil.copytree(tmp_path / "8", run)
        train_on(world, material, run, stop_at=4, fp64=False)
        after = gathered(run)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before), world
        first[world] = train_on(world, material, run, stop_at=5, fp64=False)[0]
    assert first[4] == pytest.approx(first[8], rel=1e-6)
    assert first[1] == pytest.approx(first[8], rel=1e-6)
