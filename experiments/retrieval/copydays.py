"""INRIA Copydays in its official folders: originals, strong copies, JPEG qualities and crops.

FOLDER/original, FOLDER/strong, FOLDER/jpegqual/3 … 75 and FOLDER/crops/10 … 80 hold .jpg files. A copy has the name of
its original; a strong copy shares the first four characters with it.

Source: facebookresearch/dino 7c446df `eval_copy_detection.py`.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinojax.errors import UserError
from dinojax.retrieval.scores import Relevance

_QUALITIES = (3, 5, 8, 10, 15, 20, 30, 50, 75)
_CROPS = (10, 15, 20, 30, 40, 50, 60, 70, 80)
BLOCKS = (
    "original",
    "strong",
    *(f"jpegqual/{quality}" for quality in _QUALITIES),
    *(f"crops/{share}" for share in _CROPS),
)
_PREFIX = 4


class Block(NamedTuple):
    """Copies of one kind.

    Attributes:
        name: of the folder inside the data set.
        files: the copies.
        relevance: 1 where an original belongs to a copy.
    """

    name: str
    files: list[Path]
    relevance: Relevance


class Copydays(NamedTuple):
    """The originals, which are searched; blocks of copies, which are the queries; and the blocks that are not there."""

    originals: list[Path]
    blocks: list[Block]
    missing: list[str]


def read_copydays(folder: Path) -> Copydays:
    """The images of the data set, and which belong together.

    Raises:
        UserError: there are no originals or no copies, or a copy without an original.
    """
    originals = _images(folder / "original")
    if not originals:
        raise UserError(f"{folder} is not Copydays: {folder / 'original'} with .jpg files was expected")
    found = {name: _images(folder / name) for name in BLOCKS}
    blocks = [Block(name, files, _relevance(name, files, originals)) for name, files in found.items() if files]
    if len(blocks) == 1:
        raise UserError(f"{folder} holds no copies beside original, such as strong or jpegqual/15")
    return Copydays(originals, blocks, [name for name, files in found.items() if not files])


def _images(folder: Path) -> list[Path]:
    """The .jpg files of a folder, by name; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix == ".jpg" and path.is_file())


def _relevance(name: str, files: list[Path], originals: list[Path]) -> Relevance:
    letters = _PREFIX if name == "strong" else None
    copies, names = (np.array([file.stem[:letters] for file in some]) for some in (files, originals))
    relevance = (copies[:, None] == names[None]).astype(np.int8)
    orphans = np.flatnonzero(~relevance.any(axis=1))
    if len(orphans):
        raise UserError(f"{files[orphans[0]]} is a copy without an original in {originals[0].parent}")
    return relevance
