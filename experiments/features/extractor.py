"""Features of images from a backbone, in one jitted pass per batch, cached on disk so that nothing is computed twice.

An image is cached as tokens [blocks + 1, dim]: the normalised CLS token after each of the last four blocks (of all
blocks, in a model with fewer), followed by the mean of the last block's normalised patch tokens.
"""

import dataclasses
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, UInt8
from tqdm import tqdm

from converters.cache import cache_folder
from dinojax.embedding import default_batch
from dinojax.errors import UserError
from dinojax.images import normalize
from dinojax.models.chunks import in_chunks
from dinojax.models.files import named_parameters
from dinojax.models.preprocessing import Preprocessing
from dinojax.models.vit import VisionTransformer
from dinojax.parallel import batch_sharding, on_mesh, replicated
from dinojax.precision import matmul_precision
from experiments.data.splits import Split, digest
from experiments.data.squares import load_square
from experiments.features.backbones import Normalisation
from experiments.features.cache import ShardCache
from experiments.features.fingerprints import fingerprint
from experiments.features.parts import FeatureParts
from experiments.runs.settings import Dtype, resolve_dtype

LAST_BLOCKS = 4
# Part of the key of cached features. Raise it when the features change.
_REVISION = 1
_SHARD_IMAGES = 512
_BATCHES_AHEAD = 3
_LONG_SECONDS = 600
_TIMED_BATCHES = 3


@dataclasses.dataclass(frozen=True)
class Job:
    """Images `start` to `stop` of a split, whose features are written to `outs`: one array for each output."""

    split: Split
    start: int
    stop: int
    outs: tuple[np.ndarray, ...]


JobT = TypeVar("JobT", bound=Job)


@dataclasses.dataclass(frozen=True)
class _Shard(Job):
    """A shard that is not cached yet."""

    cache: ShardCache
    shard: int


class FeatureExtractor:
    """A model, the transform of its images, and the folder of cached features.

    `fingerprint` identifies the model, `parameters` is the number of its parameters, `dtype` its number type;
    `shape` is that of an image's tokens, `grid` the number of patches along a side.

    Args:
        model: of any size.
        normalisation: mean and standard deviation of the pixels (0–1) that the model expects.
        image_size: pixels that the shorter side is resized to, and the side of the square that is then cropped.
        dtype: number type of the model's computation; "auto" is bfloat16 on accelerators and float32 on a CPU. The
            features are float32.
        batch_size: images per pass; None is what a CPU's cache holds (8 with ViT-S/14 at 224 px), 256 on accelerators.
        cache_dir: its folder `features/`, here `root`, holds the features; None takes `converters.cache.cache_folder`.
        blocks: number of the last blocks whose CLS tokens are kept; at most as many as the model has.
        maps: number of last blocks whose patch tokens, joined, `finished` also gives; `extract` does not.
        mesh: the devices that share each batch, which is rounded up to a multiple of their number; None takes one.

    Raises:
        UserError: a size that the model does not take.
    """

    def __init__(
        self,
        model: VisionTransformer,
        *,
        normalisation: Normalisation,
        image_size: int,
        cache_dir: Path | None,
        dtype: Dtype = "auto",
        batch_size: int | None = None,
        blocks: int = LAST_BLOCKS,
        maps: int = 0,
        mesh: Mesh | None = None,
    ):
        check_image_size(model, image_size)
        self.image_size = image_size
        self.dtype = jnp.dtype(resolve_dtype(dtype))
        self.batch_size = min(batch_size or default_batch(model, (1, image_size, image_size, 3)), _SHARD_IMAGES)
        if mesh is not None:
            self.batch_size = -(-self.batch_size // mesh.size) * mesh.size
        blocks = min(blocks, model.config.depth)
        self.shape = (blocks + 1, model.config.embed_dim)
        self.grid = image_size // model.config.patch_size
        self.root = cache_folder(cache_dir) / "features"
        self.fingerprint = fingerprint(model)
        self.parameters = sum(array.size for array in named_parameters(model).values())
        self._normalisation = [list(map(float, numbers)) for numbers in normalisation]
        self._forward = make_forward(model, normalisation, self.dtype, blocks=blocks, maps=maps, mesh=mesh)

    @property
    def description(self) -> dict[str, object]:
        """What the features of an image depend on, but for the image."""
        return {
            "weights": self.fingerprint,
            "image_size": self.image_size,
            "dtype": self.dtype.name,
            "resize": "shorter side, bicubic, antialiased, centre crop",
            "mean_and_deviation": self._normalisation,
            "features": "images × (CLS of the last blocks, mean patch of the last) × dim, after the final norm",
            "revision": _REVISION,
        }

    def cache(self, split: Split) -> ShardCache:
        """Where the features of a split are kept."""
        description = {"images": split.fingerprint, **self.description}
        key = digest(json.dumps(description, sort_keys=True))[:20]
        return ShardCache(self.root / key, {**description, "split": split.name, "number_of_images": len(split)})

    def extract(self, splits: Sequence[Split]) -> list[FeatureParts]:
        """The features of every image, from the cache where they are in it; one progress bar over all splits.

        Shards are written as they are finished: after an interruption, the same call resumes after the last one.

        Raises:
            UserError: an image that cannot be decoded (named; whole shards before it are kept), a cache that cannot
                be written, or features that are not finite.
        """
        arrays = [np.empty((len(split), *self.shape), np.float32) for split in splits]
        jobs = [job for split, array in zip(splits, arrays) for job in self._missing(split, array)]
        total, todo = sum(map(len, splits)), sum(job.stop - job.start for job in jobs)
        if not jobs:
            print(f"features: all {total:,} images from the cache {self.root}", flush=True)
            return [FeatureParts.of_tokens(array) for array in arrays]
        with tqdm(total=total, initial=total - todo, unit="img", desc="features", dynamic_ncols=True) as bar:
            for job in self.finished(jobs, Forecast(bar, todo)):
                job.cache.write(job.shard, *job.outs)
        return [FeatureParts.of_tokens(array) for array in arrays]

    def _missing(self, split: Split, array: np.ndarray) -> Iterator[_Shard]:
        """Fills `array` with the cached shards; yields the missing ones."""
        cache = self.cache(split)
        for shard, start in enumerate(range(0, len(split), _SHARD_IMAGES)):
            stop = min(start + _SHARD_IMAGES, len(split))
            found = cache.read(shard, (stop - start, *self.shape))
            if found is None:
                yield _Shard(split, start, stop, (array[start:stop],), cache, shard)
            else:
                array[start:stop] = found

    def finished(self, jobs: Iterable[JobT], forecast: "Forecast") -> Iterator[JobT]:
        """Does the jobs in their order, and yields each when it is done; few are started at a time.

        Raises:
            UserError: an image that cannot be decoded (named; jobs whose images come before it are done), or features
                that are not finite.
        """
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1), "decode") as pool:
            try:
                results = (
                    (job, start, count, self._forward(batch)) for job, start, count, batch in self._batches(jobs, pool)
                )
                for job, start, count, features in _one_behind(results):
                    for out, feature in zip(job.outs, features, strict=True):
                        out[start - job.start : start - job.start + count] = np.asarray(feature)[:count]
                    forecast.update(count)
                    if start + count == job.stop:
                        _check_finite(job)
                        yield job
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _batches(self, jobs: Iterable[JobT], pool: ThreadPoolExecutor) -> Iterator[tuple[JobT, int, int, np.ndarray]]:
        """Job, first image, number of images, and pixels; the last batch of a shard is padded with black images."""
        size, square = self.batch_size, self.image_size
        started = (
            (job, start, [pool.submit(load_square, job.split, i, square) for i in range(start, stop)])
            for job in jobs
            for start, stop in ((at, min(at + size, job.stop)) for at in range(job.start, job.stop, size))
        )
        ahead = deque(itertools.islice(started, _BATCHES_AHEAD))
        while ahead:
            job, start, futures = ahead.popleft()
            ahead.extend(itertools.islice(started, 1))
            batch = np.zeros((size, square, square, 3), np.uint8)
            for row, future in enumerate(futures):
                batch[row] = future.result()
            yield job, start, len(futures), batch


class Forecast:
    """The progress bar, and an early note on what makes the work shorter, if it will take long.

    Args:
        bar: counts images.
        todo: number of images that are not done yet.
        fewer: how the command is told to take fewer images.
    """

    def __init__(self, bar: tqdm, todo: int, fewer: str = "fewer images (--max-train, --max-test)"):
        self._bar, self._todo, self._batches, self._timed, self._start = bar, todo, 0, 0, 0.0
        self._fewer = fewer

    def update(self, count: int) -> None:
        """Counts `count` more images as done."""
        self._bar.update(count)
        self._batches += 1
        self._todo -= count
        if self._batches == 1:  # the first batch includes the compilation
            self._start = time.perf_counter()
            return
        self._timed += count
        if self._batches == 1 + _TIMED_BATCHES:
            seconds = self._todo * (time.perf_counter() - self._start) / self._timed
            if seconds > _LONG_SECONDS:
                self._bar.write(
                    f"note: about {seconds / 60:.0f} minutes left on this {jax.devices()[0].device_kind}; "
                    f"{self._fewer}, a smaller --image-size or a GPU take less. Ctrl-C keeps what is done."
                )


def make_forward(
    model: VisionTransformer,
    normalisation: Normalisation,
    dtype: np.dtype,
    *,
    blocks: int = LAST_BLOCKS,
    maps: int = 0,
    mesh: Mesh | None = None,
) -> Callable[[UInt8[np.ndarray, "batch size size 3"]], tuple[Array, ...]]:
    """From uint8 pixels to float32 tokens "batch tokens dim" (see the top of the file).

    With `maps`, the float16 patch tokens of that many last blocks, "batch rows columns maps·dim", are the second
    output. The parameters are cast to `dtype` once; on a mesh they are whole on each device, and the batch is divided.
    """
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda x: x.astype(dtype), state)
    blocks = min(blocks, model.config.depth)
    preprocessing = Preprocessing(*normalisation)

    def forward(state, pixels):
        images = normalize(pixels, preprocessing)
        with jax.default_matmul_precision(matmul_precision(dtype)):
            network = nnx.merge(graphdef, state)
            last_blocks = partial(network.get_intermediate_layers, n=blocks, return_class_token=True)
            layers = in_chunks(last_blocks, model.config, images.astype(dtype))
        patches = layers[-1][0].astype(jnp.float32)
        cls_tokens = [cls_token.astype(jnp.float32) for _, cls_token in layers]
        tokens = jnp.stack([*cls_tokens, patches.mean(axis=1)], axis=1)
        if not maps:
            return (tokens,)
        grid = [side // model.config.patch_size for side in pixels.shape[1:3]]
        joined = jnp.concatenate([patches for patches, _ in layers[-maps:]], axis=-1)
        return tokens, joined.reshape(len(pixels), *grid, -1).astype(jnp.float16)

    if mesh is None or mesh.size == 1:
        forward = jax.jit(forward)
        return lambda pixels: forward(state, pixels)
    forward, state = jax.jit(on_mesh(forward, mesh)), jax.device_put(state, replicated(mesh))
    return lambda pixels: forward(state, jax.device_put(pixels, batch_sharding(mesh)))


def seen_size(model: VisionTransformer, image_size: int) -> str:
    """A note about the pixels that models of the family dino cut off; "" where whole patches fill the image."""
    patch = model.config.patch_size
    seen = image_size // patch * patch
    if seen == image_size:
        return ""
    return (
        f"images of {image_size}×{image_size} px are not whole patches of {patch} px: the model sees {seen}×{seen} px, "
        "and the rest on the right and at the bottom is cut off"
    )


def check_image_size(model: VisionTransformer, image_size: int) -> None:
    """Raises a `UserError` for a size that the model does not take."""
    patch, needs_multiple = model.config.patch_size, model.config.family == "dinov2"
    if image_size < patch:
        raise UserError(f"--image-size {image_size} is smaller than one patch; take a multiple of {patch}")
    if needs_multiple and image_size % patch:
        below = image_size // patch * patch
        raise UserError(
            f"--image-size {image_size} is not a multiple of the model's patch size {patch}; "
            f"take {below} or {below + patch}"
        )


def _one_behind(results: Iterator[tuple]) -> Iterator[tuple]:
    """The same results, each after the next one has started, so that the device never waits for the host."""
    previous = None
    try:
        for result in results:
            if previous:
                yield previous
            previous = result
    except (UserError, KeyboardInterrupt):  # while the next batch is decoded; this one may complete a shard
        if previous:
            yield previous
        raise
    if previous:
        yield previous


def _check_finite(job: Job) -> None:
    if not all(np.isfinite(out).all() for out in job.outs):
        raise UserError(
            f"the features of {job.split.name} images {job.start} to {job.stop - 1} are not finite: the weights are "
            "damaged, or overflow in this precision (try --dtype float32)"
        )
