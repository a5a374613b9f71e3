"""What the kernel allows this group of processes: a container's --memory and --cpus, a unit's or batch system's limits.

Both generations of control groups are read. In a container the group is mounted as the root of the tree, elsewhere it
lies at the path that /proc/self/cgroup names, and every group around it limits it as well (a batch system's job, a
user's slice); where there is neither (macOS), nothing is known and None is returned.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
NO_LIMIT = 1 << 60
"""bytes; the first generation spells "no limit" as a number near 2^63"""
MEMORY = ("memory.max", "memory.limit_in_bytes")
"""the limit's file in the second generation, and in the first"""


def read(controller: str, *files: tuple[str, str]) -> list[list[str]]:
    """The texts of `files` (each by its names in the second and in the first generation), "" for one that is not there:
    of this group, then of those around it, as far as they have the first of `files`."""
    try:
        lines = [line.split(":", 2) for line in OWN.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, names, path in lines:
        if controller in names.split(","):
            tree, generation = ROOT / controller, 1
        elif not names:
            tree, generation = ROOT, 0
        else:
            continue
        group = tree / path.lstrip("/")
        for folder in (each for each in (group, *group.parents) if each.is_relative_to(tree)):
            places = [folder / names[generation] for names in files]
            found.append([place.read_text() if place.is_file() else "" for place in places])
    return [texts for texts in found if texts[0]]


def oom_kills() -> int | None:
    """How many processes of this group the kernel has killed for want of memory."""
    [text] = next(iter(read("memory", ("memory.events", "memory.oom_control"))), [""])
    counts = dict(line.split() for line in text.splitlines())
    return int(counts["oom_kill"]) if "oom_kill" in counts else None


def memory_limit() -> int | None:
    """Bytes that this group may use; None without a limit."""
    return min((limit for [text] in read("memory", MEMORY) if (limit := _bytes(text)) is not None), default=None)


def memory_left() -> int | None:
    """Bytes that this group may still take, droppable file cache among them; None without a limit."""
    used_files, stat_files = ("memory.current", "memory.usage_in_bytes"), ("memory.stat", "memory.stat")
    left = []
    for limit_text, used, stat_text in read("memory", MEMORY, used_files, stat_files):
        limit, stat = _bytes(limit_text), dict(line.split() for line in stat_text.splitlines())
        if limit is not None and used:
            cached = stat.get("total_inactive_file", stat.get("inactive_file", 0))  # the first generation has a total
            left.append(limit - int(used) + int(cached))
    return min(left, default=None)


def cpu_quota() -> float | None:
    """Processors' worth of time that this group may use; None without a limit."""
    texts = read("cpu", ("cpu.max", "cpu.cfs_quota_us"), ("cpu.max", "cpu.cfs_period_us"))
    limits = [(quota.split()[0], period.split()[-1]) for quota, period in texts if period]
    return min((int(quota) / int(period) for quota, period in limits if quota not in ("max", "-1")), default=None)


def _bytes(limit: str) -> int | None:
    return int(limit) if limit.strip() != "max" and int(limit) < NO_LIMIT else None
