"""Checkpoints: exact resume at any step, any number of ranks, and what happens to damaged ones. The loop is the real
one, in process."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from job.console import Console
from job.data.prepare import Prepared
from job.data.rows import Rows
from job.errors import DataError, DivergedError, InterruptedRun
from job.machine import host
from job.recipe.config import Recipe
from job.recipe.derive import derive
from job.reporter import Reporter
from job.run import supervise
from job.store.attempt import Attempt
from job.store.checkpoint_folder import (
    CheckpointManager,
    final_checkpoint,
    folders,
    identity,
    newest_usable,
    parts_folder,
)
from job.store.documents import hashed
from job.store.sealed import MANIFEST, content_id, open_sealed
from job.train import checkpoint, loop
from job.train.context import SIGNALS, RankContext, StopSignal
from model.config import GPTConfig
from model.gpt import GPT
from tiny_training import CPU, QUIET, STEPS, InProcess


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
    """One attempt at the run in folder `run`, from its newest checkpoint, up to step `stop_at`; the losses of its
    steps."""
    recipe, prepared = material
    recipe = of_generation(
        dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **train_values)), generation
    )
    attempt = Attempt.claim(run)
    derived = derive(recipe)
    opened = Prepared.open(prepared)
    manager = CheckpointManager(run, attempt, world_size=1, final_rows=derived.rows, minutes=0)
    resume = newest_usable(run, identity(recipe, opened.id), attempt, QUIET)
    reporter = InProcess(manager)
    stop_signal = StopSignal()
    if stop_at is not None:
        stop_signal.agreed(SIGNALS.index("stop"), before=stop_at)
    context = RankContext(run.parent, run, run / "recipe.json", 0, 1, reporter, stop_signal, attempt.number, resume)
    torch.set_num_threads(1)
    try:
        loop.train(loop.build(context, recipe, derived, opened, Rows(opened, seed=recipe.data.seed), CPU))
    except InterruptedRun:
        assert stop_at is not None
    manager.check()
    manager.check()
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


@pytest.mark.parametrize("stops", [[5, 6], range(1, STEPS)], ids=["twice", "before every step"])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(
    material: tuple[Recipe, Path], undisturbed: tuple, tmp_path: Path, stops: Sequence[int]
) -> None:
    """Borders of epochs, row files, micro-steps and schedule phases lie between the stops."""
    chosen, losses, expected = undisturbed
    run = tmp_path / "t"
    told = [loss for stop in [*stops, None] for loss in train(material, run, stop_at=stop, **chosen)]
    assert told == losses
    found = weights(run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_borders_that_resume_has_to_cross_are_in_the_run(material: tuple[Recipe, Path]) -> None:
    recipe, prepared = material
    derived, opened = derive(recipe), Prepared.open(prepared)
    assert derived.rows > opened.train_rows, "an epoch border"
    assert opened.metadata["files"][0]["rows"] < opened.train_rows, "a row-file border"
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
            manifest["made_from"]["mathematics"]["groups.matrices.lr"] *= 10
            manifest["id"] = content_id(manifest["kind"], manifest["made_from"])
            (folder / MANIFEST).write_text(json.dumps(hashed(manifest)))


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
    belongs_to = identity(recipe, Prepared.open(prepared).id)
    attempt = Attempt.claim(run)
    assert newest_usable(run, belongs_to, attempt, Console()) == before
    said = capsys.readouterr().err
    assert "taking the checkpoint before it" in said
    assert how != "foreign" or "other values than this version derives: groups.matrices.lr: " in said
    damage(before, how)
    with pytest.raises(
        DataError, match=r"no checkpoint below .* can be used; delete that folder to train from the first step"
    ):
        newest_usable(run, belongs_to, attempt, QUIET)


def test_a_checkpoint_of_the_earlier_layout_goes_on_with_a_warning(
    material: tuple[Recipe, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe, prepared = material
    run = tmp_path / "t"
    train(material, run, stop_at=3)
    (folder,) = folders(run)
    manifest = json.loads((folder / MANIFEST).read_text())
    made_from = {"recipe": "0" * 16, "prepared": manifest["made_from"]["prepared"], "rows": 24}
    manifest |= {"made_from": made_from, "id": content_id("checkpoint", made_from)}
    del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    belongs_to, attempt = identity(recipe, Prepared.open(prepared).id), Attempt.claim(run)
    assert newest_usable(run, belongs_to, attempt, Console()) == folder
    assert "noted no derived values: only the recipes were compared" in capsys.readouterr().err
    with pytest.raises(DataError, match="was trained on other rows"):
        newest_usable(run, belongs_to | {"prepared": "another"}, attempt, QUIET)


def test_the_newest_two_and_the_final_one_are_kept_and_the_final_one_can_be_weights_alone(
    material: tuple[Recipe, Path], tmp_path: Path
) -> None:
    run = tmp_path / "t"
    train(material, run, checkpoint_every=3, keep_optimizer="no")
    assert [int(p.name) // 8 for p in folders(run)] == [14, 12, 9]
    final = folders(run)[0]
    sealed = open_sealed(final, kind="checkpoint")
    assert set(sealed.files) == {"weights-00000.safetensors"}
    assert all(name.startswith("weight/") for name in sealed.facts["slices"])
    assert sorted(p.name for p in final.iterdir()) == ["manifest.json", "weights-00000.safetensors"]
    assert all(
        any(name.startswith("optimizer-") for name in open_sealed(older, kind="checkpoint").files)
        for older in folders(run)[1:]
    )


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
    manager = CheckpointManager(tmp_path / "t", Attempt.claim(tmp_path / "t"), world_size=1, final_rows=1, minutes=1)
    now += 600
    assert not manager.due()
    supervise._take(SimpleNamespace(), {"training": 0, "steps_to_stop": 2}, Reporter(), QUIET, manager)
    now += 59
    assert not manager.due()
    now += 2
    assert manager.due()
    supervise._take(SimpleNamespace(), {"kind": "train.step", "ms": 9}, Reporter(), QUIET, manager)
    assert manager.due()
    manager.restart_clock()
    assert not manager.due()


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


@pytest.mark.parametrize("begins_in_bf16", [True, False])
def test_a_run_goes_on_where_the_processor_computes_in_another_precision(
    material: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begins_in_bf16: bool
) -> None:
    """`train.dtype` is "auto" unless it is given. (Few steps in bf16, which is slow without instructions for it.)"""
    losses = []
    for bf16, stop_at in ((begins_in_bf16, 2 if begins_in_bf16 else STEPS - 2), (not begins_in_bf16, None)):
        monkeypatch.setattr(host, "has_fast_bf16", lambda bf16=bf16: bf16)
        losses += train(material, tmp_path / "run", stop_at=stop_at, dtype="auto")
        assert weights(tmp_path / "run")["weight/wte.weight@0"].dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert losses == pytest.approx(train(material, tmp_path / "straight", dtype="fp32"), rel=0.01)


def test_weights_of_another_size_are_refused_and_not_cut(tmp_path: Path) -> None:
    larger, smaller = (GPT(GPTConfig.for_depth(1, vocab_size, 16)) for vocab_size in (128, 64))
    tensors = {f"weight/{name}": p.detach().reshape(p.shape or 1) for name, p in larger.named_parameters()}
    checkpoint.write_tensors(tmp_path / "weights", {f"{name}@0": tensor for name, tensor in tensors.items()})
    slices = {name: [{"file": "weights", "start": 0, "stop": len(tensor)}] for name, tensor in tensors.items()}
    sealed = SimpleNamespace(path=tmp_path, facts={"slices": slices})
    checkpoint.load_weights(larger, sealed)
    with pytest.raises(DataError, match=r"holds weight/wte.weight as \(128, 128\), not \(64, 128\); it belongs to"):
        checkpoint.load_weights(smaller, sealed)
