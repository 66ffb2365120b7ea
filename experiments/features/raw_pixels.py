"""Raw pixels as features: the baseline that every model has to beat."""

import os
from collections.abc import Sequence

import numpy as np
from tqdm.contrib.concurrent import thread_map

from experiments.data.splits import Split
from experiments.data.squares import load_square
from experiments.features.parts import FeatureParts


class RawPixels:
    """A source of features, as a `FeatureExtractor` is: the same images at the same size, with values from 0 to 1."""

    def __init__(self, image_size: int):
        self.image_size = image_size

    def extract(self, splits: Sequence[Split]) -> list[FeatureParts]:
        """The pixels of every image, which are not cached, because decoding is fast."""
        arrays = [np.empty((len(split), 3 * self.image_size**2), np.float32) for split in splits]
        places = [(split, i, array) for split, array in zip(splits, arrays) for i in range(len(split))]

        def read(place: tuple[Split, int, np.ndarray]) -> None:
            split, i, array = place
            array[i] = load_square(split, i, self.image_size).ravel() / np.float32(255)

        thread_map(read, places, max_workers=os.cpu_count(), desc="pixels", unit="img", dynamic_ncols=True)
        return [FeatureParts(pixels=array) for array in arrays]
