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

A row of three ends with exit code 15, and as long as it lasts every further start makes one attempt and ends so again.
New is, in training, a checkpoint beyond all earlier ones; in evaluation, a task that was scored; in prepare, a
tokenizer or row file (the held-out one too) that was made and not pulled from the store.

`speedrun prepare` and `evaluate --hf` have no attempts in which deaths could be counted: their first one ends with 15.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from job.errors import InterruptedRun, SilentRankError, SpeedrunError
from job.store.attempt import read_events

LIMIT = 3


@dataclasses.dataclass(frozen=True)
class Death:
    """A rank's end by a signal that was not the answer to a signal to the supervisor."""

    stage: str
    rank: str
    """as a sentence calls it: "rank 0", "rank 3 on node 1" """
    signal: str


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
    """What the running `attempt` ends with: `died` itself, or SilentRankError when its death makes the row too long."""
    ended = {"attempt": attempt, "kind": "attempt.ended", **died.noted}
    deaths = deaths_in_a_row([*read_events(run), ended])
    if len(deaths) < LIMIT:
        return died
    last = died.death
    others = dict.fromkeys(f"{d.rank} of {d.stage} by {d.signal}" for d in deaths[:-1] if d != last)
    before = f" (before it {', '.join(others)})" if others else ""
    error = SilentRankError(
        f"{last.rank} of {last.stage} died of {explained(last.signal)}, in the {ordinal(len(deaths))} attempt in a row"
        f" that a death ended and that sealed nothing new{before}: starting again as it is will not help; see"
        f" {died.log}, then take another machine or mend the cause; what is sealed is kept, and the same command makes"
        " one more attempt"
    )
    error.noted = died.noted
    return error


def without_attempts(died: RankDied) -> SilentRankError:
    """What a command ends with that keeps no record of its attempts."""
    death = died.death
    return SilentRankError(
        f"{death.rank} of {death.stage} died of {explained(death.signal)}; what is sealed is kept, and the same"
        " command, typed again, goes on from there"
    )


def explained(signal: str) -> str:
    """A signal's name, with what it often means."""
    return f"{signal} (the system may be short of memory)" if signal == "SIGKILL" else signal


def ordinal(number: int) -> str:
    """3 -> "third", 11 -> "11th"."""
    words = {3: "third", 4: "fourth", 5: "fifth", 6: "sixth"}
    suffix = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return words.get(number, f"{number}{suffix}")
