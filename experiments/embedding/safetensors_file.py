"""Tables as .safetensors: tensors `sizes`, the arrays, and `paths`, as UTF-8 with a zero byte after each.

The document is the metadata `dinojax`.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from dinojax.documents import whole_file
from dinojax.errors import UserError
from experiments.embedding.layout import DOCUMENT, PATHS, Chunks, Found, Layout, Seal, damaged, not_a_table

_TYPES = {"float32": "F32", "float16": "F16", "int32": "I32"}


def write(path: Path, layout: Layout, chunks: Chunks) -> None:
    """Writes a table; see `table.write_chunks`. Every column takes a pass over the rows, `paths` two.

    The header, with its hashes, comes before the numbers: room is left for it, and it is written at the end.
    """
    seal = Seal(layout)
    texts = sum(len(_encoded(chunk[PATHS])) for chunk in chunks([PATHS]))
    # The widest types come first, so that every tensor is aligned.
    names = sorted(layout.columns, key=lambda name: -np.dtype(layout.columns[name].dtype).itemsize)
    header = _header(layout, names, texts, seal.document(draft=True))
    with whole_file(path) as file:
        file.write(header)
        for name in names:
            little = np.dtype(layout.columns[name].dtype).newbyteorder("<")
            for chunk in chunks([name]):
                seal.add(chunk)
                file.write(np.asarray(chunk[name], little).tobytes())
        for chunk in chunks([PATHS]):
            seal.add(chunk)
            file.write(_encoded(chunk[PATHS]))
        final = _header(layout, names, texts, seal.document())
        if len(final) != len(header):
            raise ValueError(f"the header grew from {len(header)} to {len(final)} bytes")
        file.seek(0)
        file.write(final)
        file.seek(0, os.SEEK_END)


def read_document(path: Path) -> Found:
    """The document of a table.

    Raises:
        UserError: it is not a table, or is damaged.
    """
    with _opened(path) as file:
        stored = file.metadata() or {}
        if DOCUMENT not in stored:
            raise not_a_table(path)
        return Found.of_text(stored[DOCUMENT], path)


def read_columns(path: Path, layout: Layout, names: Sequence[str]) -> dict[str, Any]:
    """Columns by name; see `layout.Chunk`.

    Raises:
        UserError: the file is damaged.
    """
    found: dict[str, Any] = {}
    with _opened(path) as file:
        held = set(file.keys())
        for name in names:
            if name not in held:
                raise damaged(path, f"it lacks the column {name}")
            tensor = file.get_tensor(name)
            if name == PATHS:
                *found[name], rest = tensor.tobytes().decode().split("\0")
                if rest or tensor.dtype != np.uint8:
                    raise damaged(path, "the column paths does not end where it should")
                continue
            expected = layout.columns[name]
            if tensor.dtype != expected.dtype or tensor.shape != (layout.rows, *expected.shape):
                raise damaged(path, f"the column {name} has another type or shape")
            found[name] = tensor
    return found


def _header(layout: Layout, names: Sequence[str], texts: int, document: str) -> bytes:
    """The eight bytes of its length, and the header, filled up with spaces to a multiple of eight bytes.

    Source: the format's description in huggingface/safetensors, README.md.
    """
    tensors, start = {}, 0
    for name in names:
        column = layout.columns[name]
        stop = start + layout.rows * column.row_bytes
        shape = [layout.rows, *column.shape]
        tensors[name] = {"dtype": _TYPES[column.dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    tensors[PATHS] = {"dtype": "U8", "shape": [texts], "data_offsets": [start, start + texts]}
    text = json.dumps({"__metadata__": {DOCUMENT: document}, **tensors}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _encoded(paths: Sequence[str]) -> bytes:
    return "".join(f"{text}\0" for text in paths).encode()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file that is being read, whose errors are a `UserError`."""
    try:
        opened = safetensors.safe_open(path, "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise not_a_table(path) from error
    try:
        with opened as file:
            yield file
    except UserError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise damaged(path, str(error) or type(error).__name__) from error
