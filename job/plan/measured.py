"""What `speedrun try8` found (job/run/try8.py): the plan's step by it, and whether a machine's kind has passed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

from job.errors import DataError, UsageError
from job.machine.gpus import CUDA_NAMES, GPU
from job.plan.steptime import step_seconds
from job.recipe.config import CommConfig, Recipe, from_document
from job.recipe.derive import Derived, derive
from job.store import open_store
from job.store.fence import run_key
from job.store.stores import Store

RUN_ID = "try8"
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
        """That of the file or the bucket `place`; DataError where none is there."""
        path = Path(place)
        data = path.read_bytes() if path.is_file() else open_store(place).get(KEY)
        if data is None:
            raise DataError(f"{place} has no {KEY}: name the file of a trial, or a bucket with one (sky/try8.yaml)")
        try:
            return cls.of(json.loads(data))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{place} holds no trial of `speedrun try8` ({error!r}): make one anew") from None

    @classmethod
    def of(cls, document: dict[str, Any]) -> Measured:
        stack = document["stack"]
        seconds = {variant: found["median"] for variant, found in document["step_seconds"].items()}
        return cls(from_document(document["run"]), stack["gpu"], stack["gpus"], stack["revision"], seconds)

    def factor(self, comm: CommConfig, gpu: GPU, gpus: int) -> float:
        """By how much a step with `comm` takes longer than the fit says; UsageError for another node."""
        if (CUDA_NAMES.get(self.gpu), self.gpus) != (gpu.name, gpus):
            raise UsageError(f"the trial was of {self.gpus} x {self.gpu}, the plan is of {gpus} x {gpu.title}")
        variant = next(
            (name for name, keys in VARIANTS.items() if keys.items() <= dataclasses.asdict(comm).items()), ""
        )
        if variant not in self.step_seconds:
            raise UsageError(f"the trial did not come to measure {comm}: plan without --measured, or make one anew")
        derived, fp8 = derive(self.recipe), self.recipe.train.fp8
        return self.step_seconds[variant] / step_seconds(derived.config, derived.batch_tokens, gpu, gpus, fp8)

    def has_the_step_of(self, recipe: Recipe, derived: Derived) -> bool:
        """Whether it is the step of `recipe` itself that was measured."""
        mine = derive(self.recipe)
        return (mine.config, mine.batch_tokens, self.recipe.train.fp8, self.recipe.train.device_batch_size) == (
            derived.config,
            derived.batch_tokens,
            recipe.train.fp8,
            recipe.train.device_batch_size,
        )


def has_passed(store: Store, revision: str | None, gpu: str) -> bool:
    """Whether `store` holds a trial in which all parts passed, of this image's revision and on such GPUs."""
    found = json.loads(store.get(KEY) or b"{}")
    stack = found.get("stack", {})
    return found.get("passed") is True and (stack.get("revision"), stack.get("gpu")) == (revision, gpu)
