"""Tables as Parquet: columns `path`, `height`, `width`, and a list of numbers an image for each array.

Rows come and go in groups of some megabytes. Numbers are stored as they are, neither compressed nor by a dictionary:
they hardly shrink, and a file cannot hold more rows than its size allows.

The footer, which says where everything is, has a SHA-256 of its own: pyarrow may abort the process when the footer is
damaged.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from dinojax.documents import whole_file
from dinojax.errors import UserError
from experiments.embedding.layout import (
    DOCUMENT,
    PATHS,
    SIZES,
    Chunk,
    Chunks,
    Found,
    Layout,
    Seal,
    damaged,
    empty,
    not_a_table,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_GROUP_BYTES = 2**25
_SIDES = ("height", "width")
_FOOTER = b"dinojax_footer_sha256"
_HEX_DIGITS = 64
# In the footer: the key; a field of bytes, 64 of them. Source: Thrift's compact protocol.
_FOOTER_MARK, _MAGIC = _FOOTER + bytes([0x18, _HEX_DIGITS]), b"PAR1"
_PLAIN = {"PLAIN", "RLE", "BIT_PACKED"}  # the last two are of the levels of lists


def write(path: Path, layout: Layout, chunks: Chunks) -> None:
    """Writes a table; see `table.write_chunks`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, seal = _schema(layout), Seal(layout)
    options: dict[str, Any] = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}
    with whole_file(path) as file:
        with pq.ParquetWriter(file, schema, **options) as writer:
            for group in _groups(chunks((PATHS, *layout.columns))):
                batches = []
                for chunk in group:
                    seal.add(chunk)
                    batches.append(_batch(chunk, schema))
                table = pa.Table.from_batches(batches, schema)
                writer.write_table(table, row_group_size=max(1, len(table)))
            writer.add_key_value_metadata({DOCUMENT: seal.document(), _FOOTER.decode(): "0" * _HEX_DIGITS})
        seal_footer(file)


def seal_footer(file: BinaryIO) -> None:
    """Replaces the zeros in the footer of a complete file by the hash of that footer."""
    start, footer = _footer(file)
    place = footer.index(_FOOTER_MARK) + len(_FOOTER_MARK)
    file.seek(start + place)
    file.write(_hash(footer, place).encode())
    file.seek(0, os.SEEK_END)


def read_document(path: Path) -> Found:
    """The document of a table.

    Raises:
        UserError: it is not a table, or is damaged.
    """
    with _opened(path) as file:
        return _document(file, path)


def read_columns(path: Path, layout: Layout, names: Sequence[str]) -> dict[str, Any]:
    """Columns by name; see `Chunk`.

    Raises:
        UserError: the file is damaged.
    """
    with _opened(path) as file:
        _check_groups(file, path, layout)
        found: dict[str, Any] = {name: [] if name == PATHS else empty(layout, name, path) for name in names}
        columns = [column for name in names for column in {PATHS: ("path",), SIZES: _SIDES}.get(name, (name,))]
        start = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns)
            rows = slice(start, start + len(table))
            for name in names:
                if name == PATHS:
                    found[PATHS] += table.column("path").to_pylist()
                else:
                    found[name][rows] = _numbers(table, name).reshape(-1, *layout.columns[name].shape)
            start = rows.stop
        return found


def _footer(file: BinaryIO) -> tuple[int, bytes]:
    """Where the footer starts, and the footer.

    Raises:
        ValueError: it is not a Parquet file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    start = size - 8 - int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or start < len(_MAGIC):
        raise ValueError("it is not a Parquet file")
    file.seek(start)
    return start, file.read(size - 8 - start)


def _hash(footer: bytes, place: int) -> str:
    """The hash of a footer that has zeros where the hash is."""
    return hashlib.sha256(footer[:place] + b"0" * _HEX_DIGITS + footer[place + _HEX_DIGITS :]).hexdigest()


def _check_footer(path: Path) -> None:
    try:
        with path.open("rb") as file:
            _, footer = _footer(file)
        place = footer.index(_FOOTER_MARK) + len(_FOOTER_MARK)
    except (OSError, ValueError) as error:
        raise not_a_table(path) from error
    if footer[place : place + _HEX_DIGITS] != _hash(footer, place).encode():
        raise damaged(path, "its footer is damaged, or another program wrote it")


def _schema(layout: Layout) -> "pa.Schema":
    import pyarrow as pa

    def numbers(name: str) -> "pa.DataType":
        column = layout.columns[name]
        return pa.list_(pa.field("item", pa.from_numpy_dtype(column.dtype), nullable=False), column.values)

    fields = [("path", pa.string()), *((side, pa.int32()) for side in _SIDES)]
    fields += [(name, numbers(name)) for name in layout.columns if name != SIZES]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


def _groups(chunks: Iterator[Chunk]) -> Iterator[list[Chunk]]:
    """The same chunks, some megabytes at a time, so that a file does not fall into many small pieces."""
    group, held = [], 0
    for chunk in chunks:
        group.append(chunk)
        held += sum(values.nbytes for values in chunk.values() if isinstance(values, np.ndarray))
        if held >= _GROUP_BYTES:
            yield group
            group, held = [], 0
    if group:
        yield group


def _batch(chunk: Chunk, schema: "pa.Schema") -> "pa.RecordBatch":
    import pyarrow as pa

    sides = dict(zip(_SIDES, np.ascontiguousarray(chunk[SIZES].T)))
    columns = []
    for field in schema:
        if field.name == "path":
            columns.append(pa.array(chunk[PATHS], field.type))
        elif field.name in sides:
            columns.append(pa.array(sides[field.name], field.type))
        else:
            values = pa.array(np.ascontiguousarray(chunk[field.name]).reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(values, type=field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _numbers(table: "pa.Table", name: str) -> np.ndarray:
    if name == SIZES:
        return np.stack([table.column(side).to_numpy() for side in _SIDES], axis=1)
    return table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)


@contextmanager
def _opened(path: Path) -> Iterator["pq.ParquetFile"]:
    """A file that is being read, whose errors are a `UserError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _check_footer(path)
    try:
        opened = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise not_a_table(path) from error
    try:
        with opened as file:
            yield file
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError) as error:
        raise damaged(path, " ".join(str(error).split()) or type(error).__name__) from error


def _document(file: "pq.ParquetFile", path: Path) -> Found:
    stored: Mapping[bytes, bytes] = file.metadata.metadata or {}
    if DOCUMENT.encode() not in stored:
        raise not_a_table(path)
    return Found.of_text(stored[DOCUMENT.encode()].decode("utf-8", "replace"), path)


def _check_groups(file: "pq.ParquetFile", path: Path, layout: Layout) -> None:
    """Raises a `UserError` for a file that `write` did not make, whose columns could unpack to any size."""
    meta = file.metadata
    if meta.num_rows != layout.rows:
        raise damaged(path, f"it holds {meta.num_rows:,} rows, not {layout.rows:,}")
    held = set(file.schema_arrow.names)
    missing = {"path", *_SIDES, *layout.columns} - {SIZES} - held
    if missing:
        raise damaged(path, f"it lacks the column {min(missing)}")
    for group in range(meta.num_row_groups):
        for number in range(meta.num_columns):
            column = meta.row_group(group).column(number)
            if column.compression != "UNCOMPRESSED" or not set(column.encodings) <= _PLAIN:
                raise damaged(path, "another program has compressed its columns")
