"""The cap while a run goes on: what was spent before, what is spent now, and the stop in time (job/plan/cap.py).

A stop for the budget is a first signal: training ends between two steps with a checkpoint, which is sealed and
uploaded, any other stage at once. Only the exit code is another one: 20, which nothing recovers from by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from job.errors import BudgetReached, InterruptedRun, SpeedrunError, UsageError
from job.plan.cap import Cap, Quote, must_stop
from job.reporter import Reporter
from job.run.supervise import Interrupts
from job.store.attempt import Record
from job.store.bill import billed

STOP_SECONDS = 600.0
"""that a stop for the budget gives the ranks: it was made in time"""
RECENT = 30
"""steps whose median is the measured one"""


class Budget(Reporter):
    """Of one attempt: passes reports on, and stops the run by `interrupts` when `check` finds it has to."""

    def __init__(
        self,
        cap: Cap,
        quote: Quote | None,
        record: Record,
        interrupts: Interrupts,
        reporter: Reporter,
        *,
        trained: bool,
    ) -> None:
        """record: with the attempt's first event and those of earlier attempts. quote: None where nothing bounds
        the run and nobody knows its price. trained: the model is finished.

        UsageError where the quote is above what is left of the cap, BudgetReached where the run had trained before.
        """
        self._began = time.monotonic()
        self._cap, self._quote, self._interrupts = cap, quote, interrupts
        self._reporter = reporter
        attempts = billed(record)
        self._attempts = len(attempts)
        self._allowed = cap.seconds(attempts)
        self._spent = sum(float(each.usd(each.seconds)) for each in attempts), sum(each.seconds for each in attempts)
        self._step = max(
            (event["step"] for event in (*record.checkpoints.values(), record.adopted) if event), default=0
        )
        self._paid_steps = bool(record.steps)
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._made, self._trained, self._reason = 0, trained, ""
        if quote is not None:
            self._admit(quote)

    def _admit(self, quote: Quote) -> None:
        if self._cap.price is not None:
            stages = [dataclasses.asdict(stage) for stage in quote.stages]
            self._reporter.emit("quote", stages=stages, price=dataclasses.asdict(self._cap.price))
        needed = quote.reserve if self._trained else max(quote.left(self._step), quote.reserve)
        if needed <= self._allowed:
            return
        if self._paid_steps or self._trained:
            raise BudgetReached(f"{self._cap} is nearly reached: {self._finish(needed)}")
        raise UsageError(
            f"{self._cap} does not pay for this run, which is quoted at {self._cap.amount(needed)} more"
            f" {self._source()} where {self._cap.amount(max(0.0, self._allowed))} are left: give more, or see"
            " `speedrun plan` for what takes less"
        )

    def emit(self, kind: str, **fields: Any) -> None:
        self._reporter.emit(kind, **fields)
        if kind == "train.step":
            self._step, self._made = fields["step"] + 1, self._made + 1
            self._recent.append(fields["ms"] / 1000)
            self._trained = self._quote is not None and self._step >= self._quote.steps
            self.check()

    def check(self) -> None:
        """Several times a second, and at every step."""
        if self._quote is None or self._reason or self._interrupts.count or math.isinf(self._allowed):
            return
        left = self._allowed - (time.monotonic() - self._began)
        seconds = statistics.median(self._recent) if self._recent else None
        why = must_stop(left, self._allowed, self._quote, self._step, seconds, self._made, trained=self._trained)
        if why is None:
            return
        left_steps = self._quote.steps - self._step
        if seconds is None:
            needed = self._quote.reserve if self._trained else self._quote.left(self._step)
        else:
            needed = self._quote.needed(self._step, seconds)
        found = "is reached" if why == "reached" else f"would be passed by the {left_steps:,} steps that are left"
        self._reason = f"{self._cap} {found}: {self._finish(needed)}"
        self._interrupts.announce("the budget", STOP_SECONDS)

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """What was interrupted by the budget ends as BudgetReached."""
        try:
            yield
        except InterruptedRun as error:
            raise self.explained(error) from None

    def explained(self, error: SpeedrunError) -> SpeedrunError:
        return BudgetReached(self._reason) if self._reason and isinstance(error, InterruptedRun) else error

    def _finish(self, needed: float) -> str:
        """What was spent, and the command that would finish: with a cap that pays for `needed` more seconds."""
        elapsed = time.monotonic() - self._began
        seconds = self._spent[1] + elapsed
        over = f" over {self._attempts} attempts" if self._attempts > 1 else ""
        words = []
        if self._cap.price is not None and self._cap.usd is not None:
            spent = self._spent[0] + elapsed / 3600 * self._cap.price.hour
            total = spent + needed / 3600 * self._cap.price.hour
            said = f"${spent:.2f} are spent{over} {self._source()}"
            words.append(f"--max-usd {max(math.ceil(1.05 * total), math.ceil(self._cap.usd)):g}")
        else:
            said = f"{seconds / 3600:.2f} hours are spent{over}"
        if self._cap.hours is not None:
            words.append(f"--max-hours {max(math.ceil(10.5 * (seconds + needed) / 3600) / 10, self._cap.hours):g}")
        return (
            f"{said}, and finishing takes about {needed / 60:.0f} minutes more ({self._cap.amount(needed)}); what is"
            f" sealed is kept, and the same command with {' '.join(words)} goes on from there"
        )

    def _source(self) -> str:
        price = self._cap.price
        return f"at ${price.hour:.2f} an hour ({price.source})" if price else "by the clock"
