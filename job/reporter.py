"""What a stage reports to: durable events for the record, progress for the eye."""

from __future__ import annotations

from typing import Any


class Reporter:
    """The silent reporter; the supervisor's and the ranks' reporters override both methods."""

    def emit(self, kind: str, **fields: Any) -> None:
        """Record the durable event `kind`; fields must be JSON-able."""

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        """Show that `done` of `total` units of `stage` are finished (display only, may be dropped)."""
