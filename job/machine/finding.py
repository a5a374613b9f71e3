"""What a check of the machine came to: its name, a verdict, a sentence, and what to do about it."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Sequence

from job.errors import PreflightError


class Verdict(enum.StrEnum):
    OK = "ok"
    UNKNOWN = "unknown"
    """nobody says; never refused"""
    WARNED = "warned"
    SLOW = "slow"
    """refused where slowness costs money, unless --accept-slow"""
    REFUSED = "refused"


@dataclasses.dataclass(frozen=True)
class Finding:
    """`remedy` is empty where there is nothing to mend."""

    check: str
    verdict: Verdict
    said: str
    remedy: str = ""

    @property
    def sentence(self) -> str:
        return f"{self.check}: {self.said}" + (f"; {self.remedy}" if self.remedy else "")

    def line(self) -> str:
        """E.g. "slow     NVLink: no link is active; take another node"."""
        return f"{self.verdict:<8} {self.sentence}"


def refused(check: str, sentence: str) -> Finding:
    """That of an expected failure, whose sentence says what is wrong and, after a colon or semicolon, what to do."""
    parts = re.fullmatch(r"(.+)(?:: |; )(.+)", sentence, re.DOTALL)
    return Finding(check, Verdict.REFUSED, *(parts.groups() if parts else (sentence,)))


def refusal(findings: Sequence[Finding], *, accept_slow: bool) -> PreflightError | None:
    """The error of the first finding against the machine; one that cannot be accepted comes before one that can."""
    for verdict, accepting in ((Verdict.REFUSED, ""), (Verdict.SLOW, ", or accept it with --accept-slow")):
        found = next((finding for finding in findings if finding.verdict == verdict), None)
        if found and not (accept_slow and verdict == Verdict.SLOW):
            return PreflightError(found.sentence + accepting)
    return None
