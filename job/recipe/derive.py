"""From a recipe to everything that follows from it: the bridge to `model.scaling`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from job.errors import UsageError
from job.recipe.config import Recipe
from model import scaling
from model.config import SAME_NUMBERS, ConfigError, GPTConfig
from model.hyper import GroupSpec
from model.schedule import Schedule

DEFAULTS: dict[str, Any] = {
    f"{part}.{field.name}": field.default
    for part, of in (("network", GPTConfig), ("groups", GroupSpec), ("schedule", Schedule))
    for field in dataclasses.fields(of)
    if field.default is not dataclasses.MISSING
} | {"train.levers": []}
"""what `mathematics` has of a part where nothing else is asked for"""


RATES = {
    "matrices": "matrix_lr",
    "wte": "embedding_lr",
    "value_embeds": "embedding_lr",
    "head": "unembedding_lr",
    "x0_lambdas": "scalar_lr",
    "resid_lambdas": "scalar_lr",
}
"""the key of the train section that a group's learning rate follows; it is the rate of the first group named with it"""
SCHEDULE = {"warmup_steps": "warmup_steps", "warmdown_ratio": "warmdown_ratio", "final_lr_frac": "final_lr"}
"""keys of the train section, and what the schedule calls them"""


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

    def mathematics(self, recipe: Recipe) -> dict[str, Any]:
        """All values that decide what a step computes, as "groups.wte.lr": what a checkpoint belongs to.

        Kernels, micro-batches, ranks and exchange are not among them: they change the order of sums alone.
        """
        parts: dict[str, Any] = {"network": self.config, "schedule": self.schedule}
        parts |= {f"groups.{name}": spec for name, spec in self.specs.items()}
        values = {f"{part}.{k}": v for part, of in parts.items() for k, v in dataclasses.asdict(of).items()}
        values["batch_tokens"] = self.batch_tokens
        values |= {f"train.{key}": getattr(recipe.train, key) for key in ("dtype", "fp8", "seed")}
        values["train.levers"] = sorted(set(recipe.train.levers) - set(SAME_NUMBERS))
        return _plain(values)

    def explained(self) -> dict[str, dict[str, Any]]:
        """Each derived value with why and source, for `recipe.json`."""
        return {name: dataclasses.asdict(value) for name, value in self.scaling.values()}


def derive(recipe: Recipe) -> Derived:
    """All that follows from `recipe`; UsageError where it cannot be trained."""
    model, train = recipe.model, recipe.train
    try:
        config = GPTConfig.for_depth(
            model.depth, recipe.data.vocab_size, model.seq_len, model.generation, window_pattern=model.window_pattern
        )
        rules, other = scaling.RULES[model.generation], departures(recipe)
        factors = {key: asked / published for key, (published, asked) in other.items() if published}
        scaled = {
            name: group.lr * factors.get(RATES.get(name, ""), 1.0) * train.lr_scale
            for name, group in rules.groups.items()
        }
        derived = scaling.derive(
            config,
            rules.with_rates(scaled),
            ratio=None if train.steps else train.param_data_ratio,
            steps=train.steps or None,
            batch_tokens=train.total_batch_size or None,
        )
        overrides = {name: other[key][1] for key, name in SCHEDULE.items() if key in other}
        schedule = Schedule.for_generation(derived.steps.value, model.generation, **overrides)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    return Derived(config, derived, schedule, derived.batch_tokens.value // model.seq_len)


def departures(recipe: Recipe) -> dict[str, tuple[float, float]]:
    """(published, asked) of each key of the train section that trains otherwise than its generation was published."""
    rules, schedule = scaling.RULES[recipe.model.generation], Schedule.for_generation(1, recipe.model.generation)
    published = {"lr_scale": 1.0} | {key: getattr(schedule, name) for key, name in SCHEDULE.items()}
    published |= {key: rules.groups[name].lr for name, key in reversed(RATES.items())}
    asked = {key: getattr(recipe.train, key) for key in published}
    return {key: (value, asked[key]) for key, value in published.items() if asked[key] not in (-1, value)}


def differing_values(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name: stored -> now` for each value in which two `mathematics` differ, by more than a processor's rounding.

    A value that one of them lacks is its default: so did versions before it compute.
    """
    found = []
    for name in sorted({*stored, *now}):
        default = DEFAULTS.get(f"{name.partition('.')[0]}.{name.rpartition('.')[2]}")
        old, new = (_plain(values.get(name, default)) for values in (stored, now))
        numbers = isinstance(old, float) and isinstance(new, float)
        if not (math.isclose(old, new, rel_tol=1e-12) if numbers else old == new):
            found.append(f"{name}: {json.dumps(old)} -> {json.dumps(new)}")
    return found


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def micro_steps(recipe: Recipe, derived: Derived, world_size: int) -> int:
    """Micro-steps per optimizer step; UsageError naming the nearest batches where it is no whole number."""
    try:
        return scaling.accumulation_steps(
            derived.batch_tokens, recipe.model.seq_len, recipe.train.device_batch_size, world_size
        )
    except ConfigError as error:
        raise UsageError(f"train.total_batch_size or train.device_batch_size cannot be used: {error}") from None
