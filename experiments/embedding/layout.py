"""What the three file formats share: columns, and the document inside a file that describes and vouches for them.

Every file holds the column `paths` (text), the column `sizes` (int32 [rows, 2]) and columns of numbers [rows, …]. The
document is JSON with the `dtype`, `shape` and SHA-256 of each column, and a SHA-256 of itself.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinojax.documents import HASH, sha256_of_json
from dinojax.errors import UserError

DOCUMENT = "dinojax"  # name of the document in a file
PATHS, SIZES = "paths", "sizes"
_KIND, _VERSION, _TEXT = "dinojax embeddings", 1, "utf-8"
_DTYPES = ("float16", "float32", "int32")


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of numbers: the type, and the shape of one row."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """Numbers in a row."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.values * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a file holds, known before its rows: `columns` are `sizes` and the arrays, in the order of the file."""

    root: str
    rows: int
    columns: Mapping[str, Column]
    meta: Mapping[str, Any]


# Some rows: `paths` as a sequence of texts, other columns as arrays.
Chunk = Mapping[str, Any]
# Yields all rows, in order, with the columns of these names alone; may be called again.
Chunks = Callable[[Sequence[str]], Iterator[Chunk]]


class Seal:
    """The hashes of columns, which grow with their rows, and the document of a file."""

    def __init__(self, layout: Layout):
        self._layout = layout
        names = (PATHS, *layout.columns)
        self._hashes, self._rows = {name: hashlib.sha256() for name in names}, dict.fromkeys(names, 0)

    def add(self, chunk: Chunk) -> None:
        """Takes more rows."""
        for name, values in chunk.items():
            self._hashes[name].update(_bytes(values))
            self._rows[name] += len(values)

    def document(self, *, draft: bool = False) -> str:
        """The document. A `draft` may be asked for before all rows are there; it has the final length.

        Raises:
            ValueError: there are more or fewer rows than the layout says.
        """
        layout = self._layout
        if not draft and set(self._rows.values()) != {layout.rows}:
            raise ValueError(f"{self._rows} rows were written, not {layout.rows}")
        shapes = {name: [layout.rows, *column.shape] for name, column in layout.columns.items()}
        dtypes = {name: column.dtype for name, column in layout.columns.items()}
        columns = {
            name: {
                "dtype": dtypes.get(name, _TEXT),
                "shape": shapes.get(name, [layout.rows]),
                "sha256": one.hexdigest(),
            }
            for name, one in self._hashes.items()
        }
        document = {
            "kind": _KIND, "version": _VERSION, "root": layout.root, "columns": columns, "meta": dict(layout.meta)
        }  # fmt: skip
        return json.dumps({**document, HASH: sha256_of_json(json.loads(json.dumps(document)))})


@dataclasses.dataclass(frozen=True)
class Found:
    """The document of a file that is being read: its layout, and the stated hashes."""

    layout: Layout
    hashes: Mapping[str, str]

    @classmethod
    def of_text(cls, text: str, path: Path) -> "Found":
        """From the text of the document.

        Raises:
            UserError: it was edited, or is not the document of a table.
        """
        try:
            document = json.loads(text)
            stated = document.pop(HASH)
            if document["kind"] != _KIND:
                raise not_a_table(path)
            if stated != sha256_of_json(document):
                raise damaged(path, "the SHA-256 of its description is not the stored one")
            if document["version"] != _VERSION:
                raise UserError(f"{path} was written by a later version of dinojax; update dinojax to read it")
            columns = document["columns"]
            (rows,) = columns[PATHS]["shape"]
            arrays = {name: _column(one, rows) for name, one in columns.items() if name != PATHS}
            hashes = {name: str(one["sha256"]) for name, one in columns.items()}
            return cls(Layout(str(document["root"]), rows, arrays, dict(document["meta"])), hashes)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise not_a_table(path) from error

    def check(self, path: Path, columns: Mapping[str, Any]) -> None:
        """Raises a `UserError` unless every column is the one that was written."""
        for name, values in columns.items():
            if len(values) != self.layout.rows or hashlib.sha256(_bytes(values)).hexdigest() != self.hashes[name]:
                raise damaged(path, f"the SHA-256 of {name} is not the stored one")


def empty(layout: Layout, name: str, path: Path) -> np.ndarray:
    """An array for a column of a file, which is never larger than the file.

    Raises:
        UserError: the document states more bytes than the file has.
    """
    column = layout.columns[name]
    if layout.rows * column.row_bytes > path.stat().st_size:
        raise damaged(path, f"it is too short for {layout.rows:,} rows of {name}")
    return np.empty((layout.rows, *column.shape), column.dtype)


def damaged(path: Path, reason: str) -> UserError:
    """The error about a file whose content is not what was written."""
    return UserError(f"{path} is damaged ({reason}); write it again with dinojax embed")


def not_a_table(path: Path) -> UserError:
    """The error about a file that `dinojax embed` did not write."""
    return UserError(f"{path} is not an embedding file; dinojax embed writes one")


def _column(stated: Mapping[str, Any], rows: int) -> Column:
    first, *shape = stated["shape"]
    sides = [first, *shape]
    if first != rows or stated["dtype"] not in _DTYPES or not all(type(side) is int and side >= 0 for side in sides):
        raise ValueError(f"{stated} is not a column of {rows} rows")
    return Column(stated["dtype"], tuple(shape))


def _bytes(values: Any) -> bytes | memoryview:
    """What is hashed of a column: its numbers in C order, little-endian; of texts, UTF-8 with a zero after each."""
    if isinstance(values, np.ndarray):
        little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        return little.reshape(-1).view(np.uint8).data
    return "".join(f"{text}\0" for text in values).encode()
