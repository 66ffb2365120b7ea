"""Images of a split in batches, decoded by several threads ahead of the device, in an order that the seed fixes.

In memory wait only prepared images, all of one small size, beside the one that each thread decodes: however many photos
there are and however large, no more are held.
"""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from dinojax.errors import UserError
from experiments.data.splits import Pixels, Split
from experiments.data.squares import Square

_BATCHES_AHEAD = 2
_MOST_THREADS = 16


class Batch(NamedTuple):
    """Images of one size, and what they are; where the last batch had to be filled up, black images and −1.

    Attributes:
        images: RGB.
        labels: class indices.
        rows: places in the split.
        ids: what a view of an image may be drawn from, unlike for any two images of an epoch: the row and, where
            balanced sampling drew an image before, another number.
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
    drop_remainder: bool,
    balanced: bool = False,
    threads: int | None = None,
) -> Iterator[Batch]:
    """One epoch of a split, in batches that are all of one size.

    The order follows from the split, the seed and the epoch alone. Threads end with the iterator.

    Args:
        split: of images of any sizes.
        batch_size: images.
        prepare: makes an image of the one size that all get, `resize_square` or `resize_centre_crop`.
        shuffle_seed: None keeps the order of the split.
        epoch: shuffled anew in each.
        drop_remainder: leave out the images that fill no batch; otherwise the last batch is filled up, see `Batch`.
        balanced: every class equally often, its images drawn with replacement; the epoch is as long as ever.
        threads: that decode; None is one for each core, at most 16.

    Raises:
        UserError: at once, where there is no whole batch and the remainder is dropped; later, and by name, an image
            that cannot be read.
        ValueError: balanced sampling without a seed.
    """
    if drop_remainder and len(split) < batch_size:
        raise UserError(f"--batch-size {batch_size} is more than the {len(split)} {split.name} images; lower it")
    rows = epoch_rows(split, shuffle_seed, epoch, balanced=balanced)
    return _batches(
        split, rows, batch_size, prepare, drop_remainder, threads or min(_MOST_THREADS, os.cpu_count() or 1)
    )


def _batches(
    split: Split,
    rows: Int[np.ndarray, " images"],
    batch_size: int,
    prepare: Callable[[Pixels], Square],
    drop_remainder: bool,
    threads: int,
) -> Iterator[Batch]:
    import grain

    ids = _ids(rows)

    def load(place: int) -> tuple[Square, np.int32, np.int64, np.int32]:
        row = rows[place]
        return prepare(split.read(int(row))), np.int32(split.labels[row]), row, ids[place]

    ahead = max(_BATCHES_AHEAD * batch_size, threads)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    images = grain.MapDataset.range(len(rows)).map(load).to_iter_dataset(options)
    iterator = iter(images.batch(batch_size, drop_remainder=drop_remainder))
    try:
        for batch in iterator:
            yield _filled(Batch(*batch), batch_size)
    finally:  # also where an image cannot be read, or nobody asks for more
        iterator.close()


def _filled(batch: Batch, size: int) -> Batch:
    missing = size - len(batch.labels)
    if not missing:
        return batch
    images = np.pad(batch.images, ((0, missing), (0, 0), (0, 0), (0, 0)))
    return Batch(images, *(np.pad(numbers, (0, missing), constant_values=-1) for numbers in batch[1:]))


def epoch_rows(split: Split, seed: int | None, epoch: int, *, balanced: bool) -> Int[np.ndarray, " images"]:
    """Which image comes when in an epoch; see `make_loader`."""
    images = len(split)
    if seed is None:
        if balanced:
            raise ValueError("balanced sampling draws at random: it needs shuffle_seed")
        return np.arange(images)
    rng = np.random.default_rng((seed, epoch))
    if not balanced:
        return rng.permutation(images)
    classes = rng.permutation(np.unique(split.labels))  # those in front get the images that are left over
    turns = np.bincount(np.arange(images) % len(classes), minlength=len(classes))
    drawn = [rng.choice(np.flatnonzero(split.labels == label), turn) for label, turn in zip(classes, turns)]
    return rng.permutation(np.concatenate(drawn))


def _ids(rows: Int[np.ndarray, " images"]) -> Int[np.ndarray, " images"]:
    """The rows; where one comes again, moved on by the number of images each time."""
    order = np.argsort(rows, kind="stable")
    earlier = np.empty_like(rows)
    earlier[order] = np.arange(len(rows)) - np.searchsorted(rows[order], rows[order])
    return ((rows + earlier * len(rows)) % 2**31).astype(np.int32)
