"""The export stage of a run: its finished model beside it, `runs/<id>/export`."""

from __future__ import annotations

from job.inference.export import export
from job.inference.sources import open_source
from job.store.checkpoint_folder import final_checkpoint
from job.train.context import RankContext


def main(context: RankContext) -> None:
    """The first rank's work; the others have none."""
    if context.rank:
        return
    assert context.run
    final = final_checkpoint(context.run, context.rows_of_the_run(), verify=False)
    export(open_source(final.path), context.run / "export", "other", context.reporter.beat)
