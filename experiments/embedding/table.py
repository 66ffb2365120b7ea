"""A table of embeddings, and its files: `.parquet`, `.npz` and `.safetensors` hold the same numbers.

    table = read_table("features.parquet")
    table.paths[0], table.sizes[0]   # "trips/rome/1.jpg", [height, width]
    table.arrays["cls"]              # float32 [images, dim]

A file is written whole or not at all. A SHA-256 of each column is stored, and checked when the column is read.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Int32

from dinojax.errors import UserError
from experiments.embedding import npz_file, parquet_file, safetensors_file
from experiments.embedding.layout import PATHS, SIZES, Chunks, Column, Found, Layout, damaged

CLS, MEAN_PATCH, DENSE = "cls", "mean_patch", "dense"
_FORMATS: dict[str, ModuleType] = {".parquet": parquet_file, ".npz": npz_file, ".safetensors": safetensors_file}
SUFFIXES = tuple(_FORMATS)


@dataclasses.dataclass(frozen=True)
class EmbeddingTable:
    """Embeddings of images, one row an image.

    Attributes:
        root: the folder that the paths are relative to, as an absolute path.
        paths: file of each image, with `/` between folders. Bytes that are not UTF-8 are shown as `\\xe9`.
        sizes: height and width in pixels of each image as it is displayed, before it was resized.
        arrays: by name. `cls` is always there: float32 [images, dim], the class token after the last block and the
            final norm. `cls_2`, `cls_3` and so on are those after the second and third block from the end. `mean_patch`
            is float32 [images, dim], the mean of the last block's patch tokens after the norm. `dense` is float16
            [images, rows, columns, dim], these patch tokens themselves.
        meta: JSON values. From `dinojax embed`: `weights` as given, `weights_fingerprint`, `image_size`,
            `normalisation` (mean and deviation), `dtype` of the computation, `resize` in words, `patch_size`, `grid`
            (rows and columns of patches), `dinojax` (the version), `images` (a hash of names and contents), and
            `skipped` (paths of the files that could not be read).
    """

    root: str
    paths: tuple[str, ...]
    sizes: Int32[np.ndarray, "images 2"]
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in {SIZES: self.sizes, **self.arrays}.items()}
        if set(lengths.values()) != {len(self.paths)}:
            raise ValueError(f"{len(self.paths)} paths do not fit columns of {lengths} rows")

    def __len__(self) -> int:
        return len(self.paths)


def read_table(path: str | Path, *, arrays: Sequence[str] | None = None) -> EmbeddingTable:
    """Reads a table of any of the three formats, and checks its hashes.

    Args:
        path: of the file.
        arrays: names of the arrays to read; None reads all of them. `dense` may be large.

    Raises:
        UserError: there is no such file, it is not a table, is damaged, or lacks one of the arrays.
    """
    path, file_format = _existing(path)
    found = file_format.read_document(path)
    held = [name for name in found.layout.columns if name != SIZES]
    wanted = held if arrays is None else list(arrays)
    for name in wanted:
        if name not in held:
            raise UserError(f"{path} holds no column {name!r}, only {', '.join(held)}; embed the images with it")
    if SIZES not in found.layout.columns:
        raise damaged(path, "it lacks the column sizes")
    columns = file_format.read_columns(path, found.layout, (PATHS, SIZES, *wanted))
    found.check(path, columns)
    paths, sizes = columns.pop(PATHS), columns.pop(SIZES)
    return EmbeddingTable(found.layout.root, tuple(paths), sizes, dict(columns), dict(found.layout.meta))


def read_layout(path: str | Path) -> Layout:
    """What a table holds, without its rows: `root`, `rows`, `columns`, `meta`.

    Raises:
        UserError: there is no such file, or it is not a table.
    """
    path, file_format = _existing(path)
    found: Found = file_format.read_document(path)
    return found.layout


def write_table(path: str | Path, table: EmbeddingTable, *, remedy: str = "make room or name another file") -> Path:
    """Writes a table, whole or not at all; the suffix says in which format.

    Args:
        path: of the file.
        table: of any size.
        remedy: what the user can do if the file cannot be written; ends the message.

    Returns:
        The file.

    Raises:
        UserError: the suffix is not one of `SUFFIXES`, or the file cannot be written.
    """
    columns = {SIZES: table.sizes, **table.arrays}
    shapes = {name: Column(array.dtype.name, array.shape[1:]) for name, array in columns.items()}
    rows = {PATHS: table.paths, **columns}
    layout = Layout(table.root, len(table), shapes, table.meta)
    return write_chunks(path, layout, lambda names: iter([{name: rows[name] for name in names}]), remedy=remedy)


def write_chunks(
    path: str | Path, layout: Layout, chunks: Chunks, *, remedy: str = "make room or name another file"
) -> Path:
    """Writes a table whose rows come in chunks, of which one at a time is in memory.

    Args:
        path: its suffix says in which format.
        layout: of the whole table.
        chunks: called once for each pass over the rows.
        remedy: what the user can do if the file cannot be written; ends the message.

    Raises:
        UserError: as `write_table`.
    """
    path, file_format = table_path(path), _FORMATS[table_path(path).suffix.lower()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file_format.write(path, layout, chunks)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); {remedy}") from error
    return path


def table_path(path: str | Path) -> Path:
    """The path of a table: `.parquet` is added to one without a suffix.

    Raises:
        UserError: it has the suffix of another format.
    """
    path = Path(path).expanduser()
    if not path.name:
        raise UserError(f"{path} is a folder; name a file in it, such as features.parquet")
    if not path.suffix:
        return path.with_name(f"{path.name}.parquet")
    if path.suffix.lower() not in _FORMATS:
        raise UserError(f"{path} does not end with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}; name it so")
    return path


def _existing(path: str | Path) -> tuple[Path, ModuleType]:
    given = Path(path).expanduser()
    if given.is_file() and given.suffix.lower() not in _FORMATS:
        raise UserError(f"{path} is not an embedding file; dinojax embed writes one, as {', '.join(SUFFIXES)}")
    path = table_path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such embedding file; dinojax embed writes one")
    return path, _FORMATS[path.suffix.lower()]
