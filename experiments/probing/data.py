"""What the classifiers are fitted to and evaluated on: folds of the training images, and features of all images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dinojax.probes import split_heldout
from experiments.data.load import load_dataset
from experiments.data.splits import Dataset
from experiments.data.squares import centre_cropped
from experiments.data.views import augmented
from experiments.features.extractor import FeatureExtractor
from experiments.features.parts import FeatureParts
from experiments.features.raw_pixels import RawPixels
from experiments.probing.config import EvaluationConfig

FRAME = 8  # px by which the notebooks' validation transform resizes beyond the square that it crops


class Fold(NamedTuple):
    """Indices of the training images to learn from, and of others to select on."""

    kept: Int[np.ndarray, " kept"]
    heldout: Int[np.ndarray, " heldout"]

    @property
    def rows(self) -> Int[np.ndarray, " images"]:
        """Indices of all its images, ascending."""
        return np.sort(np.concatenate(self))


class TrainingFeatures(NamedTuple):
    """Features of the training images: all that a fit sees.

    Attributes:
        plain: of the images as they are evaluated.
        views: of random views of each image.
        crops: of one random crop of each image.
        framed: of the held-out images of all folds, in order, resized to a little more than is cropped.
        heldout: indices of those images.
    """

    plain: FeatureParts
    views: Sequence[FeatureParts] = ()
    crops: FeatureParts | None = None
    framed: FeatureParts | None = None
    heldout: Int[np.ndarray, " heldout"] | None = None

    def framed_of(self, images: Int[np.ndarray, " images"]) -> FeatureParts:
        """Of held-out images by their indices."""
        return self.framed[np.searchsorted(self.heldout, images)]


class UnseenFeatures(NamedTuple):
    """Features and labels of the test images; `framed` is for what was fitted to crops."""

    plain: FeatureParts
    labels: Int[np.ndarray, " images"]
    framed: FeatureParts | None = None


class SealedTest:
    """The test images, behind a seal that can be broken once."""

    def __init__(self, content: UnseenFeatures):
        self._content: UnseenFeatures | None = content

    def open(self) -> UnseenFeatures:
        """The content. A second call is a bug."""
        if self._content is None:
            raise RuntimeError("the test set was opened before: nothing may be selected after a look at it")
        content, self._content = self._content, None
        return content


def load_data(config: EvaluationConfig) -> Dataset:
    """The labelled images of the settings.

    Raises:
        UserError: they are not there, or cannot be read.
    """
    data = config.dataset
    return load_dataset(
        data.data,
        data_dir=data.data_dir,
        val_fraction=data.val_fraction,
        dividable=True,
        max_train=data.max_train,
        max_test=data.max_test,
        seed=config.run.seed,
    )


def make_fold(labels: Int[np.ndarray, " images"], config: EvaluationConfig, rows: np.ndarray | None = None) -> Fold:
    """All training images, or those in `rows`, of which a share is held out."""
    rows = np.arange(len(labels)) if rows is None else rows
    parts = split_heldout(labels[rows], config.probes.heldout_fraction, config.run.seed)
    return Fold(*(rows[part] for part in parts))


def extract(
    config: EvaluationConfig, source: FeatureExtractor | RawPixels, dataset: Dataset, folds: Sequence[Fold]
) -> tuple[TrainingFeatures, SealedTest]:
    """All features that the classifiers need, from the cache where they are in it."""
    size, train, test = source.image_size, dataset.train, dataset.test
    resize = config.networks.resize or size
    splits = [split if resize == size else centre_cropped(split, resize, size) for split in (train, test)]
    splits += [augmented(train, view, size) for view in range(config.probes.augment)]
    if "crops" not in config.probes.names:
        plain, plain_test, *views = source.extract(splits)
        return TrainingFeatures(plain, views), SealedTest(UnseenFeatures(plain_test, test.labels))
    heldout = np.unique(np.concatenate([fold.heldout for fold in folds]))
    framed = [centre_cropped(split, size + FRAME, size) for split in (train.subset(heldout), test)]
    found = source.extract([*splits, augmented(train, 0, size), *framed])
    plain, plain_test, *views, crops, framed_train, framed_test = found
    training = TrainingFeatures(plain, views, crops, framed_train, heldout)
    return training, SealedTest(UnseenFeatures(plain_test, test.labels, framed_test))
