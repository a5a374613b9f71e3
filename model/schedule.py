"""What changes from step to step: the learning rates' factor, Muon's momentum, and the factor of Muon's decay.

Three phases of a run of N steps: a linear warm-up, a plateau, and a linear warm-down over the last `warmdown_ratio` of
it. The step is counted from 0; every value depends on the step and N alone, so a resumed run needs no state.

Source: the leaderboard's training program, February ("feb") and July 2026 ("head").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from model.config import ConfigError
from model.hyper import StepHyper


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run of `steps` steps. The defaults are the July generation's."""

    steps: int
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65
    final_lr: float = 0.05  # the factor that the warm-down ends at
    momentum_start: float = 0.85
    momentum: float = 0.97
    momentum_warmup: int = 400  # steps from start to plateau
    momentum_final: float = 0.90  # reached together with final_lr
    decay_shape: str = "cosine"  # how Muon's weight decay goes to 0: "cosine" or "linear"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"a run of {self.steps} steps trains nothing: ask for more tokens or a smaller batch")
        if not 0 <= self.warmdown_ratio <= 1:
            raise ConfigError(f"warmdown_ratio is {self.warmdown_ratio}: it is a share of the run, between 0 and 1")
        if self.decay_shape not in ("cosine", "linear"):
            raise ConfigError(f"decay_shape is {self.decay_shape!r}: it must be 'cosine' or 'linear'")

    @classmethod
    def for_generation(cls, steps: int, generation: str = "head", **overrides: Any) -> Schedule:
        """`generation`'s schedule over `steps` steps, then `overrides`."""
        if generation not in GENERATIONS:
            raise ConfigError(f"no such generation: {generation!r}; there are {', '.join(GENERATIONS)}")
        return cls(steps, **{**GENERATIONS[generation], **overrides})

    def at(self, step: int) -> StepHyper:
        """What the optimizer uses at `step`, counted from 0."""
        return StepHyper(lr_mult=self._lr(step), momentum=self._momentum(step), wd_mult=self._decay(step))

    @property
    def warmdown_steps(self) -> int:
        return round(self.warmdown_ratio * self.steps)

    def _lr(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = self.steps - step
        if left >= self.warmdown_steps:
            return 1.0
        return _between(self.final_lr, 1.0, left / self.warmdown_steps)

    def _momentum(self, step: int) -> float:
        if step < self.momentum_warmup:
            return _between(self.momentum_start, self.momentum, step / self.momentum_warmup)
        done = self.warmdown_steps - (self.steps - step)
        if done <= 0:
            return self.momentum
        return _between(self.momentum, self.momentum_final, done / self.warmdown_steps)

    def _decay(self, step: int) -> float:
        done = step / self.steps
        return 1.0 - done if self.decay_shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


GENERATIONS: dict[str, dict[str, Any]] = {
    "head": {},
    "feb": {
        "warmup_steps": 0,
        "warmdown_ratio": 0.5,
        "final_lr": 0.0,
        "momentum": 0.95,
        "momentum_warmup": 300,
        "momentum_final": 0.95,
        "decay_shape": "linear",
    },
}


def _between(start: float, end: float, share: float) -> float:
    return (1.0 - share) * start + share * end
