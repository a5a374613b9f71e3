"""What a run may cost, and when it has to stop so as not to pass that. Seconds and dollars in, a sentence out.

    |--- spent ---|----------- steps that are left -----------|--- reserve ---|
    0           now                                    end of training       end     <= the cap, or the run stops

The reserve is CORE, report, upload and teardown, at the most that the quote says: what makes a trained model a result.

    before the first step     a quote above what is left is refused, at its middle
    50 steps in               a forecast above it, by the measured step, ends the run: so few steps are cheap to lose
    until three quarters      the same with SLACK, since a forecast wavers
    in the last quarter       only when the reserve itself would be touched
    once it is trained        only when nothing but the teardown could still be paid

Cost is counted over all attempts (job/store/bill.py), at the price of each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from job.machine.cloud import rental
from job.machine.gpus import CUDA_NAMES
from job.machine.host import Machine
from job.plan import money
from job.plan.prices import Price, check_limits, price_here
from job.plan.quote import make_plan
from job.recipe.config import Recipe
from job.store.bill import TEARDOWN, Billed

FORECAST_AFTER = 50
"""steps of this attempt before the first forecast"""
SLACK = 0.03
"""by how much a later forecast has to pass the cap, as a share of it"""
LAST_QUARTER = 0.75
RESERVED = (money.SCORE, money.REPORT, money.IDLE)


@dataclasses.dataclass(frozen=True)
class Cap:
    """What is allowed, None where nothing bounds it, and the price that counts dollars."""

    usd: float | None
    hours: float | None
    price: Price | None

    def seconds(self, attempts: Sequence[Billed]) -> float:
        """That both limits still allow on this machine after `attempts`."""
        left = math.inf if self.hours is None else self.hours * 3600 - sum(each.seconds for each in attempts)
        if self.usd is not None and self.price is not None:
            spent = sum(float(each.usd(each.seconds)) for each in attempts)
            left = min(left, (self.usd - spent) / self.price.hour * 3600)
        return left

    def __str__(self) -> str:
        said = [f"--max-usd {self.usd:g}"] if self.usd is not None else []
        return " and ".join(said + ([f"--max-hours {self.hours:g}"] if self.hours is not None else []))

    def sentence(self, quote: Quote) -> str:
        """What the run is quoted at, and what is allowed."""
        low, high = money.total(quote.stages)
        said = f"quote: {low:.0f} to {high:.0f} minutes with boot and teardown"
        if self.price:
            said += f", {self.amount(60 * low)} to {self.amount(60 * high)} at ${self.price.hour:.2f} an hour"
            said += f" ({self.price.source})"
        return said + (f"; allowed: {self}" if str(self) else "; nothing bounds it: --max-usd")

    def amount(self, seconds: float) -> str:
        """What so much costs here, in the cap's own units."""
        if self.price is None:
            return f"{seconds / 3600:.2f} hours"
        return f"${seconds / 3600 * self.price.hour:.2f}"


UNBOUNDED = Cap(None, None, None)


@dataclasses.dataclass(frozen=True)
class Limits:
    """The options of the command line: dollars, hours, and dollars an hour of all nodes, exactly or at most."""

    usd: float | None = None
    hours: float | None = None
    price: float | None = None
    price_at_most: float | None = None

    def here(self, gpus: int, nodes: int) -> Cap:
        """On `nodes` machines of `gpus` GPUs as this one; UsageError for a limit or price that cannot be used."""
        price = price_here(self.price, self.price_at_most, gpus=gpus, nodes=nodes)
        check_limits(self.usd, self.hours, price)
        return Cap(self.usd, self.hours, price)

    def words(self) -> list[str]:
        """The options again, for a command that is started in turn."""
        options = {"--max-usd": self.usd, "--max-hours": self.hours, "--price": self.price}
        options |= {"--price-at-most": self.price_at_most}
        return [word for option, value in options.items() if value is not None for word in (option, f"{value:g}")]


@dataclasses.dataclass(frozen=True)
class Quote:
    """The stages that a whole run takes, and its steps."""

    stages: Sequence[money.Stage]
    steps: int

    def _middle(self, names: Sequence[str]) -> float:
        return sum(30 * (stage.low + stage.high) for stage in self.stages if stage.name in names)

    @classmethod
    def of(cls, recipe: Recipe, machine: Machine, nodes: int) -> Quote:
        """On `nodes` machines as this one; a GPU that nobody published a run on is planned as an H100, and several
        nodes as if they shared the steps without loss."""
        named = CUDA_NAMES.get(machine.name, "h100") if machine.gpus else "cpu"
        plan = make_plan(recipe, named, machine.gpus or None)
        if plan.on_node is None:
            stages = money.on_a_cpu(list(plan.cpu_minutes.values()), rented=rental() is not None)
        else:
            stages = [
                dataclasses.replace(stage, low=stage.low / nodes, high=stage.high / nodes)
                if stage.name in (money.UNTIMED, money.TRAINING)
                else stage
                for stage in plan.on_node.stages
            ]
        return cls(stages, plan.derived.steps)

    @property
    def reserve(self) -> float:
        """Seconds."""
        return sum(60 * stage.high for stage in self.stages if stage.name in RESERVED)

    def left(self, step: int) -> float:
        """Seconds, at the middle, that a start at `step` has before it, its boot apart."""
        low, high = money.total(self.stages)
        done = self._middle((money.BOOT, money.TEXT) if step else (money.BOOT,))
        done += step / self.steps * self._middle((money.UNTIMED, money.TRAINING, money.VALIDATION, money.CHECKPOINTS))
        return 30 * (low + high) - done

    def needed(self, step: int, seconds: float) -> float:
        """Seconds after `step` steps: those that are left, of `seconds` each, what is around them, and the reserve."""
        around = (1 - step / self.steps) * self._middle((money.VALIDATION, money.CHECKPOINTS))
        return (self.steps - step) * seconds + around + self.reserve


def must_stop(
    left: float, allowed: float, quote: Quote, step: int, seconds: float | None, made: int, *, trained: bool
) -> str | None:
    """ "forecast" or "reached" where the run has to stop now, else None. All in seconds.

    left: that the cap still allows. allowed: that it allowed at the start of this attempt. step: how many of the run's
    are made. seconds: the measured ones of a step, None before the first. made: steps of this attempt. trained: the
    model is finished, and what is left is what was reserved.
    """
    if left <= (TEARDOWN if trained else quote.reserve):
        return "reached"
    if trained or seconds is None or made < FORECAST_AFTER or step >= LAST_QUARTER * quote.steps:
        return None
    slack = 0.0 if made == FORECAST_AFTER else SLACK * allowed
    return "forecast" if quote.needed(step, seconds) > left + slack else None
