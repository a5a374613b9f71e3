"""How much memory the trainer of the tokenizer needs, and how much there is."""

from __future__ import annotations

from pathlib import Path

from job.errors import OutOfMemoryError
from job.reporter import Reporter

BASE_BYTES = 40e6
BYTES_AT_60_MB, EXPONENT = 110e6, 0.7
CGROUP = Path("/sys/fs/cgroup")


def training_bytes(characters: int) -> int:
    """Estimated memory of training on so many characters, beyond what the process has. It goes with the number of
    different words, which grows slower than the text (Heaps' law): measured 62, 96 and 109 MB for 15, 30 and 60 MB of
    English (tests/bench/bench_data.py), an exponent of 0.41; text of the web has more rare words, so 0.7 is assumed."""
    return int(BASE_BYTES + BYTES_AT_60_MB * (characters / 60e6) ** EXPONENT)


def available_bytes() -> int | None:
    """Memory that this process may still take: the system's, or its control group's if that is less; None where nobody
    says."""
    found = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
        found.append(int((CGROUP / "memory.max").read_text()) - int((CGROUP / "memory.current").read_text()))
    except (OSError, ValueError, KeyError):  # no Linux, no control group, or one without a limit ("max")
        pass
    return min(found, default=None)


def check_training(characters: int, reporter: Reporter) -> None:
    """Say how much memory the training will take; OutOfMemoryError when that is more than there is."""
    needed, available = training_bytes(characters), available_bytes()
    reporter.emit("prepare.memory", stage="tokenizer", estimated_bytes=needed, available_bytes=available)
    if available is not None and needed > available:
        raise OutOfMemoryError(
            f"training the tokenizer on {characters:,} characters takes about {needed / 1e9:.1f} GB of memory and"
            f" {available / 1e9:.1f} GB"
            " are free; lower data.tokenizer_chars or take a machine with more memory"
        )
