"""The rest of a prepared set, made by a process of the supervisor's while training consumes its beginning.

    prepare stage     tokenizer, held-out rows, rows/00000                         -> begun
    this process      pulls, or fetches and packs, the row files that are missing  -> the set is whole
    ranks             Rows.take() waits for a row file that is not sealed yet

It is one more process of the pretrain stage (job/run/rank.py): it reports through the same pipe, its failure ends the
stage with its own exit code, and it ends with the supervisor. It and its workers are `nice`: they take the cores that
training leaves, so that no GPU waits for a rank that waits for a core.
"""

from __future__ import annotations

import os
import time

from job.errors import InterruptedRun, SpeedrunError
from job.run.prepare import count_leaks, prepare_rows
from job.run.processes import GRACE
from job.train.context import RankContext

NICENESS = 10


def main(context: RankContext) -> None:
    os.nice(NICENESS)
    try:
        prepared = prepare_rows(context, whole=True)
        context.reporter.send({"whole": prepared.id})  # the stage does not wait for what follows
        try:
            count_leaks(context.out, context.recipe(), prepared, context.reporter)
        except SpeedrunError as error:
            context.reporter.emit("warning", text=f"contaminated items were not counted: {error}")
    except InterruptedRun:
        time.sleep(GRACE)  # a scheduler signals the workers too: until then training saves, and this process is ended
        raise
