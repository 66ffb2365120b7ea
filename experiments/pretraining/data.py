"""The images of a pretraining: decoded once into one uint8 array, and which of them each step uses."""

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from tqdm.contrib.concurrent import thread_map

from dinojax.errors import UserError
from dinojax.pretraining.step import Batches
from experiments.data.splits import Split
from experiments.data.squares import load_square

Images = UInt8[np.ndarray, "_images height width 3"]


def read_images(split: Split, image_size: int | None, *, indices: Int[np.ndarray, " chosen"] | None = None) -> Images:
    """The images of a split (or those at `indices`) as one array, decoded by several threads.

    Args:
        split: labels are not used.
        image_size: side of the squares that they are resized and cropped to; None leaves them as they are.
        indices: in any order.

    Raises:
        UserError: images of several sizes and no `image_size`, or one that cannot be read.
    """
    indices = np.arange(len(split)) if indices is None else indices
    read = split.read if image_size is None else lambda index: load_square(split, index, image_size)
    first = read(int(indices[0]))
    images = np.empty((len(indices), *first.shape), np.uint8)

    def decode(row: int) -> None:
        pixels = read(int(indices[row]))
        if pixels.shape != first.shape:
            sizes = " and ".join(f"{shape[0]}×{shape[1]}" for shape in (first.shape, pixels.shape))
            raise UserError(f"{split.ids[indices[row]]}: the images have several sizes ({sizes} px); give --image-size")
        images[row] = pixels

    bar = {"desc": f"{split.name} images", "unit": "img", "dynamic_ncols": True, "leave": False}
    thread_map(decode, range(len(indices)), max_workers=os.cpu_count(), **bar)
    return images


def own_statistics(images: Images) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of red, green and blue on a scale of 0 to 1, over all pixels."""
    counts = np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)])
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(axis=1)
    std = np.sqrt(counts @ values**2 / counts.sum(axis=1) - mean**2)
    return tuple(map(float, mean)), tuple(map(float, std))


class Window(NamedTuple):
    """Steps `start` to `stop` of the whole run, all of one epoch; each makes one line of the log."""

    epoch: int
    start: int
    stop: int
    ends_epoch: bool


def windows(start: int, epochs: int, steps_per_epoch: int, size: int) -> Iterator[Window]:
    """The run from step `start` on, in windows of at most `size` steps; every epoch begins a new window."""
    for epoch in range(start // steps_per_epoch, epochs):
        first, last = epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch
        for at in range(first, last, size):
            stop = min(at + size, last)
            if stop > start:
                yield Window(epoch, max(at, start), stop, stop == last)


class EpochSampler:
    """The images of each step: a permutation per epoch, which follows from the seed and the epoch alone."""

    def __init__(self, images: int, batch_size: int, seed: int):
        self.steps_per_epoch = images // batch_size
        self._images, self._batch_size, self._seed = images, batch_size, seed
        self._epoch, self._rows = -1, np.empty(0)

    def batches(self, window: Window, size: int) -> Iterator[tuple[Batches, int]]:
        """The steps of a window in groups of `size`, with the number of steps that count; the last group is padded."""
        if window.epoch != self._epoch:
            permutation = np.random.default_rng((self._seed, window.epoch)).permutation(self._images)
            used = permutation[: self.steps_per_epoch * self._batch_size].astype(np.int32)
            self._epoch, self._rows = window.epoch, used.reshape(self.steps_per_epoch, self._batch_size)
        first = window.epoch * self.steps_per_epoch
        for at in range(window.start - first, window.stop - first, size):
            count = min(size, window.stop - first - at)
            rows = np.resize(self._rows[at : at + count], (size, self._batch_size))
            yield Batches(rows, rows, np.full(size, window.epoch, np.int32)), count
