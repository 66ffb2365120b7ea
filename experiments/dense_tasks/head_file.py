"""A trained dense head on disk: dense.json, which says what it is, and head.safetensors beside it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from jaxtyping import Array, Float
from safetensors.numpy import load_file, save

from dinojax.dense import DenseHead, bin_depth, dense_scores
from dinojax.documents import read_document, write_document, write_whole
from dinojax.errors import UserError
from experiments.dense_tasks.pairs import Task
from experiments.dense_tasks.windows import Geometry
from experiments.runs.kinds import DENSE_FILE, Kind, described, kind_of

HEAD_FILE = "head.safetensors"
_REMEDY = "repeat that run"


@dataclasses.dataclass(frozen=True)
class HeadFile:
    """A head and what its scores mean.

    Attributes:
        task: "segmentation" or "depth".
        head: on raw patch features; None before it is trained.
        class_names: of its outputs; empty for depth.
        colours: of the classes in figures and masks, as rows red, green, blue.
        depth_range: metres of the first and the last bin.
        geometry: of the photos it was trained on.
        blocks: number of last blocks whose patches it takes.
        scales: of the evaluation.
        backbone: what the features depend on apart from that: weights, fingerprint, normalisation, seed, dtype.
    """

    task: Task
    head: DenseHead | None
    class_names: tuple[str, ...]
    colours: tuple[tuple[int, ...], ...]
    depth_range: tuple[float, float] | None
    geometry: Geometry
    blocks: int
    scales: tuple[float, ...]
    backbone: dict[str, Any]

    def scores(self, patches: Float[np.ndarray, "*batch width"]) -> Float[Array, "*batch outputs"]:
        """Class scores of patches, or their depth in metres as the one output."""
        scores = dense_scores(self.head, patches)
        return scores if self.task == "segmentation" else bin_depth(scores, *self.depth_range)[..., None]


def save_head(folder: Path, head: HeadFile) -> None:
    """Writes both files."""
    arrays = {name: np.ascontiguousarray(array) for name, array in head.head._asdict().items()}
    write_whole(folder / HEAD_FILE, save(arrays))
    described = dataclasses.asdict(dataclasses.replace(head, head=None))
    write_document(folder / DENSE_FILE, described, files=[HEAD_FILE])


def load_head(folder: Path) -> HeadFile:
    """The head of a run folder.

    Raises:
        UserError: the folder holds none, or a damaged one.
    """
    if kind_of(folder) is not Kind.DENSE:
        raise UserError(f"--run {described(folder, 'dense head')}")
    document = read_document(folder / DENSE_FILE, remedy=_REMEDY)
    try:
        arrays = load_file(folder / HEAD_FILE)
        return HeadFile(
            task=document["task"],
            head=DenseHead(**arrays),
            class_names=tuple(document["class_names"]),
            colours=tuple(map(tuple, document["colours"])),
            depth_range=None if document["depth_range"] is None else tuple(document["depth_range"]),
            geometry=Geometry(**document["geometry"]),
            blocks=document["blocks"],
            scales=tuple(document["scales"]),
            backbone=document["backbone"],
        )
    except (safetensors.SafetensorError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{folder / DENSE_FILE} is damaged ({error!r}); {_REMEDY}") from error
