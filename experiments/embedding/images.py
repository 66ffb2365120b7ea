"""The images that are embedded: all below one folder, in the order of their paths, read or noted as unreadable."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dinojax.errors import UserError
from dinojax.images.decode import Pixels, decode_rgb
from experiments.data.files import find_images, no_images, notes_about, readable_name, stamp_files
from experiments.data.splits import Split, digest


@dataclasses.dataclass(frozen=True)
class Images:
    """Image files below `root`, and notes on what was left out; `inside` are the paths in it, as the system has them.

    Attributes:
        root: an absolute path.
        inside: sorted, folder by folder.
        notes: sentences for the user.
    """

    root: Path
    inside: Sequence[str]
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.inside)

    def file(self, i: int) -> Path:
        """Where image `i` is."""
        return self.root / self.inside[i]

    def name(self, i: int) -> str:
        """The path of image `i` in the table."""
        return readable_name(self.inside[i])


def find(paths: Sequence[Path]) -> Images:
    """The images of folders, at any depth, and single files; an image that is named twice counts once.

    The root is the folder, or the innermost folder that holds all `paths`.

    Raises:
        UserError: a path that does not exist, or a folder without images.
    """
    files: set[Path] = set()
    places, notes = [], []
    for path in map(Path.expanduser, paths):
        if not path.exists():
            raise UserError(f"{path}: there is no such image or folder")
        if not path.is_dir():
            places.append(path.parent.resolve())
            files.add(places[-1] / path.name)
            continue
        folder = path.resolve()
        found = find_images(folder)
        if not found.files:
            raise UserError(no_images(path, found))
        places.append(folder)
        files.update(found.files)
        notes += notes_about(folder.parent, {folder: found})
    root = Path(os.path.commonpath(places))
    return Images(root, [str(file.relative_to(root)) for file in sorted(files)], notes)


class Reading:
    """Decodes images, and keeps what it learns: their `sizes`, and the `errors` of those that cannot be read.

    An image that cannot be read is black, so that the others of its batch go through the model; its row is left out
    of the table. Every file is decoded once: whether it can be read shows only then.

    Args:
        images: any number.
        strict: raise at an image that cannot be read.
    """

    def __init__(self, images: Images, *, strict: bool):
        self._images, self._strict = images, strict
        self.sizes = np.zeros((len(images), 2), np.int32)
        self.errors: dict[int, str] = {}

    def __call__(self, i: int) -> Pixels:
        try:
            pixels = decode_rgb(self._images.file(i), self._images.name(i))
        except UserError as error:
            if self._strict:
                raise
            self.errors[i] = str(error)
            return np.zeros((1, 1, 3), np.uint8)
        self.sizes[i] = pixels.shape[:2]
        return pixels

    def split(self) -> Split:
        """The images as the extractor takes them, without labels."""
        count = len(self._images)
        return Split("the", self._images.inside, np.zeros(count, np.int64), self, "")


class Stamps:
    """What stands for each image: see `experiments.data.files.Stamp`."""

    def __init__(self, images: Images):
        names = [images.name(i) for i in range(len(images))]
        stamps = stamp_files(names, [images.file(i) for i in range(len(images))], unreadable=True)
        self._contents = [bytes.fromhex(digest(stamp.content)) for stamp in stamps]
        self._times = [bytes.fromhex(digest(stamp.times)) for stamp in stamps]

    def fingerprint(self, rows: range) -> str:
        """Changes with the images of a block, and with their times."""
        return digest(*self._times[rows.start : rows.stop])

    def identity(self, rows: Sequence[int]) -> str:
        """Changes with the contents and names of images; copies of a folder share it."""
        return digest(*(self._contents[i] for i in rows))
