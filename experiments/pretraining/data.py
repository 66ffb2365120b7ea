"""The images of a pretraining: decoded once into one uint8 array, and which of them each step uses."""

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from tqdm.contrib.concurrent import thread_map

from dinojax.errors import UserError
from dinojax.images.decode import Pixels
from dinojax.pretraining.step import Batches
from experiments.data.splits import Dataset, Split
from experiments.data.squares import load_square
from experiments.pretraining.config import PretrainConfig

_MOST_CROPS = 4  # global crops along each side of an image that is stored as it is
_MOST_MEMORY = 0.8  # share of the memory
Images = UInt8[np.ndarray, "_images height width 3"]


class SeveralSizesError(UserError):
    """Images of several sizes, which one array does not hold."""


def read_stored(dataset: Dataset, config: PretrainConfig) -> tuple[Images, int | None]:
    """The training images as they are stored, and the side of their squares, or None where they are as they are.

    Raises:
        UserError: an image that cannot be read, or more images than the memory holds.
    """
    split, side = dataset.train, config.dataset.image_size
    if side is not None:
        return read_images(split, side), side
    height, width, _ = split.read(0).shape
    if height * width <= (_MOST_CROPS * config.crops.global_size) ** 2:
        try:
            return read_images(split, None), None
        except SeveralSizesError as error:
            reason = str(error)
    else:
        reason = f"the images have {width}×{height} px"
    side = config.default_image_size
    print(f"note: {reason}; they are stored as squares of {side} px (--image-size)", flush=True)
    return read_images(split, side), side


def read_images(split: Split, image_size: int | None, *, indices: Int[np.ndarray, " chosen"] | None = None) -> Images:
    """The images of a split (or those at `indices`) as one array, decoded by several threads.

    Args:
        split: labels are not used.
        image_size: side of the squares that they are resized and cropped to; None leaves them as they are.
        indices: in any order.

    Raises:
        SeveralSizesError: images of several sizes and no `image_size`.
        UserError: an image that cannot be read, or more images than the memory holds.
    """
    indices = np.arange(len(split)) if indices is None else indices
    read = split.read if image_size is None else lambda index: load_square(split, index, image_size)
    first = read(int(indices[0]))
    _check_memory(len(indices), first)
    images = np.empty((len(indices), *first.shape), np.uint8)

    def decode(row: int) -> None:
        pixels = read(int(indices[row]))
        if pixels.shape != first.shape:
            sizes = " and ".join(f"{shape[1]}×{shape[0]}" for shape in (first.shape, pixels.shape))
            raise SeveralSizesError(f"the images have several sizes (such as {sizes} px)")
        images[row] = pixels

    bar = {"desc": f"{split.name} images", "unit": "img", "dynamic_ncols": True, "leave": False}
    thread_map(decode, range(len(indices)), max_workers=os.cpu_count(), **bar)
    return images


def _check_memory(count: int, first: Pixels) -> None:
    needed, there = count * first.nbytes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > _MOST_MEMORY * there:
        height, width, _ = first.shape
        raise UserError(
            f"{count:,} images of {width}×{height} px take {needed / 1e9:.0f} GB, and the memory has {there / 1e9:.0f} "
            "GB; give a smaller --image-size, or fewer images with --max-train"
        )


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
