"""Checkpoints: exact resume at any step, any number of ranks, and what happens to damaged ones. The loop is the real
one, in process."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import multiprocessing
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from job.console import Console
from job.data import prepare, sources
from job.data.prepare import Prepared
from job.data.rows import Rows
from job.errors import DataError, DivergedError, InterruptedRun
from job.machine import host
from job.recipe.config import Recipe, resolve
from job.recipe.derive import derive
from job.reporter import Reporter
from job.run import supervise
from job.run.processes import Rank
from job.run.rank import Borders, RankContext, RankReporter
from job.store.attempt import Attempt
from job.store.checkpoint_folder import (
    Keeper,
    drop_optimizer,
    final_checkpoint,
    folders,
    identity,
    newest_usable,
    parts_folder,
)
from job.store.sealed import MANIFEST, open_sealed
from job.train import checkpoint, loop

STEPS = 14
QUIET = Console(-1)
CPU = torch.device("cpu")


def recipe_of(corpus: Path, **train: object) -> Recipe:
    """A d1 on 32 tokens: 8 rows a step in two micro-steps of one rank, more steps than the corpus has rows for."""
    values = {"steps": STEPS, "total_batch_size": 256, "device_batch_size": 4, "threads": 1, "dtype": "fp32"} | train
    overrides = [f"train.{key}={value}" for key, value in values.items()]
    overrides += ["model.depth=1", "model.seq_len=32", "data.vocab_size=300", "data.val_fraction=0.2"]
    return resolve("smoke", {"data.source": ("--data", "local"), "data.paths": ("--data", (str(corpus),))}, overrides)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> tuple[Recipe, Path]:
    """A recipe and its prepared set: several row files, and fewer rows than the run consumes."""
    out = tmp_path_factory.mktemp("material")
    (out / "texts").mkdir()
    for file in sorted(small_corpus.iterdir())[:24]:
        (out / "texts" / file.name).write_text(file.read_text()[:160])
    recipe = recipe_of(out / "texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SHARD_BYTES", 1500)
        prepared = prepare.prepare(out, recipe.data, recipe.model.seq_len, Reporter(), workers=1)
    assert len(prepared.row_files) > 1
    assert prepared.train_rows < STEPS * 8
    return recipe, prepared.path


class InProcess(RankReporter):
    """A rank's reporter without a pipe: parts go straight to the keeper, events to a list."""

    def __init__(self, keeper: Keeper | None = None, outbox: Path | None = None) -> None:
        super().__init__(io.StringIO())
        self.keeper, self.outbox, self.events = keeper, outbox, []

    def send(self, message: dict[str, Any]) -> None:
        self.events.append(message)
        if "part" in message and self.keeper:
            self.keeper.take(message["part"])
        if "part" in message and self.outbox:
            self.outbox.write_text(json.dumps(message["part"]))

    def losses(self) -> list[float]:
        return [e["loss"] for e in self.events if e.get("kind") == "train.step"]


def of_generation(recipe: Recipe, generation: str) -> Recipe:
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, generation=generation))


def train(
    material: tuple[Recipe, Path],
    run: Path,
    *,
    stop_at: int | None = None,
    generation: str = "head",
    **train_values: object,
) -> list[float]:
    """One attempt at the run in folder `run`, from its newest checkpoint, up to border `stop_at`; the losses of its
    steps."""
    recipe, prepared = material
    recipe = of_generation(
        dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **train_values)), generation
    )
    attempt = Attempt.claim(run)
    derived = derive(recipe)
    opened = Prepared.open(prepared)
    keeper = Keeper(run, attempt, world_size=1, final_rows=derived.rows, minutes=0)
    resume = newest_usable(run, identity(recipe.values(), opened.id), attempt, QUIET)
    reporter = InProcess(keeper)
    borders = Borders(reporter)
    if stop_at is not None:
        borders.go(stop_at, "stop")
    context = RankContext(run.parent, run, run / "recipe.json", 0, 1, reporter, borders, attempt.number, resume)
    torch.set_num_threads(1)
    try:
        loop.train(loop.build(context, recipe, derived, opened, Rows(opened, seed=recipe.data.seed), CPU))
    except InterruptedRun:
        assert stop_at is not None
    return reporter.losses()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(folders(run)[0] / "weights-00000.safetensors")


# in bf16 a processor without instructions for it takes minutes; the generation is looked at in fp32
BF16 = [
    pytest.param(("bf16", "feb"), marks=[pytest.mark.slow, pytest.mark.by_hand]),
    pytest.param(("bf16", "head"), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=[("fp32", "feb"), ("fp32", "head"), *BF16], ids="-".join)
def undisturbed(
    request: pytest.FixtureRequest, material: tuple[Recipe, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple:
    """Settings, losses and final weights of the run that nothing stopped."""
    run = tmp_path_factory.mktemp("undisturbed") / "t"
    settings = dict(zip(("dtype", "generation"), request.param, strict=True))
    return settings, train(material, run, **settings), weights(run)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(1, STEPS - 1), min_size=1, max_size=3, unique=True).map(sorted))
@example(stops=[5, 6])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(
    material: tuple[Recipe, Path], undisturbed: tuple, tmp_path_factory: pytest.TempPathFactory, stops: list[int]
) -> None:
    """Borders of epochs, row files, micro-steps and schedule phases lie between the stops."""
    chosen, losses, expected = undisturbed
    run = tmp_path_factory.mktemp("stopped") / "t"
    told = [loss for stop in [*stops, None] for loss in train(material, run, stop_at=stop, **chosen)]
    assert told == losses
    found = weights(run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_borders_that_resume_has_to_cross_are_in_the_run(material: tuple[Recipe, Path]) -> None:
    recipe, prepared = material
    derived, opened = derive(recipe), Prepared.open(prepared)
    assert derived.rows > opened.train_rows, "an epoch border"
    assert opened.facts["files"][0]["rows"] < opened.train_rows, "a row-file border"
    assert derived.rows_per_step > recipe.train.device_batch_size, "an accumulation border"
    falling = derive(of_generation(recipe, "feb")).schedule
    phases = [falling.at(step).lr_mult for step in range(STEPS)]
    assert phases[0] == phases[3] == 1 > phases[-1], "a schedule border"


def damage(folder: Path, how: str) -> None:
    file = folder / "weights-00000.safetensors"
    data = bytearray(file.read_bytes())
    match how:
        case "flipped":
            data[-3] ^= 1
            file.write_bytes(data)
        case "truncated":
            file.write_bytes(data[:-10])
        case "missing":
            file.unlink()
        case "foreign":
            manifest = json.loads((folder / MANIFEST).read_text())
            manifest["made_from"]["recipe"] = "0" * 16
            (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "foreign"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    material: tuple[Recipe, Path], tmp_path: Path, how: str, capsys: pytest.CaptureFixture
) -> None:
    recipe, prepared = material
    run = tmp_path / "t"
    train(material, run, stop_at=3)
    train(material, run, stop_at=6)
    newest, before = folders(run)
    damage(newest, how)
    belongs_to = identity(recipe.values(), Prepared.open(prepared).id)
    attempt = Attempt.claim(run)
    assert newest_usable(run, belongs_to, attempt, Console()) == before
    assert "taking the checkpoint before it" in capsys.readouterr().err
    damage(before, how)
    with pytest.raises(
        DataError, match=r"no checkpoint below .* can be used; delete that folder to train from the first step"
    ):
        newest_usable(run, belongs_to, attempt, QUIET)


def test_the_newest_two_and_the_final_one_are_kept_and_the_final_one_slims(
    material: tuple[Recipe, Path], tmp_path: Path
) -> None:
    run = tmp_path / "t"
    train(material, run, checkpoint_every=3)
    assert [int(p.name) // 8 for p in folders(run)] == [14, 12, 9]
    final = folders(run)[0]
    before = weights(run)
    drop_optimizer(final)
    sealed = open_sealed(final, kind="checkpoint")
    assert set(sealed.files) == {"weights-00000.safetensors"}
    assert all(name.startswith("weight/") for name in sealed.facts["slices"])
    assert sorted(p.name for p in final.iterdir()) == ["manifest.json", "weights-00000.safetensors"]
    assert all(torch.equal(weights(run)[name], before[name]) for name in before)
    drop_optimizer(final)


def test_the_final_checkpoint_is_hashed_by_the_one_rank_that_asks_for_it(
    material: tuple[Recipe, Path], tmp_path: Path
) -> None:
    run = tmp_path / "t"
    train(material, run)
    rows = derive(material[0]).rows
    damage(folders(run)[0], "flipped")
    assert final_checkpoint(run, rows, verify=False).facts["step"] == STEPS
    with pytest.raises(DataError, match="is not the file that was sealed"):
        final_checkpoint(run, rows)


def test_the_clock_of_checkpoints_starts_with_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes before is compilation, and may take longer than an interval."""
    now = 1000.0
    monkeypatch.setattr("job.store.checkpoint_folder.time.monotonic", lambda: now)
    keeper = Keeper(tmp_path / "t", Attempt.claim(tmp_path / "t"), world_size=1, final_rows=1, minutes=1)
    now += 600
    assert not keeper.due()
    supervise._take(Rank(), {"kind": "train.start"}, Reporter(), QUIET, keeper)
    now += 59
    assert not keeper.due()
    now += 2
    assert keeper.due()
    supervise._take(Rank(), {"kind": "train.step"}, Reporter(), QUIET, keeper)
    assert keeper.due()
    keeper.restart_clock()
    assert not keeper.due()


def test_after_a_divergence_the_same_command_goes_on_from_the_last_checkpoint(
    material: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that does not come again leaves no trace: losses and weights are those of a run without it."""
    take_step = loop.take_step

    def faulty(run: loop.Run) -> None:
        if run.step == 5:
            with torch.no_grad():
                next(run.model.parameters()).fill_(float("nan"))
        take_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", faulty)
        with pytest.raises(
            DivergedError,
            match=r"at step 5: .* goes on from the checkpoint before step 4, .* diverges again, lower train.lr_scale",
        ):
            train(material, tmp_path / "t", checkpoint_every=2)
    undisturbed = train(material, tmp_path / "undisturbed", stop_at=8, checkpoint_every=2)
    assert train(material, tmp_path / "t", stop_at=8, checkpoint_every=2) == undisturbed[4:]
    found, expected = weights(tmp_path / "t"), weights(tmp_path / "undisturbed")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_parts_of_a_killed_attempt_are_swept(material: tuple[Recipe, Path], tmp_path: Path) -> None:
    run = tmp_path / "t"
    train(material, run, stop_at=3)
    leftover = parts_folder(run, 48, 7)
    leftover.mkdir()
    (leftover / "weights-00000.safetensors").write_bytes(b"half")
    train(material, run, stop_at=5)
    assert not leftover.exists()


def test_files_are_what_safetensors_reads_and_hashes_are_theirs(tmp_path: Path) -> None:
    from job.store.sealed import sha256_file

    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7, 2).bfloat16(),
        "c": torch.arange(4),
        "d": torch.randn(1).double(),
        "e": torch.zeros(0, 3),
    }
    entry = checkpoint.write_tensors(tmp_path / "f.safetensors", tensors)
    read = load_file(tmp_path / "f.safetensors")
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    assert entry == {
        "size": (tmp_path / "f.safetensors").stat().st_size,
        "sha256": sha256_file(tmp_path / "f.safetensors"),
    }


def test_a_failed_write_is_raised_and_nothing_is_sealed(material: tuple[Recipe, Path], tmp_path: Path) -> None:
    run = tmp_path / "t"
    train(material, run, stop_at=2)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("in the way")
    with pytest.raises((OSError, DataError)):
        train(material, run, stop_at=4)


# ---- other numbers of ranks


def _rank(
    rank: int, world: int, recipe: Recipe, prepared: str, run: str, resume: str, stop_at: int, attempt: int, fp64: bool
) -> None:
    if fp64:
        torch.set_default_dtype(torch.float64)
        host.compute_dtype = lambda *_, **__: torch.float64
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{run}/store-{attempt}", rank=rank, world_size=world)
    reporter = InProcess(outbox=Path(run) / f"part-{attempt}-{rank}.json")
    borders = Borders(reporter)
    borders.go(stop_at, "stop")
    folder = Path(run)
    context = RankContext(
        folder.parent, folder, folder, rank, world, reporter, borders, attempt, Path(resume) if resume else None
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
    keeper = Keeper(run, attempt, world_size=world, final_rows=derive(recipe).rows, minutes=0)
    resume = newest_usable(run, identity(recipe.values(), Prepared.open(prepared).id), attempt, QUIET)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "job.train.loop"])
    arguments = (recipe, str(prepared), str(run), str(resume or ""), stop_at, attempt.number, fp64)
    ranks = [context.Process(target=_rank, args=(rank, world, *arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0] * world
    for rank in range(world):
        keeper.take(json.loads((run / f"part-{attempt.number}-{rank}.json").read_text()))
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
