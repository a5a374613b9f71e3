"""The clock of silence: a stage whose processes all stand still is ended, and the one that holds up the rest is named.

Ranks wait for each other in collectives, so that one that hangs silences all. Each says what it is at, a beat
(job/reporter.py), whenever something begins: a step, the exchange of its gradients, a batch. A beat costs no
collective, no synchronisation and no system call; a thread of the rank sends it on, once a second where it is new.

When no rank has said anything for the stage's limit, all are asked where they are, which a thread of theirs answers
also while a collective blocks:

    does not answer                          a process that was stopped, else one whose interpreter is held: named
    answers, and waits for nobody            while others wait for it: named
    all wait                                 a collective that does not end: all are named, on several nodes only when
                                             no other node has named one

The process that prepares rows beside training has a clock of its own: ranks that wait for rows say so, and are not
silent. Each process writes into its log the stack of its threads, and a rank its last collectives. Then all are killed,
and the run ends with 75 as after a death (job/run/fruitless.py): the third in a row that sealed nothing new ends with
15.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence

from job.console import Console
from job.report.words import duration
from job.reporter import LONG
from job.run.fruitless import GOES_ON, SILENCE, Death, RankDied
from job.run.processes import LocalRank

SECONDS = 300.0
"""seconds without a word from any rank, unless the recipe says otherwise (train.silence_seconds)"""
ANSWER = 3.0
"""seconds that a process has to say where it is, and to write its stack"""
ELSEWHERE = 20.0
"""seconds that other nodes have to say which of their ranks it is"""
STILL_EVERY = 60.0
"""seconds between two lines on what takes long"""


class SilenceClock:
    """Looks at the processes of one stage several times a second."""

    def __init__(
        self, stage: str, ranks: Sequence[LocalRank], seconds: float, console: Console, *, alone: bool = True
    ) -> None:
        """alone: no other node has ranks of this stage."""
        self._stage, self._ranks, self._seconds, self._console = stage, ranks, seconds, console
        self._elsewhere = 0.0 if alone else ELSEWHERE
        self._said = time.monotonic()

    def check(self, listen: Callable[[], None]) -> None:
        """RankDied when all have been silent for too long; `listen` takes what they say.

        On a terminal or in a log a line appears at least every STILL_EVERY seconds.
        """
        running = [rank for rank in self._ranks if rank.poll() is None]
        if not running:
            return
        now, last = time.monotonic(), max(running, key=lambda rank: rank.progressed)
        silent = now - last.progressed
        if now - max(self._said, self._console.printed) >= STILL_EVERY:
            self._said = now
            self._console.say(f"{self._stage}: {last.doing.what}, nothing new for {duration(int(silent))}")
        limit = self._seconds * (LONG if any(rank.doing.long for rank in running) else 1)
        if silent <= limit:
            return
        mute = self._ask(running, listen)
        late = [rank for rank in mute if rank.is_stopped()] or mute
        late = late or [rank for rank in running if not rank.doing.waits]
        if late or silent > limit + self._elsewhere:
            raise self._error(running, late or running, mute, silent)

    def _ask(self, running: Sequence[LocalRank], listen: Callable[[], None]) -> list[LocalRank]:
        """Those that do not answer where they are."""
        asked = time.monotonic()
        for rank in running:
            rank.tell({"do": "beat"})
        while time.monotonic() - asked < ANSWER and any(rank.heard < asked for rank in running):
            listen()
        return [rank for rank in running if rank.heard < asked]

    def _error(
        self, running: Sequence[LocalRank], named: Sequence[LocalRank], mute: Sequence[LocalRank], silent: float
    ) -> RankDied:
        for rank in running:
            rank.signal(signal.SIGUSR1)
            rank.signal(signal.SIGCONT)  # one that was stopped writes its stack too
        time.sleep(1.0)
        names = " and ".join(rank.name for rank in named[:3]) + (" and more" if len(named) > 3 else "")
        death = Death(self._stage, names, SILENCE)
        at = f"{'it last said' if named[0] in mute else 'at'}: {named[0].doing.what}"
        sentence = (
            f"{death} ({at}), and no rank got on for {silent:.0f} s (train.silence_seconds={self._seconds:g}); the"
            f" stacks are in {named[0].log} and beside it; {GOES_ON}"
        )
        return RankDied(sentence, death, named[0].log)
