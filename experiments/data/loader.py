"""Batches of images, decoded by several threads ahead of the device, in an order that follows from the seed.

Memory holds a bounded number of prepared images, all of one small size, and the image that each thread decodes. It does
not grow with the number or the size of the photos.
"""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from dinojax.images.decode import Pixels, one_large_image
from dinojax.images.resize import Square
from experiments.data.splits import Split

_BATCHES_AHEAD = 2
_MOST_THREADS = 16


class Batch(NamedTuple):
    """Images of one size. The last batch of an epoch is padded with black images, whose numbers are −1.

    Attributes:
        images: RGB.
        labels: class indices.
        rows: indices in the split.
        ids: numbers to draw the views of images from, different for any two images of an epoch: the row or, for an
            image that balanced sampling has drawn before, another number.
    """

    images: UInt8[np.ndarray, "batch height width 3"]
    labels: Int[np.ndarray, " batch"]
    rows: Int[np.ndarray, " batch"]
    ids: Int[np.ndarray, " batch"]


def make_loader(
    split: Split,
    *,
    batch_size: int,
    prepare: Callable[[Pixels], Square],
    shuffle_seed: int | None,
    epoch: int,
    balanced: bool = False,
    threads: int | None = None,
) -> Iterator[Batch]:
    """One epoch of a split, in batches of one size; the last one is padded, see `Batch`.

    The order follows from the split, the seed and the epoch alone. Threads end with the iterator.

    Args:
        split: images of any sizes.
        batch_size: images per batch.
        prepare: brings an image to the size that all images get, such as `resize_square`.
        shuffle_seed: seed of the order. None keeps the order of the split.
        epoch: number of the epoch; each has another order.
        balanced: whether to draw every class equally often, its images with replacement; the number of images stays.
        threads: number of decoding threads. None is one for each core, at most 16.

    Raises:
        UserError: an image cannot be read.
        ValueError: balanced sampling without a seed.
    """
    rows = epoch_rows(split, shuffle_seed, epoch, balanced=balanced)
    return _batches(split, rows, batch_size, prepare, threads or min(_MOST_THREADS, os.cpu_count() or 1))


def _batches(
    split: Split,
    rows: Int[np.ndarray, " images"],
    batch_size: int,
    prepare: Callable[[Pixels], Square],
    threads: int,
) -> Iterator[Batch]:
    import grain

    ids = _ids(rows)

    def load(place: int) -> tuple[Square, np.int32, np.int64, np.int32]:
        row = rows[place]
        with one_large_image():
            image = prepare(split.read(int(row)))
        return image, np.int32(split.labels[row]), row, ids[place]

    ahead = max(_BATCHES_AHEAD * batch_size, threads)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    images = grain.MapDataset.range(len(rows)).map(load).to_iter_dataset(options)
    iterator = iter(images.batch(batch_size, drop_remainder=False))
    try:
        for batch in iterator:
            yield _filled(Batch(*batch), batch_size)
    finally:  # also after an unreadable image, or if the caller stops early
        iterator.close()


def _filled(batch: Batch, size: int) -> Batch:
    missing = size - len(batch.labels)
    if not missing:
        return batch
    images = np.pad(batch.images, ((0, missing), (0, 0), (0, 0), (0, 0)))
    return Batch(images, *(np.pad(numbers, (0, missing), constant_values=-1) for numbers in batch[1:]))


def epoch_rows(split: Split, seed: int | None, epoch: int, *, balanced: bool) -> Int[np.ndarray, " images"]:
    """Indices of the images of an epoch, in its order; see `make_loader`."""
    images = len(split)
    if seed is None:
        if balanced:
            raise ValueError("balanced sampling draws at random: it needs shuffle_seed")
        return np.arange(images)
    rng = np.random.default_rng((seed, epoch))
    if not balanced:
        return rng.permutation(images)
    classes = rng.permutation(np.unique(split.labels))  # the first ones get the remainder
    turns = np.bincount(np.arange(images) % len(classes), minlength=len(classes))
    drawn = [rng.choice(np.flatnonzero(split.labels == label), turn) for label, turn in zip(classes, turns)]
    return rng.permutation(np.concatenate(drawn))


def _ids(rows: Int[np.ndarray, " images"]) -> Int[np.ndarray, " images"]:
    """The rows, to which each repetition of a row adds the number of images."""
    order = np.argsort(rows, kind="stable")
    earlier = np.empty_like(rows)
    earlier[order] = np.arange(len(rows)) - np.searchsorted(rows[order], rows[order])
    return ((rows + earlier * len(rows)) % 2**31).astype(np.int32)
