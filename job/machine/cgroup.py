"""What the kernel allows this group of processes: a container's --memory and --cpus, a unit's or a batch system's
limits.

Both generations of control groups are read. In a container the group is mounted as the root of the tree, elsewhere it
lies at the path that /proc/self/cgroup names; where there is neither (macOS), nothing is known and None is returned.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
NO_LIMIT = 1 << 60
"""bytes; the first generation spells "no limit" as a number near 2^63"""


def read(controller: str, v2_file: str, v1_file: str, root: Path = ROOT, own: Path = OWN) -> str | None:
    """The text of this group's file of `controller`, whichever generation there is; None where there is none."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    places = []
    for _, names, path in lines:
        if controller in names.split(","):
            places += [root / controller / path.lstrip("/") / v1_file, root / controller / v1_file]
        elif not names:
            places += [root / path.lstrip("/") / v2_file, root / v2_file]
    return next((place.read_text() for place in places if place.is_file()), None)


def oom_kills() -> int | None:
    """How many processes of this group the kernel has killed for want of memory."""
    text = read("memory", "memory.events", "memory.oom_control")
    counts = dict(line.split() for line in (text or "").splitlines())
    return int(counts["oom_kill"]) if "oom_kill" in counts else None


def memory_limit() -> int | None:
    """Bytes that this group may use; None without a limit."""
    text = (read("memory", "memory.max", "memory.limit_in_bytes") or "max").strip()
    return int(text) if text != "max" and int(text) < NO_LIMIT else None


def memory_left() -> int | None:
    """Bytes that this group may still take, files that the kernel would drop from its cache among them; None without a
    limit."""
    limit, used = memory_limit(), read("memory", "memory.current", "memory.usage_in_bytes")
    if limit is None or used is None:
        return None
    stat = dict(line.split() for line in (read("memory", "memory.stat", "memory.stat") or "").splitlines())
    return limit - int(used) + int(stat.get("inactive_file", 0))


def cpu_quota() -> float | None:
    """Processors' worth of time that this group may use; None without a limit."""
    text = read("cpu", "cpu.max", "cpu.cfs_quota_us")
    period = read("cpu", "cpu.max", "cpu.cfs_period_us")
    if text is None or period is None:
        return None
    quota, period = text.split()[0], period.split()[-1]
    return int(quota) / int(period) if quota not in ("max", "-1") else None
