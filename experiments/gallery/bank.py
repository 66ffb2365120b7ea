"""The bank: the images of an embedding file, one kind of their features, and the folder that they lie in now."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
import tyro
from jaxtyping import Float

from dinojax.errors import UserError
from experiments.runs.settings import UNIMPORTANT

_META = ("weights", "weights_fingerprint", "image_size", "normalisation", "dtype")


@dataclasses.dataclass(frozen=True)
class TableSettings:
    """The embedding file."""

    table: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")]
    """File of embeddings that dinojax embed has written."""
    feature: str = "cls"
    """Array of the file that images are compared by, such as cls or mean_patch."""
    root: Annotated[Path | None, UNIMPORTANT] = None
    """Present folder of the images. None takes the one that the file names."""


@dataclasses.dataclass(frozen=True)
class OutputSettings:
    """The folder that is written to."""

    out: Annotated[Path | None, UNIMPORTANT] = None
    """Output folder. None takes a folder under runs/<command>/."""


@dataclasses.dataclass(frozen=True)
class Bank:
    """Images with their features.

    Attributes:
        table: path of the embedding file.
        paths: of the images, inside `root`.
        sizes: height and width of each image.
        features: what images are compared by.
        feature: its name.
        meta: how the features were computed.
        root: folder of the images; None where it does not exist.
    """

    table: Path
    paths: tuple[str, ...]
    sizes: np.ndarray
    features: Float[np.ndarray, "images dim"]
    feature: str
    meta: Mapping[str, Any]
    root: Path | None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def about(self) -> str:
        """The model and the features, in a line."""
        untrained = " (UNTRAINED)" if str(self.meta["weights"]).startswith("random") else ""
        weights = "/".join(Path(str(self.meta["weights"])).parts[-3:])
        return f"{weights}{untrained}, {self.feature}, {self.meta['image_size']} px"

    def file(self, index: int) -> Path | None:
        """Where an image lies; None where the folder is not there, or a path leads out of it."""
        inside = PurePosixPath(self.paths[index])
        if self.root is None or inside.is_absolute() or ".." in inside.parts:
            return None
        return self.root / inside

    def files(self, indices: Iterable[int]) -> dict[int, Path]:
        """The files of images, by index, without those that have none."""
        return {index: file for index in indices if (file := self.file(index)) is not None}

    def unit(self) -> Float[np.ndarray, "images dim"]:
        """The features at length 1, so that products are cosines; zero stays zero."""
        return self.features / np.maximum(np.linalg.norm(self.features, axis=1, keepdims=True), 1e-12)


def open_bank(settings: TableSettings) -> Bank:
    """Reads an embedding file; says so if its images have moved away.

    Raises:
        UserError: the file is missing, damaged, empty or has no such array, or `root` is not a folder.
    """
    from dinojax.probes.labelled import check_finite
    from experiments.embedding.table import read_table, table_path

    table = read_table(settings.table, arrays=[settings.feature])
    path, features = table_path(settings.table), table.arrays[settings.feature]
    if features.ndim != 2:
        raise UserError(f"--feature {settings.feature} is not one vector an image; take cls or mean_patch")
    if not len(table):
        raise UserError(f"{path} holds no images; embed some")
    for name in _META:
        if name not in table.meta:
            raise UserError(f"{path} does not record the {name} of its model; write it again with dinojax embed")
    try:
        check_finite(features)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    features = np.asarray(features, np.float32)
    root = _root(settings.root, table.root, path)
    return Bank(path, table.paths, table.sizes, features, settings.feature, table.meta, root)


def _root(given: Path | None, recorded: str, table: Path) -> Path | None:
    if given is not None and not given.expanduser().is_dir():
        raise UserError(f"--root {given} is not a folder; name the one that holds the images of {table}")
    root = Path(recorded) if given is None else given.expanduser()
    if root.is_dir():
        return root
    print(
        f"note: {root}, the folder of the images of {table}, does not exist, so there will be no thumbnails; --root "
        "names its new place"
    )
    return None
