"""Masks and depth maps on disk: indices or colours as class indices, 16-bit images or .npy files as metres."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, UInt8
from tqdm.contrib.concurrent import thread_map

from dinojax.dense import VOID
from dinojax.errors import UserError
from dinojax.images.decode import decode_rgb, decode_values, has_colours, image_size
from experiments.dense_tasks.pairs import Pairs, Task

MOST_CLASSES = 255
_VOID_NAMES = ("void", "ignore")
_MOST_TABLE_BYTES = 2**20
_THREADS = 16
_LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")

Mask = UInt8[np.ndarray, "_height _width"]
DepthMap = Float32[np.ndarray, "_height _width"]


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """The classes of masks.

    Attributes:
        names: by class index.
        colours: of each class in masks with three channels; None where the table gives none.
        void_colours: colours of pixels that do not count.
    """

    names: tuple[str, ...]
    colours: UInt8[np.ndarray, "classes 3"] | None = None
    void_colours: UInt8[np.ndarray, "voids 3"] | None = None


@dataclasses.dataclass(frozen=True)
class TargetReader:
    """How the files of a task are read.

    Attributes:
        task: what they are.
        table: of the classes; None takes the indices as they are.
        void: index that does not count.
        depth_scale: numbers of a 16-bit depth image per metre; .npy files hold metres.
        most: metres beyond which a depth does not count; None counts all.
    """

    task: Task
    table: ClassTable | None = None
    void: int = VOID
    depth_scale: float = 1000.0
    most: float | None = None

    def read(self, file: Path, size: tuple[int, int]) -> Mask | DepthMap:
        """Class index or `VOID` of each pixel, or metres, 0 where they were not measured.

        Raises:
            UserError: the file cannot be read, is not of `size` (height, width) px, or holds an unknown class.
        """
        found = self._mask(file) if self.task == "segmentation" else self._depth(file)
        if found.shape != size:
            shown = (f"{width}×{height}" for height, width in (found.shape, size))
            raise UserError(f"{file} is {next(shown)} px, and its photo {next(shown)} px; they must have one size")
        return found

    def _mask(self, file: Path) -> Mask:
        if file.suffix.lower() in _LOSSY:
            raise UserError(f"{file} is a JPEG, which changes the numbers it holds; store masks as PNG")
        if has_colours(file, str(file)):
            return _by_colour(decode_rgb(file, str(file)), self.table, file)
        values = decode_values(file, str(file))
        void = values == self.void
        known = len(self.table.names) if self.table else MOST_CLASSES
        unknown = ~void & (values >= known)
        if unknown.any():
            first = int(values[unknown][0])
            known_as = "the table of classes names" if self.table else "a mask may hold"
            raise UserError(
                f"{file} holds the index {first} ({int((values == first).sum()):,} pixels), and {known_as} {known} "
                f"classes, 0 to {known - 1}; correct the mask, or name the index that does not count as --void {first}"
            )
        return np.where(void, VOID, values).astype(np.uint8)

    def _depth(self, file: Path) -> DepthMap:
        if file.suffix.lower() == ".npy":
            depth = _npy(file)
        else:
            depth = decode_values(file, str(file)).astype(np.float32) / np.float32(self.depth_scale)
        known = np.isfinite(depth) & (depth > 0) & (depth <= (np.inf if self.most is None else self.most))
        return np.where(known, depth, 0).astype(np.float32)


def read_table(path: Path) -> ClassTable:
    """The classes of a table: CSV rows name or name,r,g,b; a JSON list of names or of {"name": …, "color": [r, g, b]}.

    A row called void or ignore gives a colour that does not count, and no class.

    Raises:
        UserError: the file cannot be read or is not such a table.
    """
    try:
        if path.stat().st_size > _MOST_TABLE_BYTES:
            raise UserError(f"--classes {path} is larger than a table of {MOST_CLASSES} classes can be")
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if path.suffix.lower() == ".json" else list(csv.reader(text.splitlines()))
        if not isinstance(rows, list):
            raise ValueError("a list was expected")
        entries = [_entry(row) for row in rows if row]
    except (OSError, UnicodeDecodeError, csv.Error, RecursionError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"--classes {path} is not a table of classes ({reason}); write one class in each line, name or name,r,g,b"
        ) from error
    if entries and entries[0][1] is None and entries[0][0].lower() == "name":
        entries = entries[1:]  # the heading of a table of names
    classes = [entry for entry in entries if entry[0].lower() not in _VOID_NAMES]
    voids = [colour for name, colour in entries if name.lower() in _VOID_NAMES and colour is not None]
    names, colours = [name for name, _ in classes], [colour for _, colour in classes]
    if not 2 <= len(names) <= MOST_CLASSES:
        raise UserError(f"--classes {path} names {len(names)} classes; 2 to {MOST_CLASSES} are possible")
    every = [*(c for c in colours if c is not None), *voids]
    for kind, values in (("name", names), ("colour", every)):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise UserError(f"--classes {path} gives the {kind} {twice[0]} twice; each class has its own")
    if any(colour is None for colour in colours) and any(colour is not None for colour in colours):
        raise UserError(f"--classes {path} gives colours for some classes only; give one to each, or none")
    coloured = bool(colours) and colours[0] is not None
    return ClassTable(
        tuple(names),
        np.array(colours, np.uint8) if coloured else None,
        np.array(voids, np.uint8).reshape(-1, 3) if coloured else None,
    )


def _entry(row: Any) -> tuple[str, tuple[int, ...] | None]:
    """Name and colour of one row; the heading name,r,g,b counts as a name without a colour."""
    if isinstance(row, dict):
        name, colour = row["name"], row.get("color", row.get("colour"))
    elif isinstance(row, str):
        name, colour = row, None
    else:
        name, colour = row[0], [int(value) for value in row[1:4]] if row[1:2] and row[1].strip().isdigit() else None
        if colour is None and len(row) > 1 and [cell.strip().lower() for cell in row[1:4]] != ["r", "g", "b"]:
            raise ValueError(f"{', '.join(row)} is not name or name,r,g,b")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{name!r} is no name")
    if colour is None:
        return name.strip(), None
    if len(colour) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in colour):
        raise ValueError(f"{colour} is no colour: three whole numbers from 0 to 255 were expected")
    return name.strip(), tuple(colour)


def _by_colour(pixels: UInt8[np.ndarray, "height width 3"], table: ClassTable | None, file: Path) -> Mask:
    """The class of each colour."""
    if table is None or table.colours is None:
        raise UserError(f"{file} holds colours; say with --classes TABLE which class each is, in lines name,r,g,b")
    known = np.concatenate([table.colours, table.void_colours])
    labels = np.array([*range(len(table.names)), *(VOID for _ in table.void_colours)], np.uint8)
    codes, packed = _packed(known), _packed(pixels)
    order = np.argsort(codes)
    place = np.minimum(np.searchsorted(codes, packed, sorter=order), len(codes) - 1)
    found = order[place]
    unknown = codes[found] != packed
    if unknown.any():
        red, green, blue = pixels[unknown][0]
        raise UserError(
            f"{file} holds the colour {red},{green},{blue} ({int((packed == packed[unknown][0]).sum()):,} pixels), "
            "which the table of classes does not name; add a line to it, such as void,"
            f"{red},{green},{blue} for pixels that do not count"
        )
    return labels[found]


def _packed(colours: UInt8[np.ndarray, "*shape 3"]) -> Int[np.ndarray, "*shape"]:
    """Each colour as one number."""
    red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def _npy(file: Path) -> DepthMap:
    """A two-dimensional array of numbers; nothing in the file is unpickled."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise UserError(f"{file} is not a readable .npy file ({error}); replace or remove it") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu":
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "no array"
        raise UserError(f"{file} holds {what}, where metres of height × width were expected")
    return np.asarray(array, np.float32)


@dataclasses.dataclass(frozen=True)
class Survey:
    """What all targets of some pairs hold: sizes of the photos (height, width), pixels of each class, largest depth."""

    sizes: list[tuple[int, int]]
    pixels: Int[np.ndarray, " classes"]
    deepest: float


def survey(pairs: Pairs, reader: TargetReader) -> Survey:
    """Reads every target once, so that faults are named before anything is computed.

    Raises:
        UserError: the first file with a fault, and how many others have one.
    """

    def look(place: int) -> tuple[tuple[int, int], np.ndarray, float] | UserError:
        photo, target = pairs.photos.files[place], pairs.targets.files[place]
        try:
            size = image_size(photo, str(photo))
            found = reader.read(target, size)
        except UserError as error:
            return error
        if reader.task == "depth":
            return size, np.zeros(0, np.int64), float(found.max())
        return size, np.bincount(found.ravel(), minlength=VOID + 1), 0.0

    options = {"max_workers": _THREADS, "desc": f"{pairs.photos.name} targets", "unit": "file", "leave": False}
    found = thread_map(look, range(len(pairs)), dynamic_ncols=True, delay=1, **options)
    _raise_first([one for one in found if isinstance(one, UserError)])
    sizes, pixels, deepest = zip(*found)
    return Survey(list(sizes), np.sum(pixels, axis=0), max(deepest))


def _raise_first(errors: Sequence[UserError]) -> None:
    if errors:
        more = f" ({len(errors) - 1:,} more files have a fault)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}")
