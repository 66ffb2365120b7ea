"""Tables as .npz: `numpy.load` gives `paths`, `sizes`, the arrays, and `dinojax`, the document as text.

Nothing is compressed: numbers hardly shrink, and a file cannot hold more than its size.
"""

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dinojax.documents import whole_file
from dinojax.errors import UserError
from experiments.embedding.layout import DOCUMENT, PATHS, Chunks, Found, Layout, Seal, damaged, empty, not_a_table

_DATE = (1980, 1, 1, 0, 0, 0)  # the same for every file, so that equal tables are equal files
_PIECE = 2**20  # bytes
_MOST_DOCUMENT = 2**28  # bytes


def write(path: Path, layout: Layout, chunks: Chunks) -> None:
    """Writes a table; see `table.write_chunks`. Every column takes a pass over the rows, `paths` two."""
    seal = Seal(layout)
    longest = max((len(text) for chunk in chunks([PATHS]) for text in chunk[PATHS]), default=0)
    dtypes = {PATHS: f"<U{max(1, longest)}"}
    shapes: dict[str, tuple[int, ...]] = {PATHS: ()}
    for name, column in layout.columns.items():
        dtypes[name], shapes[name] = np.dtype(column.dtype).newbyteorder("<").str, column.shape
    with whole_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name in (PATHS, *layout.columns):
            with _entry(archive, name) as entry:
                _write_header(entry, dtypes[name], (layout.rows, *shapes[name]))
                for chunk in chunks([name]):
                    seal.add(chunk)
                    entry.write(np.asarray(chunk[name], dtypes[name]).tobytes())
        text = np.asarray(seal.document())
        with _entry(archive, DOCUMENT) as entry:
            _write_header(entry, text.dtype.newbyteorder("<").str, ())
            entry.write(text.tobytes())


def read_document(path: Path) -> Found:
    """The document of a table.

    Raises:
        UserError: it is not a table, or is damaged.
    """
    with _opened(path) as archive:
        if f"{DOCUMENT}.npy" not in archive.namelist():
            raise not_a_table(path)
        with _stored(archive, path, DOCUMENT) as entry:
            dtype, shape = _read_header(entry)
            if dtype.kind != "U" or shape or dtype.itemsize > min(_MOST_DOCUMENT, path.stat().st_size):
                raise not_a_table(path)
            return Found.of_text(str(np.frombuffer(entry.read(dtype.itemsize), dtype)[0]), path)


def read_columns(path: Path, layout: Layout, names: Sequence[str]) -> dict[str, Any]:
    """Columns by name; see `layout.Chunk`.

    Raises:
        UserError: the file is damaged.
    """
    found: dict[str, Any] = {}
    with _opened(path) as archive:
        for name in names:
            with _stored(archive, path, name) as entry:
                found[name] = _read_column(entry, path, layout, name)
    return found


def _stored(archive: zipfile.ZipFile, path: Path, name: str) -> Any:
    """An opened entry, which could unpack to any size if it were compressed."""
    if f"{name}.npy" not in archive.namelist():
        raise damaged(path, f"it lacks the column {name}")
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise damaged(path, "another program has compressed its columns")
    return archive.open(info)


def _read_column(entry: Any, path: Path, layout: Layout, name: str) -> Any:
    dtype, shape = _read_header(entry)
    if name == PATHS:
        if dtype.kind != "U" or shape != (layout.rows,) or layout.rows * dtype.itemsize > path.stat().st_size:
            raise damaged(path, "the column paths has another type or shape")
        array = np.empty(shape, dtype)
    else:
        array = empty(layout, name, path)
        if array.shape != shape or array.dtype != dtype:
            raise damaged(path, f"the column {name} has another type or shape")
    _fill(entry, array)
    return array.tolist() if name == PATHS else array


def _fill(entry: Any, array: np.ndarray) -> None:
    """Reads to the end, where zipfile compares the checksum."""
    rest = memoryview(array.reshape(-1).view(np.uint8)) if array.size else memoryview(b"")
    while piece := entry.read(_PIECE):
        rest[: len(piece)] = piece
        rest = rest[len(piece) :]
    if len(rest):
        raise EOFError("it ends too early")


@contextmanager
def _entry(archive: zipfile.ZipFile, name: str) -> Iterator[Any]:
    with archive.open(zipfile.ZipInfo(f"{name}.npy", _DATE), "w", force_zip64=True) as entry:
        yield entry


def _write_header(entry: Any, dtype: str, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(entry, {"descr": dtype, "fortran_order": False, "shape": shape})


def _read_header(entry: Any) -> tuple[np.dtype, tuple[int, ...]]:
    if np.lib.format.read_magic(entry) != (1, 0):
        raise ValueError("its arrays are of another version")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(entry)
    if fortran_order or dtype.hasobject:
        raise ValueError("its arrays are stored in another way")
    return dtype, shape


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """An archive that is being read, whose errors are a `UserError`."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise not_a_table(path) from error
    try:
        with archive:
            yield archive
    except UserError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise damaged(path, str(error) or type(error).__name__) from error
