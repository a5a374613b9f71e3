"""`speedrun evaluate --run-id`: the recipe of another evaluation of a finished model, and the folder of its answers.

The run's recipe stays as it was begun, so that the run's own command is still accepted. An evaluation that says no more
than the score that the run has (a smaller cap, or the smoke score where CORE is known) goes to a folder of its own, and
report and result.json stay as they are:

    eval/<task>/ ...  eval/ledger/                    the run's score, the fullest that there was
    eval/lesser/core-20/{<task>/ ..., ledger/}        CORE with at most 20 items a task, asked for later
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from job.errors import UsageError
from job.evaluation.core_v1 import PUBLISHED_URL
from job.evaluation.ledger import LEDGER
from job.recipe.config import EvalConfig, Recipe, from_document, resolve
from job.recipe.derive import derive
from job.store.checkpoint_folder import KIND, folder_of
from job.store.documents import hashed, recipe_of
from job.store.sealed import atomic_write, is_sealed, open_sealed


@dataclasses.dataclass(frozen=True)
class Asked:
    """An evaluation: its recipe, the file with the recipe's document for the ranks, and the folder of its answers."""

    recipe: Recipe
    document: Path
    folder: Path
    is_lesser: bool
    """whether the run's own score says more"""


FROM_BUCKET = ".recipe-from-bucket"
"""a file beside a recipe.json that nobody gave on this machine: no path or address in it is followed"""


def recipe_for_evaluation(run: Path, core_bundle: str | None, overrides: Sequence[str]) -> Recipe:
    """The run's recipe with another `eval` section; UsageError for a key of any other section, and for a bundle that
    only the bucket names."""
    recipe = from_document(recipe_of(run))
    foreign = [o for o in overrides if not o.startswith("eval.")]
    if foreign:
        rule = "the run is trained, only keys of the eval section can change, e.g. -o eval.cap=20"
        raise UsageError(f"-o {foreign[0]} cannot be used: {rule}")
    flags = {}
    for section, entries in recipe.values().items():
        for key, value in entries.items():
            flags[f"{section}.{key}"] = (recipe.sources[f"{section}.{key}"], value)
    if core_bundle is not None:
        flags["eval.core_bundle"] = ("--core-bundle", core_bundle)
    asked = resolve(recipe.preset, flags, overrides)
    bundle = asked.eval.core_bundle
    named = core_bundle is not None or any(o.partition("=")[0].strip() == "eval.core_bundle" for o in overrides)
    if (run / FROM_BUCKET).is_file() and bundle not in ("", PUBLISHED_URL) and not named:
        raise UsageError(
            f"the recipe of {run.name} came from the bucket and names the CORE bundle {bundle}, which is not followed:"
            " say --core-bundle PATH"
        )
    return asked


@contextlib.contextmanager
def asking(run: Path, recipe: Recipe, document: dict) -> Iterator[Asked]:
    """The evaluation of `run` by `recipe`; `document` is its recipe.json, given to the ranks as a temporary file."""
    lesser = fullness(recipe.eval) < fullness_of_score(run, derive(recipe).rows)
    folder = run / "eval"
    if lesser:
        folder /= f"lesser/{'core' if recipe.eval.core_bundle else 'smoke'}-{recipe.eval.cap or 'all'}"
    with tempfile.TemporaryDirectory(prefix="speedrun-") as scratch:
        file = Path(scratch) / "recipe.json"
        atomic_write(file, json.dumps(hashed(document | {"answers": folder.relative_to(run).as_posix()})).encode())
        yield Asked(recipe, file, folder, lesser)


def fullness(asked: EvalConfig) -> tuple[bool, float]:
    """An order of evaluations: CORE says more than the smoke score, then more items a task say more."""
    return bool(asked.core_bundle), asked.cap or math.inf


def fullness_of_score(run: Path, rows: int) -> tuple[bool, float]:
    """`fullness` of the run's score of its finished model, which trained on `rows`; (False, 0) where it has none."""
    folder = run / "eval" / "ledger"
    if not is_sealed(folder):
        return False, 0.0
    sealed = open_sealed(folder, kind=LEDGER)
    final = folder_of(run, rows)
    if is_sealed(final) and open_sealed(final, kind=KIND, verify=False).id != sealed.made_from["weights"]:
        return False, 0.0
    return fullness_of_ledger(sealed.facts, sealed.made_from)


def fullness_of_ledger(facts: Mapping[str, Any], made_from: Mapping[str, Any]) -> tuple[bool, float]:
    """`fullness` of the score of which a sealed ledger says this."""
    return facts["name"] == "core", made_from["cap"] or math.inf
