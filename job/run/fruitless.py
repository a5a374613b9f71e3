"""Deaths at every start: when exit code 75 would only have the machine rented again for nothing.

A rank that dies of a signal (a segmentation fault in a kernel, the watchdog's SIGABRT) ends its attempt with 75, and
whatever started the attempt starts the next one. With a broken device or build that goes on without end. So the
events of all attempts are folded into the deaths that nothing good came of:

    what an attempt's events say                              the row of deaths
    a stage sealed something that no attempt had sealed       those in that stage are forgotten
    a rank died, in a stage that sealed nothing new           one longer
    a rank died, after its stage had sealed something new     as it is
    a signal to the supervisor, another error, done           as it is
    no last event (the machine vanished)                      as it is

A row of three ends with exit code 15, or 10 where a device said that it is broken, and as long as it lasts every
further start makes one attempt and ends so again. New is, in training, a checkpoint beyond all earlier ones; in
evaluation, a task that was scored; in prepare, a tokenizer or row file (the held-out one too) that was made and not
pulled from the store.

`speedrun prepare` and `evaluate --hf` have no attempts in which deaths could be counted: their first one ends with 15.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from job.errors import InterruptedRun, PreflightError, SilentRankError, SpeedrunError
from job.store.attempt import read_events

LIMIT = 3
SILENCE = "silence"
GOES_ON = "what is sealed is kept, and the same command goes on from there"


@dataclasses.dataclass(frozen=True)
class Death:
    """A rank's end by a signal that was not the answer to a signal to the supervisor, by silence, or by its device."""

    stage: str
    rank: str
    """as a sentence calls it: "rank 0", "rank 3 on node 1" """
    signal: str
    """what it died of: a signal's name, SILENCE, or what the device said"""
    device: bool = False
    """whether a device said that it is broken"""

    def __str__(self) -> str:
        if self.device:
            return f"the device of {self.rank} failed in {self.stage} ({self.signal})"
        if self.signal == SILENCE:
            return f"{self.rank} of {self.stage} fell silent"
        hint = " (the system may be short of memory)" if self.signal == "SIGKILL" else ""
        return f"{self.rank} of {self.stage} was killed by {self.signal}{hint}"


class RankDied(InterruptedRun):
    """Exit code 75, for an attempt that a rank's death ended."""

    def __init__(self, sentence: str, death: Death, log: str) -> None:
        super().__init__(sentence)
        self.death, self.log = death, log
        self.noted = {"died": dataclasses.asdict(death)}


def deaths_in_a_row(events: Iterable[dict[str, Any]]) -> list[Death]:
    """The row of deaths after `events`, which come attempt by attempt (as `read_events` gives them)."""
    deaths: list[Death] = []
    seen: set[tuple[str, Any]] = set()
    furthest = 0
    for _, attempt in itertools.groupby(events, key=lambda event: event["attempt"]):
        fruitful: set[str] = set()
        for event in attempt:
            stage = None
            match event:
                case {"kind": "checkpoint.sealed", "rows": rows} if rows > furthest:
                    stage, furthest = "pretrain", rows
                case {"kind": "eval.task"} if not event.get("found"):
                    stage = "evaluate"
                case {"kind": "prepare.tokenizer" | "prepare.rows" as kind} if not event.get("pulled"):
                    part = kind, event.get("shard")
                    stage = "prepare" if part not in seen else None
                    seen.add(part)
                case {"kind": "attempt.ended", "died": died} if died["stage"] not in fruitful:
                    deaths.append(Death(**died))
            if stage:
                fruitful.add(stage)
                deaths = [death for death in deaths if death.stage != stage]
    return deaths


def judged(run: Path, attempt: int, died: RankDied) -> SpeedrunError:
    """What the running `attempt` ends with: `died`, or where its death makes the row too long SilentRankError (15),
    PreflightError (10) where a device was what failed."""
    ended = {"attempt": attempt, "kind": "attempt.ended", **died.noted}
    deaths = deaths_in_a_row([*read_events(run), ended])
    if len(deaths) < LIMIT:
        return died
    others = dict.fromkeys(str(death) for death in deaths[:-1] if death != died.death)
    before = f" (before it: {'; '.join(others)})" if others else ""
    error = (PreflightError if died.death.device else SilentRankError)(
        f"{died.death}, in the {ordinal(len(deaths))} attempt in a row that ended so and that sealed nothing new"
        f"{before}: starting again as it is will not help; see {died.log}, then take another machine or mend the cause;"
        " what is sealed is kept, and the same command makes one more attempt"
    )
    error.noted = died.noted
    return error


def without_attempts(died: RankDied) -> SpeedrunError:
    """What a command ends with that keeps no record of its attempts."""
    error = PreflightError if died.death.device else SilentRankError
    return error(f"{died.death}; what is sealed is kept, and the same command, typed again, goes on from there")


def ordinal(number: int) -> str:
    """3 -> "third", 11 -> "11th"."""
    words = {3: "third", 4: "fourth", 5: "fifth", 6: "sixth"}
    suffix = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return words.get(number, f"{number}{suffix}")
