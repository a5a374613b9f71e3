"""Text that every Python installation carries: the language reference in pydoc's topics, and the standard library's
sources.

Real prose and real code, on any machine, without a network. Each topic and each module is a document. Left out: tests,
other people's packages, and generated tables (character maps, HTML entities, locale aliases), which teach a language
model nothing. Documents are read in the order of the SHA-256 of their names: a fixed order in which prose and code, and
the packages of the library, are mixed, so that the first rows of a run resemble the last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from job.data.documents import Source, group
from job.errors import DataError

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
OTHERS = {"site-packages", "dist-packages", "lib-dynload"}
LEFT_OUT = OTHERS | {"test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
TABLES = {"html/entities.py", "stringprep.py", "locale.py"}
GENERATED = ("_sysconfigdata", "config-")
MOST_CHARS = 12_000_000
"""A bound on the text, should an installation carry more than any known one."""


@dataclasses.dataclass(frozen=True)
class EmbeddedShard:
    """Documents by name: `topic:NAME` or the path of a module within the standard library."""

    name: str
    size: int
    documents: tuple[str, ...]

    def texts(self) -> Iterator[str | None]:
        return map(read_document, self.documents)


def open_embedded() -> Source:
    """The installation's text. Its identity is the Python version and the SHA-256 of all of it."""
    digest = hashlib.sha256()
    names, sizes, characters = [], [], 0
    for name in sorted(_document_names(), key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = read_document(name)
        characters += len(text)
        if characters > MOST_CHARS:
            break
        encoded = text.encode()
        digest.update(f"{name}\n{len(encoded)}\n".encode() + encoded)
        names.append(name)
        sizes.append(len(encoded))
    if not names:
        raise DataError(
            "this Python installation carries no sources of its standard library; point --data to text of your own"
        )
    shards = [
        EmbeddedShard(f"python-{i:02d}", sum(sizes[run]), tuple(names[run])) for i, run in enumerate(group(sizes))
    ]
    identity = {"source": "embedded", "python": platform.python_version()}
    return Source(identity | {"documents": len(names), "sha256": digest.hexdigest()}, tuple(shards))


def read_document(name: str) -> str:
    """The text of one document by its name."""
    if name.startswith("topic:"):
        return _topics()[name.removeprefix("topic:")]
    file = LIBRARY / name
    try:
        with tokenize.open(file) as handle:
            return handle.read()
    except (OSError, SyntaxError, UnicodeError) as error:
        raise DataError(
            f"{file} cannot be read ({error}); repair the Python installation or point --data to other text"
        ) from error


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics


def _document_names() -> Iterator[str]:
    yield from (f"topic:{name}" for name in _topics())
    for folder, subfolders, files in os.walk(LIBRARY):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        for file in files:
            name = (Path(folder) / file).relative_to(LIBRARY)
            if name.suffix == ".py" and name.as_posix() not in TABLES and not name.parts[0].startswith(GENERATED):
                yield name.as_posix()
