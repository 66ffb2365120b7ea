"""DINOv2's block masks, drawn inside jit, and the masked patches of a batch as an array of fixed length.

Source: facebookresearch/dinov2 b8931f7 `dinov2/data/masking.py` and `collate.py`; BEiT (arXiv 2106.08254), algorithm 1.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from dinojax.errors import require


@dataclasses.dataclass(frozen=True)
class BlockMasking:
    """How many images of a batch are masked, and how.

    Attributes:
        rows: patches of an image from top to bottom.
        columns: patches of an image from left to right.
        mask_sample_probability: share of the images that get a mask.
        mask_ratio_min_max: smallest and largest share of patches that a mask covers.
        min_num_patches: smallest area that is drawn for a block, in patches.
        min_aspect: smallest ratio of height to width; the largest is its inverse.
        attempts: number of draws after which a block that does not fit is given up, and the mask with it.

    Raises:
        UserError: a setting out of bounds.
    """

    rows: int
    columns: int
    mask_sample_probability: float = 0.5
    mask_ratio_min_max: tuple[float, float] = (0.1, 0.5)
    min_num_patches: int = 4
    min_aspect: float = 0.3
    attempts: int = 10

    def __post_init__(self):
        least, most = self.mask_ratio_min_max
        for name in ("rows", "columns"):
            require(getattr(self, name) >= 2, name, getattr(self, name), "two or more: a block never spans a side")
        probability = self.mask_sample_probability
        require(0 <= probability <= 1, "mask_sample_probability", probability, "from 0 to 1")
        require(0 <= least <= most <= 1, "mask_ratio_min_max", (least, most), "two rising shares from 0 to 1")
        require(self.min_num_patches >= 1, "min_num_patches", self.min_num_patches, "1 or more")
        require(0 < self.min_aspect <= 1, "min_aspect", self.min_aspect, "above 0 and at most 1")
        require(self.attempts >= 1, "attempts", self.attempts, "1 or more")

    @property
    def max_num_patches(self) -> int:
        """The most patches that one block adds: half of the image, rounded down by whole rows."""
        return self.rows // 2 * self.columns

    def masked_images(self, images: int) -> int:
        """The number of images that get a mask, in a batch of `images`."""
        return math.floor(images * self.mask_sample_probability)

    def bounds(self, images: int) -> Int[np.ndarray, " masked_images"]:
        """The most patches that each mask of a batch of `images` covers, rising; no mask is ever larger."""
        return np.floor(self.rows * self.columns * self._edges(images)[1:]).astype(np.int32)

    def most_masked(self, images: int, among: int | None = None) -> int:
        """The most masked patches in a batch of `images`, or in any `among` of them.

        It is the length of `masked_patches`, so it is one at least.
        """
        largest = np.sort(self.bounds(images))[::-1]
        return max(1, int(largest[:among].sum()))

    def _edges(self, images: int) -> np.ndarray:
        """The borders of the equal parts into which the shares are cut, one part a masked image."""
        return np.linspace(*self.mask_ratio_min_max, self.masked_images(images) + 1)


def block_masks(key: Key[Array, ""], masking: BlockMasking, images: int) -> Bool[Array, "images patches"]:
    """Masks of a batch: which patches the student does not see, in row-major order.

    The shares of masked patches are stratified: they are drawn from as many equal parts of the interval as there are
    masks, so that batches hardly differ in their number of masked patches. A random permutation over all images decides
    who gets which mask, or none. So the mask of an image depends on the key, the size of the batch and the place in it,
    and on nothing else: not on the images, and not on the number of devices.

    A mask consists of rectangles. It falls short of its share where `attempts` draws in a row find no place.
    """
    masks = masks_of_blocks(key, stratified_targets(key, masking, images), masking)
    order = jax.random.permutation(jax.random.fold_in(key, 2), images)
    patches = masking.rows * masking.columns
    return jnp.zeros((images, patches), bool).at[order[: len(masks)]].set(masks.reshape(len(masks), patches))


def stratified_targets(key: Key[Array, ""], masking: BlockMasking, images: int) -> Int[Array, " masks"]:
    """How many patches each mask of a batch is to cover, rising: the first step of `block_masks`."""
    edges = masking._edges(images).astype(np.float32)
    place = jax.random.uniform(jax.random.fold_in(key, 0), (len(edges) - 1,), jnp.float32)
    shares = edges[:-1] + (edges[1:] - edges[:-1]) * place
    targets = jnp.floor(masking.rows * masking.columns * shares).astype(jnp.int32)
    return jnp.minimum(targets, masking.bounds(images))


def masks_of_blocks(
    key: Key[Array, ""], targets: Int[Array, " masks"], masking: BlockMasking
) -> Bool[Array, "masks rows columns"]:
    """Masks of rectangles that cover as many patches as `targets` says: the second step of `block_masks`."""
    keys = jax.random.split(jax.random.fold_in(key, 1), len(targets))
    return jax.vmap(functools.partial(_one_mask, masking=masking))(keys, targets)


class MaskedPatches(NamedTuple):
    """The masked patches of a batch, in the order of images and patches, filled up to a fixed length."""

    place: Int[Array, " masked"]
    """Where they are among all patches of the batch; those that fill up lie beyond the last one."""
    valid: Bool[Array, " masked"]
    """False for those that fill up."""
    weight: Float[Array, " masked"]
    """1 / (masked patches of the image), and 0 for those that fill up."""


def masked_patches(masks: Bool[Array, "*images patches"], most: int) -> MaskedPatches:
    """Lists the masked patches in an array of length `most`.

    More masked patches than `most` make every weight NaN, because no error can be raised inside jit: the loss becomes
    NaN, instead of leaving patches out in silence.
    """
    patches, total = masks.shape[-1], masks.size
    (place,) = jnp.nonzero(masks.ravel(), size=most, fill_value=total)
    valid = place < total
    of_image = jnp.sum(masks.reshape(-1, patches), axis=1)
    count = of_image[jnp.minimum(place, total - 1) // patches]
    weight = jnp.where(valid, 1 / jnp.maximum(count, 1), 0.0)
    return MaskedPatches(place, valid, jnp.where(of_image.sum() <= most, weight, jnp.nan))


def gather_patches(tokens: Float[Array, "*images patches dim"], masked: MaskedPatches) -> Float[Array, "masked dim"]:
    """The tokens of masked patches; those that fill up are zero vectors."""
    return jnp.take(tokens.reshape(-1, tokens.shape[-1]), masked.place, axis=0, mode="fill", fill_value=0)


def _one_mask(key: Array, target: Array, *, masking: BlockMasking) -> Array:
    """A mask "rows columns" of at most `target` patches."""

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        mask, _, stuck = state
        return (jnp.sum(mask) < target) & ~stuck

    def add_block(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mask, number, _ = state
        budget = _budget(target, jnp.sum(mask), masking)
        # All attempts at once: the first block that fits is the one that attempts in a row would have found.
        blocks, inside = _blocks(key, number, budget, masking)
        added = jnp.sum(blocks & ~mask[None], axis=(1, 2))
        fits = inside & (added > 0) & (added <= budget)
        found = jnp.any(fits)
        return mask | (blocks[jnp.argmax(fits)] & found), number + 1, ~found

    empty = jnp.zeros((masking.rows, masking.columns), bool)
    return jax.lax.while_loop(unfinished, add_block, (empty, jnp.zeros([], jnp.uint32), jnp.zeros([], bool)))[0]


def _budget(target: Array, covered: Array, masking: BlockMasking) -> Array:
    """The most patches that the next block may add."""
    return jnp.minimum(target - covered, masking.max_num_patches)


def _blocks(key: Array, number: Array, budget: Array, masking: BlockMasking) -> tuple[Array, Array]:
    """Random rectangles "attempts rows columns" for block `number` of a mask, and which of them may be used."""
    places = jax.random.uniform(jax.random.fold_in(key, number), (4, masking.attempts), jnp.float32)
    area = masking.min_num_patches + (budget.astype(jnp.float32) - masking.min_num_patches) * places[0]
    aspect = _aspect(places[1], masking)
    height, width = _whole(jnp.sqrt(area * aspect)), _whole(jnp.sqrt(area / aspect))
    rows, columns = _span(places[2], height, masking.rows), _span(places[3], width, masking.columns)
    return rows[:, :, None] & columns[:, None, :], _inside(height, width, masking)


def _aspect(place: Array, masking: BlockMasking) -> Array:
    """Height over width, log-uniform for a uniform `place` from 0 to 1."""
    return jnp.exp(-math.log(masking.min_aspect) * (2 * place - 1))


def _whole(side: Array) -> Array:
    return jnp.round(side).astype(jnp.int32)


def _inside(height: Array, width: Array, masking: BlockMasking) -> Array:
    """Whether blocks leave room on both sides of the image."""
    return (height < masking.rows) & (width < masking.columns)


def _span(place: Array, length: Array, side: int) -> Array:
    """Masks "attempts side" of `length` neighbours; `place` from 0 to 1 is spread over all places where they fit."""
    places = jnp.maximum(side - length + 1, 1)
    first = jnp.minimum((place * places).astype(jnp.int32), places - 1)
    index = jnp.arange(side, dtype=jnp.int32)[None]
    return (index >= first[:, None]) & (index < (first + length)[:, None])
