"""Square windows of photos, and their patch features: cached on disk for training, or computed and dropped."""

import dataclasses
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float16
from tqdm import tqdm

from dinojax.dense import tile_starts
from dinojax.errors import UserError
from dinojax.images.decode import Pixels, one_large_image
from dinojax.images.resize import Resampling, resize_to_multiple
from experiments.data.splits import Split, digest
from experiments.features.cache import ShardCache
from experiments.features.extractor import FeatureExtractor, Forecast, Job

SHARD_WINDOWS = 64
_KEPT_PHOTOS = 8
_MOST_MEMORY = 0.7  # share of the memory

Features = Float16[np.ndarray, "windows rows columns width"]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How photos are resized and cut.

    Attributes:
        image_size: px that the shorter side is resized to; both sides are rounded to whole patches.
        window: side of the square windows in px.
        overlap: least share of a window that the next one covers too.
        patch: side of a patch in px.
        interpolation: filter of the resizing.
    """

    image_size: int
    window: int
    overlap: float
    patch: int
    interpolation: str = "bicubic"

    def shorter(self, scale: float = 1.0) -> int:
        """Px of the shorter side at a scale."""
        return max(self.patch, round(self.image_size * scale))

    def tile(self, scale: float = 1.0) -> int:
        """Patches along the side of a window."""
        return min(max(1, self.window // self.patch), max(1, round(self.shorter(scale) / self.patch)))

    def grid(self, size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
        """Rows and columns of patches of a photo of `size` (height, width) px, as `resize_to_multiple` rounds them."""
        shorter = self.shorter(scale)
        rows, columns = (max(1, round(shorter * side / min(size) / self.patch)) for side in size)
        return rows, columns


class Window(NamedTuple):
    """A window of photo `photo`, whose upper left patch is at row `top` and column `left`; a mirrored one is flipped
    after it is cut."""

    photo: int
    top: int
    left: int
    mirrored: bool = False


def windows_of(
    sizes: Sequence[tuple[int, int]], geometry: Geometry, scale: float = 1.0, *, mirror: bool = False
) -> list[Window]:
    """The windows of photos, photo by photo; with `mirror`, each is followed by its mirror image."""
    tile, found = geometry.tile(scale), []
    for photo, size in enumerate(sizes):
        tops, lefts = (tile_starts(cells, tile, geometry.overlap) for cells in geometry.grid(size, scale))
        for top in tops:
            for left in lefts:
                found += [Window(photo, top, left, mirrored) for mirrored in ((False, True) if mirror else (False,))]
    return found


class _Recent:
    """What was made for the last keys that were asked for; several threads that ask for one wait for each other."""

    def __init__(self, make: Callable[[int], Pixels]):
        self._make, self._lock = make, threading.Lock()
        self._kept: OrderedDict[int, tuple[threading.Lock, list[Pixels]]] = OrderedDict()

    def __call__(self, key: int) -> Pixels:
        with self._lock:
            own, made = self._kept.setdefault(key, (threading.Lock(), []))
            self._kept.move_to_end(key)
            while len(self._kept) > _KEPT_PHOTOS:
                self._kept.popitem(last=False)
        with own:
            if not made:
                made.append(self._make(key))
            return made[0]


def window_split(photos: Split, windows: Sequence[Window], geometry: Geometry, scale: float = 1.0) -> Split:
    """The windows as a split of square images."""
    resample, shorter = Resampling[geometry.interpolation.upper()], geometry.shorter(scale)
    side = geometry.tile(scale) * geometry.patch

    def resized(photo: int) -> Pixels:
        with one_large_image():
            return resize_to_multiple(photos.read(photo), shorter, geometry.patch, resample=resample)

    recent = _Recent(resized)

    def read(index: int) -> Pixels:
        window = windows[index]
        top, left = window.top * geometry.patch, window.left * geometry.patch
        cut = recent(window.photo)[top : top + side, left : left + side]
        return np.ascontiguousarray(cut[:, ::-1] if window.mirrored else cut)

    recipe = json.dumps([dataclasses.asdict(geometry), scale, len(windows)])
    return dataclasses.replace(
        photos,
        ids=[f"{photos.ids[w.photo]} at {w.top} {w.left}" for w in windows],
        labels=np.zeros(len(windows), np.int64),
        read=read,
        fingerprint=digest(photos.fingerprint, recipe),
        identity=digest(photos.identity, recipe),
        files=(),
    )


@dataclasses.dataclass(frozen=True)
class _Shard(Job):
    """Windows whose features are not cached yet."""

    cache: ShardCache
    shard: int


def cached_features(extractor: FeatureExtractor, split: Split, blocks: int) -> Features:
    """The patch features of all windows, from the cache where they are in it; otherwise computed and cached.

    Whole shards are kept: after an interruption, the same call resumes after the last one.

    Args:
        extractor: with `maps` = `blocks`, for windows of this size.
        split: the windows.
        blocks: number of last blocks whose patches are joined.

    Raises:
        UserError: a photo that cannot be read, a cache that cannot be written, or features that are not finite.
    """
    cache = _cache(extractor, split, blocks)
    array = np.empty((len(split), extractor.grid, extractor.grid, blocks * extractor.shape[1]), np.float16)
    jobs = []
    for shard, start in enumerate(range(0, len(split), SHARD_WINDOWS)):
        part = array[start : start + SHARD_WINDOWS]
        found = cache.read(shard, part.shape)
        if found is None:
            tokens = np.empty((len(part), *extractor.shape), np.float32)
            jobs.append(_Shard(split, start, start + len(part), (tokens, part), cache, shard))
        else:
            part[:] = found
    todo = sum(job.stop - job.start for job in jobs)
    options = {"total": len(split), "initial": len(split) - todo, "unit": "window", "dynamic_ncols": True}
    with tqdm(desc=f"{split.name} features", disable=not jobs, **options) as bar:
        for job in extractor.finished(jobs, Forecast(bar, todo, "fewer images (--max-train, --max-val)")):
            job.cache.write(job.shard, job.outs[1])
    return array


def streamed_features(extractor: FeatureExtractor, split: Split, blocks: int, forecast: Forecast) -> Iterator[Features]:
    """The same, some windows after the other; nothing is kept."""
    width = blocks * extractor.shape[1]
    jobs = (
        Job(split, start, stop, (np.empty((stop - start, *extractor.shape), np.float32),
                                 np.empty((stop - start, extractor.grid, extractor.grid, width), np.float16)))
        for start, stop in ((at, min(at + SHARD_WINDOWS, len(split))) for at in range(0, len(split), SHARD_WINDOWS))
    )  # fmt: skip
    for job in extractor.finished(jobs, forecast):
        yield job.outs[1]


def check_memory(windows: int, numbers: int, pixels: int, bytes_of_pixel: int) -> None:
    """Raises a `UserError` if features (2 bytes a number) and targets of all windows would not fit the memory."""
    needed = windows * (2 * numbers + bytes_of_pixel * pixels)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > _MOST_MEMORY * there:
        raise UserError(
            f"the features and targets of {windows:,} windows take {needed / 1e9:.0f} GB, and this machine has "
            f"{there / 1e9:.0f} GB of memory; pass --max-train, a smaller --image-size, or fewer --blocks"
        )


def _cache(extractor: FeatureExtractor, split: Split, blocks: int) -> ShardCache:
    description = {
        **extractor.description,
        "images": split.fingerprint,
        "resize": "windows of photos, whose geometry is part of the images' hash",
        "features": f"patch tokens of the last {blocks} blocks, joined, after the final norm, float16",
    }
    key = digest(json.dumps(description, sort_keys=True))[:20]
    return ShardCache(
        extractor.root / key, {**description, "split": split.name, "number_of_images": len(split)}, np.float16
    )
