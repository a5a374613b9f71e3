"""Print what the wheels of a pylock.toml weigh, packed: `python wheel_sizes.py pylock.toml` (`make sizes`).

Of each package the wheel counts that pip would take on 64-bit Linux with CPython 3.11.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)] + ["manylinux2014_x86_64", "linux_x86_64"]


def sizes(pylock: str) -> dict[str, int]:
    """Bytes by package. ValueError for a package without a wheel for that platform."""
    order = [*cpython_tags((3, 11), platforms=PLATFORMS), *compatible_tags((3, 11), "cp311", platforms=PLATFORMS)]
    rank: dict[Tag, int] = {tag: number for number, tag in reversed(list(enumerate(order)))}
    found = {}
    for package in tomllib.loads(pylock)["packages"]:
        fitting = {}
        for wheel in package["wheels"]:
            tags = parse_wheel_filename(wheel["url"].rpartition("/")[2])[3]
            if ranks := [rank[tag] for tag in tags if tag in rank]:
                fitting[min(ranks)] = wheel["size"]
        if not fitting:
            raise ValueError(f"{package['name']} has no wheel for 64-bit Linux and CPython 3.11")
        found[package["name"]] = fitting[min(fitting)]
    return found


if __name__ == "__main__":
    table = sizes(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for name, size in sorted(table.items(), key=lambda entry: -entry[1])[:10]:
        print(f"{size / 1e6:8.1f} MB  {name}")
    print(f"{sum(table.values()) / 1e9:8.2f} GB  all {len(table)} wheels")
