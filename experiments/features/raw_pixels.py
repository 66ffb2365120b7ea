"""Raw pixels in the place of features: what any model has to beat."""

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from tqdm.contrib.concurrent import thread_map

from experiments.data.splits import Split
from experiments.data.squares import load_square


class RawPixels:
    """Stands where a `FeatureExtractor` stands: the same images at the same size, as they are (0–1), in one row.

    The row is there twice, because classifiers take the last token but one.
    """

    def __init__(self, image_size: int):
        self.image_size = image_size
        self.shape = (2, 3 * image_size**2)

    def extract(self, splits: Sequence[Split]) -> list[Float[np.ndarray, "images 2 dim"]]:
        """The pixels of every image; nothing is cached, decoding them is fast."""
        arrays = [np.empty((len(split), *self.shape), np.float32) for split in splits]
        places = [(split, i, array) for split, array in zip(splits, arrays) for i in range(len(split))]

        def read(place: tuple[Split, int, np.ndarray]) -> None:
            split, i, array = place
            array[i] = load_square(split, i, self.image_size).ravel() / np.float32(255)

        thread_map(read, places, max_workers=os.cpu_count(), desc="pixels", unit="img", dynamic_ncols=True)
        return arrays
