"""The optimizer's numbers: of one parameter group, and of one step. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StepHyper:
    """What the schedule says for one step: factor of all learning rates, Muon's momentum, factor of Muon's decay."""

    lr_mult: float = 1.0
    momentum: float = 0.95
    wd_mult: float = 1.0


@dataclass(frozen=True)
class GroupSpec:
    """One parameter group. AdamW reads betas and eps; Muon beta2 and the three switches, whose defaults are HEAD's.

    FEB: norm_factor 1.02, muon_eq and muon_plus off, beta2 0.95. AdamW's decay is constant, Muon's times wd_mult.
    """

    name: str
    kind: Literal["muon", "adamw"]
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-10
    beta2: float = 0.9
    norm_factor: float = 1.01
    muon_eq: bool = True
    muon_plus: bool = True
