"""From a recipe to everything that follows from it: the bridge to `model.scaling`."""

from __future__ import annotations

import dataclasses
from typing import Any

from job.errors import UsageError
from job.recipe.config import Recipe
from model import scaling
from model.config import ConfigError, GPTConfig
from model.hyper import GroupSpec
from model.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Derived:
    """The network, its horizon and its hyperparameters, as one recipe decides them."""

    config: GPTConfig
    scaling: scaling.Derived
    schedule: Schedule
    rows_per_step: int

    @property
    def steps(self) -> int:
        return self.scaling.steps.value

    @property
    def batch_tokens(self) -> int:
        return self.scaling.batch_tokens.value

    @property
    def rows(self) -> int:
        """Rows consumed by the whole run."""
        return self.steps * self.rows_per_step

    @property
    def specs(self) -> dict[str, GroupSpec]:
        return self.scaling.specs

    def explained(self) -> dict[str, dict[str, Any]]:
        """Each derived value with why and source, for `recipe.json`."""
        return {name: dataclasses.asdict(value) for name, value in self.scaling.values()}


def derive(recipe: Recipe) -> Derived:
    """All that follows from `recipe`; UsageError where it cannot be trained."""
    model, train = recipe.model, recipe.train
    try:
        config = GPTConfig.for_depth(model.depth, recipe.data.vocab_size, model.seq_len, model.generation)
        rules = scaling.RULES[model.generation]
        scaled = {name: group.lr * train.lr_scale for name, group in rules.groups.items()}
        derived = scaling.derive(
            config,
            rules.changed(lrs=scaled),
            ratio=None if train.steps else train.param_data_ratio,
            steps=train.steps or None,
            batch_tokens=train.total_batch_size or None,
        )
        schedule = Schedule.for_generation(derived.steps.value, model.generation)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    return Derived(config, derived, schedule, derived.batch_tokens.value // model.seq_len)


def micro_steps(recipe: Recipe, derived: Derived, world_size: int) -> int:
    """Micro-steps per optimizer step; UsageError naming the nearest batches where it is no whole number."""
    try:
        return scaling.accumulation_steps(
            derived.batch_tokens, recipe.model.seq_len, recipe.train.device_batch_size, world_size
        )
    except ConfigError as error:
        raise UsageError(f"train.total_batch_size or train.device_batch_size cannot be used: {error}") from None
