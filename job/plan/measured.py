"""What `speedrun try8` (job/run/try8.py) or a run of sky/try.yaml found: the plan's step by it, and whether a machine's
kind has passed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

from job.errors import DataError, UsageError
from job.machine.gpus import CUDA_NAMES, GPU
from job.plan.steptime import optimizer_seconds, step_seconds
from job.recipe.config import Recipe, from_document
from job.recipe.derive import Derived, derive
from job.recipe.leaderboard import UNTIMED_STEPS
from job.store import open_store
from job.store.fence import run_key
from job.store.stores import Store

RUN_ID = "try8"
TRY_RESULT, TRY_RECIPE = f"{run_key('try')}/report/result.json", f"{run_key('try')}/recipe.json"
KEY = f"{run_key(RUN_ID)}/try8.json"
VARIANTS = MappingProxyType(
    {
        "on": {"overlap": True, "bf16": False},
        "off": {"overlap": False, "bf16": False},
        "bf16": {"overlap": True, "bf16": True},
    }
)
"""keys of the recipe's `comm`, by the name of what is measured with them"""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of a step by variant, and where they were measured, with which recipe."""

    recipe: Recipe
    gpu: str
    """as CUDA calls it"""
    gpus: int
    revision: str | None
    step_seconds: dict[str, float]

    @classmethod
    def at(cls, place: str) -> Measured:
        """That of the file or the bucket `place`, of try8 before one of try; DataError where none is there."""
        path = Path(place)
        store = None if path.is_file() else open_store(place)
        data = path.read_bytes() if store is None else store.get(KEY)
        try:
            if data is not None:
                return cls.of(json.loads(data))
            if store and (result := store.get(TRY_RESULT)):
                return cls.of_try(json.loads(result), json.loads(store.get(TRY_RECIPE) or b""))
        except (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
            raise DataError(f"{place} holds no trial of `speedrun try8` ({error!r}): make one anew") from None
        raise DataError(
            f"{place} has no {KEY}, and no {TRY_RESULT}: name the file of a trial, or a bucket with one"
            " (sky/try8.yaml, sky/try.yaml)"
        )

    @classmethod
    def of_try(cls, result: dict[str, Any], recipe: dict[str, Any]) -> Measured:
        """By the result and the recipe of a run of sky/try.yaml, on one GPU."""
        seconds = result["clocks"]["training_s"] / (result["steps"] - UNTIMED_STEPS)
        origin = result["provenance"]
        return cls(from_document(recipe), origin["gpus"][0], len(origin["gpus"]), origin["commit"], {"on": seconds})

    @classmethod
    def of(cls, document: dict[str, Any]) -> Measured:
        stack = document["stack"]
        seconds = {variant: found["median"] for variant, found in document["step_seconds"].items()}
        return cls(from_document(document["run"]), stack["gpu"], stack["gpus"], stack["revision"], seconds)

    def carried_to(self, recipe: Recipe, derived: Derived, gpu: GPU, gpus: int) -> float:
        """Seconds of a step of `recipe` there; UsageError for another node, unless it was one such GPU.

        From a node to the same node all of a step is scaled by what was measured. From one GPU to several it is the
        forward and backward pass; transport and optimizer, which one GPU does not have so, stay the model's.
        """
        if CUDA_NAMES.get(self.gpu) != gpu.name or self.gpus not in (1, gpus):
            raise UsageError(f"the trial was of {self.gpus} x {self.gpu}, the plan is of {gpus} x {gpu.title}")
        asked = dataclasses.asdict(recipe.comm).items()
        variant = next((name for name, keys in VARIANTS.items() if keys.items() <= asked), "")
        if self.gpus == 1:
            variant = next(iter(self.step_seconds), "")
        if variant not in self.step_seconds:
            raise UsageError(
                f"the trial did not come to measure {recipe.comm}: plan without --measured, or make one anew"
            )
        mine, was, now = derive(self.recipe), self.recipe.train, recipe.train
        modelled = step_seconds(mine.config, mine.batch_tokens, gpu, self.gpus, was.fp8, levers=was.levers)
        planned = step_seconds(derived.config, derived.batch_tokens, gpu, gpus, now.fp8, levers=now.levers)
        if self.gpus == gpus:
            return planned * self.step_seconds[variant] / modelled
        mine_apart, apart = (
            optimizer_seconds(config, gpu, n) for config, n in ((mine.config, 1), (derived.config, gpus))
        )
        return (planned - apart) * (self.step_seconds[variant] - mine_apart) / (modelled - mine_apart) + apart

    def has_the_step_of(self, recipe: Recipe, derived: Derived, gpus: int) -> bool:
        """Whether it is the step of `recipe` itself, on as many GPUs, that was measured."""
        mine = derive(self.recipe)
        wanted, keys = (derived.config, derived.batch_tokens, gpus), ("fp8", "levers", "device_batch_size")
        return (mine.config, mine.batch_tokens, self.gpus) == wanted and all(
            getattr(self.recipe.train, key) == getattr(recipe.train, key) for key in keys
        )


def has_passed(store: Store, revision: str | None, gpu: str) -> bool:
    """Whether `store` holds a trial in which all parts passed, of this image's revision and on such GPUs."""
    try:
        found = json.loads(store.get(KEY) or b"{}")
        passed, stack = found.get("passed"), found.get("stack", {})
        return passed is True and (stack.get("revision"), stack.get("gpu")) == (revision, gpu)
    except (ValueError, AttributeError):  # a damaged file is no trial
        return False
