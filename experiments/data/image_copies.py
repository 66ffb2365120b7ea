"""Notes about files with the same content in a folder of images: in two splits, in two classes, or in one class."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dinojax.documents import sha256_of_file
from dinojax.errors import UserError
from experiments.data.splits import Split

WORDS = {"train": "training", "validation": "validation", "test": "test"}
_MIDDLE_BYTES = 4096


def find_copies(splits: Mapping[str, Split], *, within: bool = True) -> list[str]:
    """A note for each kind of copy, with an example; `splits` are by name, and of files.

    Without `within`, only copies in two splits are looked for.
    """
    ids = [name for split in splits.values() for name in split.ids]
    role = [name for name, split in splits.items() for _ in split.ids]
    labels = np.concatenate([split.labels for split in splits.values()]).tolist()
    groups = _same_content([path for split in splits.values() for path in split.files])
    # A group may hold thousands of images: its first image of each split and class represents it.
    firsts = [list({(role[i], labels[i]): i for i in reversed(group)}.values()) for group in groups]

    def note(name: str, where: str, advice: str, is_copy: Callable[[int, int], bool]) -> list[str]:
        found = [
            (i, next((j for j in first if is_copy(i, j)), None))
            for group, first in zip(groups, firsts)
            for i in group
            if role[i] == name
        ]
        pairs = [f"{ids[i]} = {ids[j]}" for i, j in found if j is not None]
        images = f"1 {WORDS[name]} image is" if len(pairs) == 1 else f"{len(pairs):,} {WORDS[name]} images are"
        return [f"{images} {where} (for example {pairs[0]}): {advice}"] if pairs else []

    notes = []
    for name, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        advice = "the accuracy on such images is too high; remove one of each"
        notes += note(name, f"also among the {WORDS[other]} images", advice, lambda _, j, other=other: role[j] == other)
    for name in splits if within else ():
        same_split = [
            ("also in another class", "keep the right one of each", lambda i, j: labels[i] != labels[j]),
            ("a second time in the same class", "remove it", lambda i, j: labels[i] == labels[j] and i != j),
        ]
        for where, advice, is_copy in same_split:
            notes += note(name, where, advice, lambda i, j, is_copy=is_copy: role[i] == role[j] and is_copy(i, j))
    return notes


def _same_content(paths: Sequence[Path]) -> list[list[int]]:
    """Groups of files with the same bytes, as indices in order.

    Files are compared by size, then by a piece from the middle, and only then as a whole: uncompressed images often
    have the same size.
    """
    marks, left, groups = [()] * len(paths), range(len(paths)), []
    for mark in (lambda path: path.stat().st_size, _middle, sha256_of_file):
        alike = defaultdict(list)
        for i in tqdm(left, "looking for copies", unit="file", dynamic_ncols=True, leave=False, delay=1):
            try:
                marks[i] += (mark(paths[i]),)
            except OSError as error:
                raise UserError(f"{paths[i]} cannot be read ({error.strerror}); replace or remove it") from error
            alike[marks[i]].append(i)
        groups = [group for group in alike.values() if len(group) > 1]
        left = [i for group in groups for i in group]
    return groups


def _middle(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(file.seek(0, os.SEEK_END) // 2)
        return hashlib.sha256(file.read(_MIDDLE_BYTES)).digest()
