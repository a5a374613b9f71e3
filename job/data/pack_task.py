"""One sealed folder of rows: the work of one process."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.data.pack import PackCounts, pack, write_rows
from job.data.sources import Counts, Shard, Split, documents
from job.data.tokenizer import Tokenizer
from job.errors import DataError
from job.store.artifact_cache import Artifact
from job.store.sealed import sealing

if TYPE_CHECKING:
    from job.recipe.config import DataConfig

HELD_OUT_BYTES = 2 << 20
PROGRESS_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True)
class PackTask:
    """One sealed folder of rows: the documents of `shards` on one side of the split."""

    name: str
    path: Path
    kind: str
    made_from: dict[str, Any]
    shards: tuple[Shard, ...]
    tokenizer: Path
    split: Split
    data: DataConfig
    seq_len: int

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def artifact(self) -> Artifact:
        return Artifact(self.path, self.kind, self.made_from)

    def run(self, advance: Callable[[int], None]) -> dict[str, Any]:
        """Encode, pack and seal; the manifest's facts."""
        started = time.perf_counter()
        tokenizer = Tokenizer.load(self.tokenizer)
        counts, packed = Counts(), PackCounts()
        with sealing(self.path, kind=self.kind, made_from=self.made_from) as folder:
            texts = _advancing(self._texts(counts), advance)
            if self.kind == "val":
                texts = _kept(texts, folder.path / "held_out.jsonl")
            rows = pack(
                tokenizer.encode_documents(texts),
                row_tokens=self.seq_len + 1,
                bos=tokenizer.bos_id,
                split_long=self.data.split_long,
                counts=packed,
            )
            write_rows(folder.path / "rows.npy", rows, self.seq_len + 1, (self.data.seed, "stored", self.path.name))
            if self.kind == "val" and not packed.rows:
                raise self._too_small(packed)
            share = packed.cropped_tokens / max(1, packed.tokens)
            folder.facts |= {
                "shard": self.name,
                **dataclasses.asdict(packed),
                "bytes": counts.bytes,
                "skipped": counts.skipped,
                "other_side": counts.other_side,
                "crop_share": share,
            }
            return folder.facts | {"seconds": time.perf_counter() - started}

    def _texts(self, counts: Counts) -> Iterator[str]:
        for shard in self.shards:
            yield from documents(shard, self.split, held_out=self.kind == "val", counts=counts)

    def _too_small(self, packed: PackCounts) -> DataError:
        return DataError(
            f"the held-out text ({packed.documents} documents, {packed.tokens} tokens) does not fill one row of"
            f" {self.seq_len + 1}"
            " tokens; give more text, a larger data.val_fraction or a smaller model.seq_len"
        )


def _advancing(texts: Iterator[str], advance: Callable[[int], None]) -> Iterator[str]:
    """`texts`, telling `advance` of their characters now and then."""
    characters = 0
    for text in texts:
        yield text
        characters += len(text)
        if characters >= PROGRESS_BYTES:
            advance(characters)
            characters = 0
    advance(characters)


def _kept(texts: Iterator[str], file: Path) -> Iterator[str]:
    """`texts`, the first HELD_OUT_BYTES of them also written to `file`, whole documents."""
    left = HELD_OUT_BYTES
    with open(file, "w", encoding="utf-8") as handle:
        for text in texts:
            size = len(text.encode())
            if size <= left:
                handle.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                left -= size
            yield text
