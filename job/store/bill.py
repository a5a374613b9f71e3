"""What the attempts of a run are paid for: seconds of machines, from their boot to their teardown, over all attempts.

    boot ----------- first event ------- last event ------ teardown
         `before`                `running`          `after`

A machine is paid from its boot, which is not its first attempt's start: booting, pulling the image and setting up
SkyPilot's runtime take minutes in every attempt that begins on a new machine. Where two attempts ran on one boot, the
time between them was paid too. Of a rented machine whose boot nobody knows, or that was up for long when the run came
to it, the most that provisioning takes is counted; of one that nobody rented, nothing.
"""

from __future__ import annotations

import dataclasses
from decimal import Decimal

from job.store.attempt import Life, Record

PROVISIONING = 360.0, 720.0
"""seconds from a machine's boot to the first line of ours, least and most; a guess until somebody measures it"""
LONG_UP = 3600.0
"""seconds of a boot that is too long ago to have been for this run"""
TEARDOWN = 120.0
"""seconds that an idle machine stays: `autostop` of sky/*.yaml"""


@dataclasses.dataclass(frozen=True)
class Billed:
    """One attempt; seconds."""

    life: Life
    before: float
    running: float
    after: float
    hour: float | None
    """dollars an hour, None where no price was known"""
    known: bool
    """whether `before` follows from the machine's boot"""

    @property
    def seconds(self) -> float:
        return self.before + self.running + self.after

    def usd(self, seconds: float) -> Decimal:
        """Exactly what so much of it costs; 0 without a price."""
        return Decimal(str(self.hour or 0)) * Decimal(repr(round(seconds, 3))) / 3600


def billed(record: Record) -> list[Billed]:
    """Of each attempt, in order. One that vanished is paid to its last event."""
    lives = record.attempts
    return [_billed(life, lives[i - 1] if i else None, lives[i + 1 : i + 2]) for i, life in enumerate(lives)]


def _billed(life: Life, last: Life | None, following: list[Life]) -> Billed:
    boot, hour = life.first.get("boot"), (life.first.get("price") or {}).get("hour")
    if last and _same_machine(last, life):
        before, known = max(0.0, life.start - last.end), True
    elif boot and boot["up_s"] <= LONG_UP:
        before, known = boot["up_s"], True
    else:
        before, known = PROVISIONING[1] if life.first.get("rented") else 0.0, False
    torn_down = (
        life.first.get("rented")
        and life.exit_code is not None
        and not any(_same_machine(life, other) for other in following)
    )
    return Billed(life, before, life.end - life.start, TEARDOWN if torn_down else 0.0, hour, known)


def _same_machine(one: Life, other: Life) -> bool:
    boots = [life.first.get("boot") or {} for life in (one, other)]
    return "id" in boots[0] and boots[0]["id"] == boots[1].get("id")
