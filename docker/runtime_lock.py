"""Print the part of a lock that the program itself needs: `python runtime_lock.py pyproject.toml requirements.lock`.

The locks hold the developers' tools too, and an image needs none of them. Who asked for a package stands under each
pin ("# via"); what the project's own dependencies lead to is kept, hashes and all, so that pip still checks every
file; so are the attention kernels (extra `attention`) where the lock has them, which is on CUDA. Standard library
only.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==[^\n]+\n(?:[ #][^\n]*\n)*", re.MULTILINE)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def runtime_part(pyproject: str, lock: str) -> str:
    """The pins of `lock` that the dependencies in `pyproject` lead to. KeyError for a dependency that the lock does
    not have."""
    pins = {canonical(match["name"]): match[0] for match in PIN.finditer(lock)}
    needs: dict[str, set[str]] = {}
    for name, pin in pins.items():
        asked_by = re.findall(r"^ +# +(?:via +)?([A-Za-z0-9._-]+)$", pin, re.MULTILINE)
        for parent in asked_by:
            needs.setdefault(canonical(parent), set()).add(name)
    project = tomllib.loads(pyproject)["project"]
    asked, kernels = project["dependencies"], project["optional-dependencies"]["attention"]
    wanted, optional = (
        [canonical(re.match(r"[A-Za-z0-9._-]+", line)[0]) for line in lines] for lines in (asked, kernels)
    )
    wanted += [name for name in optional if name in pins]
    kept: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in kept:
            kept.add(name)
            wanted.extend(needs.get(name, ()))
    return "".join(pins[name] for name in sorted(kept))


if __name__ == "__main__":
    sys.stdout.write(runtime_part(*(Path(argument).read_text(encoding="utf-8") for argument in sys.argv[1:3])))
