"""Labels of a video's first frame carried to the others by the similarity of patches, as DINO evaluates on DAVIS.

Source: facebookresearch/dino 7c446df `eval_video_segmentation.py` (the rule and its constants).
"""

from collections.abc import Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image

from dinojax.errors import require
from dinojax.patches.matching import unit

LAST_FRAMES, RADIUS, TOP_K, TEMPERATURE = 7, 12, 5, 0.1
_SIDE = 16  # patches of the frame's blocks; each is compared with its own surroundings only
_AFFINITIES = 2**24  # that are in memory at once: 64 MiB of float32
_GROUP = 32  # affinities whose largest stands for them in the search for the k-th largest


def propagate_labels(
    features: Float[Array | np.ndarray, "rows columns dim"],
    context: Float[Array | np.ndarray, "frames rows columns dim"],
    labels: Float[Array | np.ndarray, "frames rows columns labels"],
    *,
    valid: Bool[Array | np.ndarray, " frames"] | None = None,
    radius: int = RADIUS,
    top_k: int = TOP_K,
    temperature: float = TEMPERATURE,
) -> Float[Array, "rows columns labels"]:
    """The labels of a frame, as weighted means of those of similar patches in other frames.

    The weight of a patch is exp(cosine similarity / `temperature`). Those of the `top_k` largest weights count, of all
    frames together, and those that are equal to the last of them.

    Args:
        features: patch features of the frame.
        context: patch features of frames whose labels are known.
        labels: their labels, such as one-hot vectors.
        valid: which of these frames count; None takes all.
        radius: largest distance, in rows and in columns, of patches that are compared; 0 compares all.
        top_k: number of largest weights.
        temperature: of the weights.

    Raises:
        UserError: a radius, number or temperature that no propagation has.
    """
    rows, columns = features.shape[:2]
    require(radius >= 0, "radius", radius, "0 or more")
    require(1 <= top_k <= rows * columns, "top_k", top_k, f"between 1 and the {rows * columns:,} patches of a frame")
    require(temperature > 0, "temperature", temperature, "a positive number")
    valid = np.ones(len(context), bool) if valid is None else valid
    return _propagate(features, context, labels, valid, temperature, radius=radius or max(rows, columns), top_k=top_k)


def propagate_video(
    frames: Iterable[Float[Array | np.ndarray, "rows columns dim"]],
    first_labels: Float[Array | np.ndarray, "rows columns labels"],
    *,
    last_frames: int = LAST_FRAMES,
    radius: int = RADIUS,
    top_k: int = TOP_K,
    temperature: float = TEMPERATURE,
) -> Iterator[Float[Array, "rows columns labels"]]:
    """The labels of every frame after the first one, each from the first frame and the `last_frames` before it.

    Args:
        frames: patch features of the frames in order.
        first_labels: labels of the first frame.
        last_frames: number of frames before each one that count beside the first.
        radius: see `propagate_labels`.
        top_k: see `propagate_labels`.
        temperature: see `propagate_labels`.
    """
    require(last_frames >= 0, "last_frames", last_frames, "0 or more")
    frames = iter(frames)
    first = unit(jnp.asarray(next(frames)))
    # Slot 0 is the first frame; the others are used in turn, so that one program serves every frame.
    context = jnp.zeros((1 + last_frames, *first.shape), first.dtype).at[0].set(first)
    labels = jnp.zeros((1 + last_frames, *first_labels.shape), first.dtype).at[0].set(jnp.asarray(first_labels))
    for number, frame in enumerate(frames):
        valid = np.arange(1 + last_frames) <= number
        features = unit(jnp.asarray(frame))
        found = propagate_labels(
            features, context, labels, valid=valid, radius=radius, top_k=top_k, temperature=temperature
        )
        if last_frames:
            slot = 1 + number % last_frames
            context, labels = _put(context, slot, features), _put(labels, slot, found)
        yield found


def one_hot_labels(
    indices: UInt8[np.ndarray, "height width"], rows: int, columns: int, count: int | None = None
) -> Float[np.ndarray, "{rows} {columns} labels"]:
    """The mask of a frame as one-hot labels of its patches: the pixel that Pillow's nearest neighbour picks for each.

    Args:
        indices: an object's number for each pixel, 0 for the background, at most 255.
        rows: patches from top to bottom.
        columns: patches from left to right.
        count: number of labels; None takes the largest index plus one.
    """
    count = int(indices.max()) + 1 if count is None else count
    small = Image.fromarray(indices.astype(np.uint8)).resize((columns, rows), Image.Resampling.NEAREST)
    return np.eye(count)[np.asarray(small)]


def index_map(
    labels: Float[Array | np.ndarray, "rows columns labels"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width}"]:
    """The label of each pixel: labels are enlarged (bilinear), each scaled to 0–1, and the largest one taken."""
    return np.asarray(_index_map(jnp.asarray(labels), height, width))


@partial(jax.jit, static_argnums=(1, 2))
def _index_map(labels: Array, height: int, width: int) -> Array:
    maps = jax.image.resize(labels, (height, width, labels.shape[-1]), "linear", antialias=False)
    least = maps.min(axis=(0, 1), keepdims=True)
    spread = maps.max(axis=(0, 1), keepdims=True) - least
    # As upstream, a label that is constant is not divided; one that is 0 everywhere stays 0.
    return jnp.argmax((maps - least) / jnp.where(spread > 0, spread, 1), axis=-1).astype(jnp.uint8)


@partial(jax.jit, donate_argnums=0)
def _put(buffer: Array, slot: Array, value: Array) -> Array:
    return buffer.at[slot].set(value.astype(buffer.dtype))


@partial(jax.jit, static_argnames=("radius", "top_k"))
def _propagate(features, context, labels, valid, temperature, *, radius: int, top_k: int) -> Array:
    """Block by block of the frame, against the part of the context that its patches reach."""
    (rows, columns, dim), frames = features.shape, len(context)
    features, context = unit(features), unit(context)
    labels = labels.astype(features.dtype)
    reach = [min(_SIDE + 2 * radius, side) for side in (rows, columns)]
    side = min(_SIDE, max(1, int((_AFFINITIES / (frames * reach[0] * reach[1])) ** 0.5)))
    blocks = [-(-length // side) for length in (rows, columns)]
    padded = jnp.pad(features, [(0, n * side - length) for n, length in zip(blocks, (rows, columns))] + [(0, 0)])

    def block(number):
        top, left = side * (number // blocks[1]), side * (number % blocks[1])
        start = [jnp.clip(corner - radius, 0, n - r) for corner, n, r in zip((top, left), (rows, columns), reach)]
        near = jax.lax.dynamic_slice(context, (0, *start, 0), (frames, *reach, dim)).reshape(-1, dim)
        target = jax.lax.dynamic_slice(padded, (top, left, 0), (side, side, dim)).reshape(-1, dim)
        affinity = jnp.exp(jnp.matmul(target, near.T, precision="highest") / temperature)
        rows_apart, columns_apart = (
            jnp.abs((corner + jnp.arange(side))[:, None] - (first + jnp.arange(r))[None]) <= radius
            for corner, first, r in zip((top, left), start, reach)
        )
        there = rows_apart[:, None, None, :, None] & columns_apart[None, :, None, None, :]
        there = there & valid[None, None, :, None, None]
        affinity = jnp.where(there.reshape(affinity.shape), affinity, 0)
        affinity = jnp.where(affinity >= _kth_largest(affinity, top_k)[:, None], affinity, 0)
        known = jax.lax.dynamic_slice(labels, (0, *start, 0), (frames, *reach, labels.shape[-1]))
        sums = jnp.matmul(affinity, known.reshape(len(near), -1), precision="highest")
        return (sums / affinity.sum(axis=1, keepdims=True)).reshape(side, side, -1)

    found = jax.lax.map(block, jnp.arange(blocks[0] * blocks[1])).reshape(*blocks, side, side, -1)
    whole = found.transpose(0, 2, 1, 3, 4).reshape(blocks[0] * side, blocks[1] * side, -1)
    return whole[:rows, :columns]


def _kth_largest(values: Float[Array, "rows columns"], k: int) -> Float[Array, " rows"]:
    """The k-th largest value of each row, which must not be negative.

    The k largest are in the k groups with the largest maxima, so that few values have to be sorted.
    """
    rows, columns = values.shape
    if columns <= 2 * k * _GROUP:
        return jax.lax.top_k(values, k)[0][:, -1]
    groups = jnp.pad(values, ((0, 0), (0, -columns % _GROUP))).reshape(rows, -1, _GROUP)
    chosen = jax.lax.top_k(groups.max(axis=-1), k)[1]
    candidates = jnp.take_along_axis(groups, chosen[..., None], axis=1)
    return jax.lax.top_k(candidates.reshape(rows, -1), k)[0][:, -1]
