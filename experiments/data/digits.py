"""The scans of handwritten digits inside scikit-learn, as a data set that needs no download."""

import dataclasses

import numpy as np

from dinojax.probes import stratified_subset
from experiments.data.splits import Dataset, Split, digest


def load_digits() -> Dataset:
    """The 1,797 scans of handwritten digits inside scikit-learn, 8×8 px; a fixed stratified fifth is for testing."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None].repeat(3, axis=3)
    everything = Split(
        "", [str(i) for i in range(len(images))], digits.target, images.__getitem__, digest(images.tobytes())
    )
    kept = stratified_subset(digits.target, round(0.8 * len(images)), seed=0)
    rest = np.setdiff1d(np.arange(len(images)), kept)
    train, test = (
        dataclasses.replace(everything.subset(part), name=name) for name, part in (("train", kept), ("test", rest))
    )
    return Dataset("digits", tuple(map(str, digits.target_names)), train, test)
