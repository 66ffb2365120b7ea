"""Revisited Oxford and Paris in their official folders.

FOLDER/roxford5k/ holds gnd_roxford5k.pkl and the folder jpg/, and FOLDER/rparis6k/ the same under its name.

Source: facebookresearch/dino 7c446df `eval_image_retrieval.py`; Radenović et al., arXiv 1803.11285.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinojax.errors import UserError
from experiments.retrieval.pickles import read_plain_pickle

_LISTS = ("easy", "hard", "junk")


class Landmarks(NamedTuple):
    """A bank of photos, and queries whose answers are known.

    Attributes:
        images: files of the bank.
        queries: files of the queries.
        easy: for each query, indices of its easy images in the bank.
        hard: the same of its hard images.
        junk: the same of images that count neither way.
    """

    images: list[Path]
    queries: list[Path]
    easy: list[list[int]]
    hard: list[list[int]]
    junk: list[list[int]]


def read_landmarks(folder: Path, name: str) -> Landmarks:
    """The photos and the ground truth, which is parsed without running the pickle that it is.

    Args:
        folder: that holds the folder of the data set, or that folder itself.
        name: "roxford5k" or "rparis6k".

    Raises:
        UserError: no such folder, a ground truth of another form, or photos that are not there.
    """
    place = folder if folder.name == name else folder / name
    truth = place / f"gnd_{name}.pkl"
    if not truth.is_file():
        raise UserError(f"{place} is not the folder of {name}: {truth.name} and a folder jpg were expected in it")
    content = read_plain_pickle(truth)
    answers = content.get("gnd") if isinstance(content, dict) else None
    bank, queries = (_names(content, key, truth) for key in ("imlist", "qimlist"))
    if not isinstance(answers, list) or len(answers) != len(queries):
        raise UserError(f"{truth} does not answer its {len(queries)} queries; download it again")
    lists = [[_indices(answer, key, len(bank), truth) for answer in answers] for key in _LISTS]
    return Landmarks(_files(place / "jpg", bank), _files(place / "jpg", queries), *lists)


def _names(content: Any, key: str, truth: Path) -> list[str]:
    names = content.get(key) if isinstance(content, dict) else None
    texts = isinstance(names, list) and all(isinstance(name, str) and Path(name).name == name for name in names)
    if not texts or not names:
        raise UserError(f"{truth} has no list {key} of names of photos; download it again")
    return names


def _indices(answer: Any, key: str, count: int, truth: Path) -> list[int]:
    values = np.asarray(answer[key] if isinstance(answer, dict) and key in answer else [""]).reshape(-1)
    if values.size and (values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= count):
        raise UserError(f"{truth} has a list {key} that is not one of indices below {count}; download it again")
    return [int(value) for value in values]


def _files(folder: Path, names: Sequence[str]) -> list[Path]:
    files = [folder / f"{name}.jpg" for name in names]
    missing = [file for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 1:,} more photos are" if len(missing) > 1 else " is"
        raise UserError(f"{missing[0]}{more} missing; extract the archive of photos into {folder}")
    return files
