"""The published runs: what was trained, in how many seconds, how it scored. The reference of `speedrun plan`.

The leaderboard's rule: 8xH100 SXM, the seconds of the optimizer steps from the twelfth on (the first eleven compile),
nothing else. Nothing here was measured by this program.
"""

from __future__ import annotations

import dataclasses
import functools
from statistics import NormalDist
from typing import Any

import numpy as np

from job.recipe.config import Recipe
from job.recipe.derive import Derived, departures
from job.recipe.leaderboard import GPT2_XL_CORE, UNTIMED_STEPS
from model import scaling
from model.config import GPTConfig

GPUS = 8


@dataclasses.dataclass(frozen=True)
class Run:
    """One published run on 8xH100."""

    name: str
    when: str
    dataset: str
    depth: int
    generation: str
    ratio: float
    batch_tokens: int
    seconds: float
    """of the timed steps"""
    core: float
    core_runs: int
    """how many runs the CORE is the mean of"""
    bpb: float
    fp8: bool = True
    device_rows: int = 16
    vocab_size: int = 32768
    switches: tuple[tuple[str, Any], ...] = ()
    """switches in which its model differs from its generation's"""
    besides: str = ""
    """what it did that this configuration cannot say"""

    @functools.cached_property
    def config(self) -> GPTConfig:
        return GPTConfig.for_depth(self.depth, self.vocab_size, 2048, self.generation, **dict(self.switches))

    @functools.cached_property
    def steps(self) -> int:
        tokens = int(self.ratio * scaling.scaling_parameters(self.config))
        return tokens // self.batch_tokens

    @property
    def step_seconds(self) -> float:
        return self.seconds / (self.steps - UNTIMED_STEPS)


HALF, ONE = 1 << 19, 1 << 20
THIRDS = (("window_divisor", 3), ("smear", False), ("backout", False))

RUNS = (
    Run("Run 1", "348fbb3, 29 Jan 2026", "fineweb-edu", 24, "feb", 12, HALF, 10949.47, 0.25851, 1, 0.74833, fp8=False),
    Run("Run 2", "a67eba3, 2 Feb 2026", "fineweb-edu", 26, "feb", 8.5, HALF, 10493, 0.2578, 1, 0.745036),
    Run("Run 3", "2c062aa, 5 Feb 2026", "fineweb-edu", 26, "feb", 8.25, ONE, 9922, 0.26024, 1, 0.74645),
    Run("Run 4 (seed)", "PR #516, 8 Feb 2026", "fineweb-edu", 26, "feb", 7.25, HALF, 8967, 0.2626, 1, 0.750008),
    Run("Run 4 (upstream)", "324e69c, 4 Mar 2026", "climbmix", 24, "feb", 9.5, ONE, 2.01 * 3600, 0.2571, 7, 0.71854,
        switches=(("softcap", 20.0),)),
    Run("Run 5", "6ed7d1d, 9 Mar 2026", "climbmix", 24, "head", 8.7, ONE, 1.80 * 3600, 0.2690, 1, 0.71808,
        switches=THIRDS),
    Run("Run 6", "a825e63, 14 Mar 2026", "climbmix", 24, "head", 8, ONE, 5934, 0.2626, 5, 0.71800),
    Run("PR #733", "d22, not merged", "climbmix", 22, "head", 11.05, ONE, 5294, 0.2634, 3, 0.7242,
        besides="a longer warm-down to 0 and a clip of q and k"),
    Run("PR #830", "d22, Aug 2026, not merged", "climbmix", 22, "head", 9.4, ONE, 81.835 * 60, 0.2618, 6, 0.71879,
        device_rows=32, vocab_size=49152, besides="gains in some norms; its step count is derived"),
)  # fmt: skip


CORE_SD = 0.0057
"""of CORE from run to run, of one recipe (published: 0.0052 over seven runs of Run 4, 0.0062 over the 20 seeds of PR
#807)"""
SHOWN = 0.01
"""the one-sided p below which something counts as shown"""


def chance_of_passing(core: float, sd: float = CORE_SD) -> float:
    """That one run passes GPT-2 XL's CORE, where runs have the mean `core` and this sd."""
    return 1 - NormalDist(core, sd).cdf(GPT2_XL_CORE)


def runs_needed(core: float, sd: float = CORE_SD, *, known: bool = False, most: int = 1000) -> int | None:
    """Runs until a one-sided test of a recipe with mean `core` against GPT-2 XL's is expected to fall below SHOWN, by
    Student's t or with a `known` sd by the normal law; None where more than `most`."""
    n = np.arange(2, most + 1)
    enough = (core - GPT2_XL_CORE) / sd * np.sqrt(n) > (NormalDist().inv_cdf(1 - SHOWN) if known else _least_t(most))
    return int(n[enough.argmax()]) if enough.any() else None


@functools.cache
def _least_t(most: int) -> np.ndarray:
    """Of 2, 3, ... `most` runs, the t above which p < SHOWN."""
    from scipy.special import stdtrit

    return stdtrit(np.arange(1, most), 1 - SHOWN)


def closest(recipe: Recipe, derived: Derived) -> tuple[Run, list[str]]:
    """The published run with the fewest differences (then the nearest FLOPs), and those differences in words."""
    config, flops = derived.config, derived.scaling.flops.value
    tuned = [f"{key} {published:g} -> {asked:g}" for key, (published, asked) in departures(recipe).items()]

    def differences(run: Run) -> list[str]:
        changed = [
            f"{field.name} {getattr(run.config, field.name)} -> {getattr(config, field.name)}"
            for field in dataclasses.fields(config)
            if getattr(run.config, field.name) != getattr(config, field.name)
        ]
        pairs = (
            ("batch", f"{run.batch_tokens:,}", f"{derived.batch_tokens:,}"),
            ("steps", f"{run.steps:,}", f"{derived.steps:,}"),
            ("fp8", "on" if run.fp8 else "off", "on" if recipe.train.fp8 else "off"),
            ("text", run.dataset, recipe.data.source),
        )
        changed += [f"{what} {theirs} -> {ours}" for what, theirs, ours in pairs if theirs != ours] + tuned
        return [*changed, f"without {run.besides}"] if run.besides else changed

    def distance(run: Run) -> tuple[int, float]:
        theirs = scaling.flops_per_token(run.config) * run.batch_tokens * run.steps
        return len(differences(run)), abs(theirs / flops - 1)

    nearest = min(RUNS, key=distance)
    return nearest, differences(nearest)
