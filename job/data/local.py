"""Documents from files on disk: parquet (column `text`), jsonl or ndjson (key "text"), txt; and .gz and .zst of all
but parquet. Suffixes count in any case.

A txt file of prose is one long text; it is cut into documents at the first blank line after every TXT_CHARS characters
(at a line's end after twice as many), so that a single book can be split into training and validation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from job.data.documents import Source, group
from job.errors import DataError, SpeedrunError, first_line
from job.store.sealed import sha256_file

TXT_CHARS = 10_000
BATCH_DOCUMENTS = 256
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TEXT_PER_BYTE = 4
"""of a compressed file, estimated: its text is measured only as it is read"""


@dataclasses.dataclass(frozen=True)
class FileShard:
    """One file, or consecutive small ones; `size` is the bytes of its text (of its text column, for parquet).

    `files` have with each its size and time of change when it was hashed; DataError where they are others when its text
    has been read, which is then not the text of that hash.
    """

    name: str
    size: int
    files: tuple[tuple[Path, tuple[int, int]], ...]

    def texts(self) -> Iterator[str | None]:
        for file, hashed in self.files:
            with readable(file):
                yield from READERS[_kind(file)](file)
                if _version(file) != hashed:
                    raise DataError(f"{file} was changed while it was in use; run the same command again when it rests")


def open_local(paths: tuple[str, ...]) -> Source:
    """Files as shards. Every file is hashed and every parquet schema read now, so that most faults show at once."""
    files, left_out = text_files(paths)
    identity, sizes, versions = [], [], []
    for file in files:
        with readable(file):
            versions.append((file, _version(file)))
            sizes.append(_text_bytes(file))
            identity.append({"name": file.name, "size": file.stat().st_size, "sha256": sha256_file(file)})
    shards = []
    for run in group(sizes):
        members = files[run]
        name = members[0].name if len(members) == 1 else f"{members[0].name}..{members[-1].name}"
        shards.append(FileShard(name, sum(sizes[run]), tuple(versions[run])))
    return Source({"source": "local", "files": identity}, tuple(shards), left_out=tuple(left_out))


def text_files(paths: tuple[str, ...]) -> tuple[list[Path], list[str]]:
    """The files below `paths` that are read, and the names of others that are not; DataError where a path has none."""
    left_out: list[str] = []
    files = [file for path in paths for file in _files(Path(path), left_out)]
    if not files:
        raise DataError(
            "data.source is local but no path is given; point --data to a folder or to files that hold text"
        )
    return files, left_out


def _version(file: Path) -> tuple[int, int]:
    """What changes where the file does, as far as can be seen without reading it: its size, and when it was changed."""
    return file.stat().st_size, file.stat().st_mtime_ns


def _compression(file: Path) -> str | None:
    return COMPRESSIONS.get(file.suffix.lower())


def _kind(file: Path) -> str:
    """The key of READERS, or another suffix: of a compressed file the one below, except that parquet is never one."""
    if not _compression(file):
        return file.suffix.lower()
    inner = Path(file.stem).suffix.lower()
    return inner if inner != ".parquet" else ".parquet" + file.suffix


def _text_bytes(file: Path) -> int:
    if _kind(file) == ".parquet":
        return parquet_text_bytes(file)
    return file.stat().st_size * (TEXT_PER_BYTE if _compression(file) else 1)


def _files(path: Path, left_out: list[str]) -> list[Path]:
    """`path` itself, or a folder's own files (not its subfolders') in the order of their names.

    What else is in the folder, unless hidden, is added to `left_out`; a link of text to nowhere is a DataError.
    """
    suffixes = ", ".join(READERS)
    with readable(path):
        if path.is_dir():
            seen = sorted(file for file in path.iterdir() if not file.name.startswith("."))
            inside = [file for file in seen if _kind(file) in READERS and not file.is_dir()]
            left_out += [_shown(file.name) for file in sorted(set(seen).difference(inside))]
            for file in inside:
                _check(file)
            if not inside:
                raise DataError(
                    f"{path} has no {suffixes} file in it; point --data to a folder or to files that hold text"
                )
            return inside
        if not path.exists():
            raise DataError(f"{path} does not exist; point --data to a folder or to files that hold text")
    if _kind(path) not in READERS:
        raise DataError(f"{_shown(path)} is not one of {suffixes}; convert it or choose another file")
    _check(path)
    return [path]


def _check(file: Path) -> None:
    """DataError for a name that no record can hold, and for what is there by name alone or has no end."""
    if _shown(file) != str(file):
        raise DataError(f"the name {_shown(file)} is not UTF-8; rename the file")
    if not file.is_file():
        raise DataError(f"{file} is a link to nothing or no ordinary file; fetch it again or leave it out")


def _shown(name: Path | str) -> str:
    return str(name).encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to read `path`, and whatever pyarrow raises, into DataError."""
    try:
        yield
    except (SpeedrunError, MemoryError):
        raise
    except Exception as error:
        # pyarrow reports damage as ArrowInvalid, OSError, ArrowNotImplementedError, ...; line 1 says what it met
        reason = (getattr(error, "strerror", None) or first_line(error)).rstrip(".")
        raise DataError(f"{_shown(path)} cannot be read ({reason}); fetch it again or leave it out") from error


def read_parquet(file: Path) -> Iterator[str | None]:
    """Rows of the text column, a few hundred at a time whatever the size of the row groups."""
    import pyarrow.parquet as pq

    row = 0
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=BATCH_DOCUMENTS, columns=["text"], use_threads=False):
            for value in batch.column(0):
                row += 1
                yield _decoded(value.as_py, f"{file}, row {row}")


def parquet_text_bytes(file: Path) -> int:
    """Uncompressed bytes of the text column; DataError when there is no such column of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        schema = parquet.schema_arrow
        if "text" not in schema.names:
            raise DataError(
                f"{file} has no column text (its columns: {', '.join(schema.names)}); rename the column that holds"
                " the text"
            )
        if schema.names.count("text") > 1:
            raise DataError(f"{file} has several columns text; rename or drop all but the one that holds the text")
        kind = schema.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise DataError(f"{file}: its column text holds {kind}, not string; convert the column")
        groups = [parquet.metadata.row_group(index) for index in range(parquet.metadata.num_row_groups)]
        columns = [rows.column(index) for rows in groups for index in range(rows.num_columns)]
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")


def read_jsonl(file: Path) -> Iterator[str | None]:
    """The value of "text" of each line; null is a skipped document, anything else than a string an error."""
    for number, line in _lines(file):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}:{number} is not JSON ({error}); repair or remove the line") from None
        if not isinstance(value, dict) or not isinstance(value.get("text", 0), str | None):
            raise DataError(f'{file}:{number} is not an object with a string under "text"; repair or remove the line')
        if value["text"] is not None:
            # half of a surrogate pair can be written in JSON, not in UTF-8
            _decoded(value["text"].encode, f"{file}:{number}")
        yield value["text"]


def read_txt(file: Path) -> Iterator[str | None]:
    """Pieces of at least TXT_CHARS characters, cut at blank lines."""
    piece: list[str] = []
    characters = 0
    for _, line in _lines(file):
        piece.append(line)
        characters += len(line)
        if characters >= (TXT_CHARS if line.isspace() else 2 * TXT_CHARS):
            yield "".join(piece)
            piece, characters = [], 0
    yield "".join(piece) or None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Each line with its number, from 1."""
    offset = 0
    with _opened(file) as handle:
        for number, line in enumerate(handle, 1):
            yield number, _decoded(line.decode, f"{file}, line {number}", offset)
            offset += len(line)


def _opened(file: Path) -> io.BufferedReader:
    """Its bytes, decompressed."""
    compression = _compression(file)
    if compression is None:
        return open(file, "rb")
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(file), compression=compression))


def _decoded(decode: Callable[[], Any], where: str, offset: int | None = None) -> Any:
    """`decode()`, its Unicode error turned into DataError that names the place."""
    try:
        return decode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        place = where if offset is None else f"{where} (byte {offset + error.start})"
        raise DataError(f"{place} is not UTF-8 ({error.reason}); convert the file to UTF-8") from None


READERS: dict[str, Callable[[Path], Iterator[str | None]]] = {
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".txt": read_txt,
}
