"""The text that a recipe names: what the Python installation carries, files on disk, or a dataset of the hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from job.data import embedded, hub, local
from job.data.documents import Shard, Source
from job.errors import UsageError
from job.recipe.config import DataConfig
from job.store.stores import Store


def open_source(data: DataConfig, out: Path, store: Store | None = None) -> Source:
    """The text that `data` names; what has to be fetched comes below `out`/text, at the commit that `store` has
    recorded.

    Raises DataError when it is not there or cannot be what it says.
    """
    if data.source in hub.DATASETS:
        if data.max_chars:
            raise UsageError(
                f"data.max_chars={data.max_chars} cannot be used with {data.source}: of a named dataset a run takes"
                " the shards it needs; give 0"
            )
        return hub.open_hub(data.source, out / "text", store)
    source = local.open_local(data.paths) if data.source == "local" else embedded.open_embedded()
    return limit(source, data.max_chars) if data.max_chars else source


@dataclasses.dataclass(frozen=True)
class Head:
    """The first `count` documents of a shard; `size` is scaled for progress only."""

    name: str
    size: int
    shard: Shard
    count: int

    def texts(self) -> Iterator[str | None]:
        for index, text in enumerate(self.shard.texts()):
            if index == self.count:
                return
            yield text


def limit(source: Source, max_chars: int) -> Source:
    """The documents from the start of `source` that fit into `max_chars` characters, whole."""
    left = max_chars
    shards: list[Shard] = []
    for shard in source.shards:
        count, characters, whole = _documents_within(shard, left)
        if not whole:
            shards.append(Head(shard.name, min(shard.size, characters), shard, count))
            break
        shards.append(shard)
        left -= characters
    return dataclasses.replace(source, shards=tuple(shards))


def _documents_within(shard: Shard, max_chars: int) -> tuple[int, int, bool]:
    """How many documents of `shard` fit, their characters, and whether that is all of it."""
    count = characters = 0
    for text in shard.texts():
        length = len(text or "")
        if characters + length > max_chars:
            return count, characters, False
        count, characters = count + 1, characters + length
    return count, characters, True
