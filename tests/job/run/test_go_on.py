"""`run --from`: what a run that goes on from another's checkpoint starts with, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Finished, Speedrun
from helpers import events
from job.console import Console
from job.errors import DataError
from job.recipe.config import resolve
from job.recipe.derive import derive
from job.run.adopt import adopt
from job.run.bucket import Bucket
from job.run.launch import open_run
from job.store.attempt import Attempt
from job.store.checkpoint_folder import KIND, files_hash, folder_of, folders, identity, newest_usable
from job.store.documents import recipe_of
from job.store.sealed import open_sealed, sealing
from job.store.stores import FolderStore, push_sealed

RECIPE = resolve("smoke")
ROWS = derive(RECIPE).rows_per_step
QUIET = Console(-1)
PREPARED = "0123456789abcdef"


def store(run: Path, step: int, *, optimizer: bool = True) -> Path:
    """A checkpoint as training seals it, of made-up bytes."""
    folder, made_from = folder_of(run, step * ROWS), identity(RECIPE, PREPARED) | {"rows": step * ROWS}
    with sealing(folder, kind=KIND, made_from=made_from) as written:
        written.facts |= {"step": step, "rows": step * ROWS, "world_size": 1, "slices": {}}
        for name in ("weights-00000.safetensors", *(["optimizer-00000.safetensors"] if optimizer else [])):
            (written.path / name).write_bytes(f"{name} {step}".encode())
    return folder


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """The run `old` of preset smoke, with what is kept of a run whose last checkpoint is its weights alone."""
    run = open_run(tmp_path / "out", "old", RECIPE, fresh=False)
    for step in (80, 160, 240):
        store(run, step, optimizer=step < 240)
    return run


def without_state(run: Path) -> None:
    for folder in folders(run)[1:]:
        shutil.rmtree(folder)


WEIGHTS_ALONE = (
    "the checkpoint before step 240 of run old is its weights alone, and training goes on from an optimizer's"
)
REFUSED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no name": (lambda old: None, "--from old", "give it a --run-id that is not old"),
    "its own name": (lambda old: None, "--from old --run-id old", "give it a --run-id that is not old"),
    "no parent": (lambda old: None, "--from nobody --run-id new", "no run nobody below"),
    "--at alone": (lambda old: None, "--at 80 --run-id new", "give --from RUN as well"),
    "other text": (lambda old: None, "-o data.seed=7", "data.seed: 42 -> 7 cannot be: leave it out"),
    "another network": (lambda old: None, "-o model.depth=4", "model.depth: 2 -> 4 cannot be"),
    "another batch": (lambda old: None, "-o train.total_batch_size=8192", "add -o train.total_batch_size=4096"),
    "no more steps": (
        lambda old: None,
        "--at 160 -o train.steps=160",
        "would have 160 steps: give more, e.g. -o train.steps=320",
    ),
    "weights alone": (
        lambda old: None,
        "-o train.steps=480",
        f"{WEIGHTS_ALONE} state: --at 80 or --at 160 can be used",
    ),
    "nothing usable": (without_state, "-o train.steps=480", f"{WEIGHTS_ALONE} state: no stored checkpoint has it"),
    "not stored": (
        lambda old: None,
        "--at 81 -o train.steps=480",
        "no stored checkpoint before step 81: --at 80 or --at 160",
    ),
    "begun otherwise": (
        lambda old: open_run(old.parents[1], "new", RECIPE, fresh=False),
        "--at 160",
        "run new was begun without --from",
    ),
}


@pytest.mark.parametrize(("before", "words", "says"), REFUSED.values(), ids=REFUSED)
def test_what_it_refuses(before, words: str, says: str, parent: Path, tmp_path: Path, speedrun: Speedrun) -> None:
    before(parent)
    line = (
        words.split()
        if "--run-id" in words or words == "--from old"
        else ["--from", "old", "--run-id", "new", *words.split()]
    )
    there = sorted(tmp_path.rglob("*"))
    ended = speedrun.here(speedrun.command("run", "--out", str(tmp_path / "out"), *line), code=2)
    assert says in ended.stderr and ended.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == there


def test_a_dry_run_says_where_it_goes_on_and_what_differs(parent: Path, tmp_path: Path, speedrun: Speedrun) -> None:
    words = ["--out", str(tmp_path / "out"), "--from", "old", "--run-id", "new", "--at", "160", "--dry-run"]
    same = speedrun.here(speedrun.command("run", *words)).stdout
    assert "run new goes on from step 160 of run old to step 240, as one run of so many steps would have\n" in same
    longer = speedrun.here(speedrun.command("run", *words, "-o", "train.steps=480", "-o", "eval.samples=1")).stdout
    assert "its steps so far had the schedule of 240, so that it is not what one run of 480 would be" in longer
    assert not (tmp_path / "out" / "runs" / "new").exists()


@pytest.mark.parametrize("place", ["here", "in the bucket"])
def test_the_checkpoint_becomes_the_runs_own(place: str, parent: Path, tmp_path: Path) -> None:
    stored = folder_of(parent, 160 * ROWS)
    files, bucket = open_sealed(stored, kind=KIND).files, None
    if place == "in the bucket":
        bucket = Bucket(FolderStore(tmp_path / "bucket"), 1.0)
        push_sealed(bucket.store, f"runs/old/checkpoints/{stored.name}", stored)
        shutil.rmtree(parent)
    begun = {"run": "old", "step": 160, "rows": 160 * ROWS, "sha256": files_hash(files)}
    recipe = resolve("smoke", overrides=["train.steps=480"])
    run = open_run(tmp_path / "out", "new", recipe, fresh=False, origin=begun)
    assert recipe_of(run)["from"] == begun
    attempt, belongs_to = Attempt.claim(run), identity(recipe, PREPARED)
    for prepared, sha256, why in (("f" * 16, begun["sha256"], "other rows"), (PREPARED, "0", "not the checkpoint")):
        wrong = open_run(tmp_path / "out", f"wrong-{sha256[0]}", recipe, fresh=False, origin=begun | {"sha256": sha256})
        with pytest.raises(DataError, match=why):
            adopt(wrong, identity(recipe, prepared), attempt, QUIET, bucket)
        assert folders(wrong) == []
    adopt(run, belongs_to, attempt, QUIET, bucket)
    own = newest_usable(run, belongs_to, attempt, QUIET)
    assert own and open_sealed(own, kind=KIND).files == files and open_sealed(own, kind=KIND).facts["step"] == 160
    store(run, 240)
    shutil.rmtree(own)
    adopt(run, belongs_to, attempt, QUIET, bucket)  # it has one of its own by now
    assert [int(folder.name) for folder in folders(run)] == [240 * ROWS]


@pytest.mark.slow
def test_a_run_goes_on_as_an_unbroken_one_and_longer(finished: Finished, speedrun: Speedrun, tmp_path: Path) -> None:
    """From the parent's checkpoint before step 8 the same recipe ends in the same bits; from its end the rows and the
    step go on counting."""
    shutil.copytree(finished.out, tmp_path / "out")
    out = tmp_path / "out"
    place = ["--out", str(out), "--from", "t"]
    speedrun(speedrun.command("run", *place, "--at", "8", "--run-id", "again"))
    ends = [open_sealed(folders(out / "runs" / name)[0], kind=KIND) for name in ("t", "again")]
    assert files_hash(ends[0].files) == files_hash(ends[1].files) and ends[0].facts["step"] == 12
    assert [event["step"] for event in events(out, "train.step", "again")] == [8, 9, 10, 11]
    assert any(name.startswith("optimizer-") for name in ends[0].files), "kept, on a CPU"

    longer = ["--run-id", "longer", "-o", "train.steps=20", "-o", "train.checkpoint_every=0"]
    ended = speedrun(speedrun.command("run", *place, *longer, "--json"))
    result = json.loads(ended.stdout)
    assert (result["state"], result["steps"], result["planned_steps"]) == ("complete", 20, 20)
    assert result["from"] == {"run": "t", "step": 12, "rows": 96, "sha256": files_hash(ends[0].files)}
    made = events(out, "train.step", "longer")
    assert [(event["step"], event["rows"]) for event in made] == [(step, 8 * (step + 1)) for step in range(12, 20)]
    assert (
        "It goes on from step 12 of run t (weights " in (out / "runs" / "longer" / "report" / "report.md").read_text()
    )
    again = speedrun(speedrun.command("run", *place, *longer))
    assert "pretrain: done already" in again.stderr
