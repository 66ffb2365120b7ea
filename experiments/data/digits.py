"""scikit-learn's scans of handwritten digits, a data set that needs no download."""

import dataclasses

import numpy as np

from dinojax.probes import stratified_subset
from experiments.data.splits import Dataset, Split, digest


def load_digits() -> Dataset:
    """1,797 images of 8×8 px. A fixed fifth, drawn from every class in proportion, is the test split."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None].repeat(3, axis=3)
    everything = Split(
        "", [str(i) for i in range(len(images))], digits.target, images.__getitem__, digest(images.tobytes())
    )
    training = stratified_subset(digits.target, round(0.8 * len(images)), seed=0)
    parts = {"train": training, "test": np.setdiff1d(np.arange(len(images)), training)}
    train, test = (dataclasses.replace(everything.subset(rows), name=name) for name, rows in parts.items())
    return Dataset("digits", tuple(map(str, digits.target_names)), train, test)
