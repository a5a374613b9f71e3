"""What tests of checkpoints share."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.data import documents, prepare
from job.recipe.config import Recipe
from job.reporter import Reporter
from tiny_training import STEPS, recipe_of


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> tuple[Recipe, Path]:
    """A recipe and its prepared set: several row files, and fewer rows than the run consumes."""
    out = tmp_path_factory.mktemp("material")
    (out / "texts").mkdir()
    for file in sorted(small_corpus.iterdir())[:24]:
        (out / "texts" / file.name).write_text(file.read_text()[:160])
    recipe = recipe_of(out / "texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SHARD_BYTES", 1500)
        prepared = prepare.prepare(out, recipe.data, recipe.model.seq_len, Reporter(), workers=1)
    assert len(prepared.row_files) > 1
    assert prepared.train_rows < STEPS * 8
    return recipe, prepared.path
