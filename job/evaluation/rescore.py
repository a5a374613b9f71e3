"""`speedrun evaluate --run-id`: another evaluation of a finished model, beside those that it has.

The run's recipe stays as it was begun, so that the run's own command is still accepted. The run's score is the fullest
of its evaluations (CORE before the smoke score, then more items a task); one that says less is a lesser one, whose
events the run's record leaves out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from job.errors import UsageError
from job.evaluation.core_v1 import PUBLISHED_URL
from job.evaluation.ledger import fullness, sealed_ledgers
from job.recipe.config import EvalConfig, Recipe, from_document, resolve
from job.recipe.derive import derive
from job.store.checkpoint_folder import KIND, folder_of
from job.store.documents import hashed, recipe_of
from job.store.sealed import atomic_write, is_sealed, open_sealed

LESSER, FULLER = "lesser", "fuller"


@dataclasses.dataclass(frozen=True)
class Asked:
    """An evaluation: its recipe, the file with the recipe's document for the ranks, and whether the run's score says
    more."""

    recipe: Recipe
    document: Path
    is_lesser: bool


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
    values = {f"{section}.{key}": value for section, keys in recipe.values().items() for key, value in keys.items()}
    flags = {key: (recipe.sources[key], value) for key, value in values.items()}
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
    lesser = fullness_asked(recipe.eval) < fullness_of_score(run, derive(recipe).rows)
    with tempfile.TemporaryDirectory(prefix="speedrun-") as scratch:
        file = Path(scratch) / "recipe.json"
        atomic_write(file, json.dumps(hashed(document | {"asked": LESSER if lesser else FULLER})).encode())
        yield Asked(recipe, file, lesser)


def fullness_asked(asked: EvalConfig) -> tuple[bool, float]:
    """`fullness` of the score that will be."""
    return fullness("core" if asked.core_bundle else "smoke_score", asked.cap)


def fullness_of_score(run: Path, rows: int) -> tuple[bool, float]:
    """`fullness` of the run's score of its finished model, which trained on `rows`; (False, 0) where it has none."""
    final = folder_of(run, rows)
    weights = open_sealed(final, kind=KIND, verify=False).id if is_sealed(final) else None
    ledgers = sealed_ledgers(run / "eval").values()
    mine = (ledger for ledger in ledgers if weights in (None, ledger.made_from["weights"]))
    return max((fullness(ledger.facts["name"], ledger.made_from["cap"]) for ledger in mine), default=(False, 0.0))
