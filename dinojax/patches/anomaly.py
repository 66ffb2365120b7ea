"""Anomalies as patches unlike any patch of normal images: a memory bank, sub-sampled, and the distance to it.

Sources: Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (CVPR 2022): the bank, its greedy coreset,
the map blurred with a deviation of 4 px, the largest distance as the image's score. Damm et al., "AnomalyDINO" (WACV
2025): DINOv2's patch features with the cosine distance.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dinojax.errors import UserError, require
from dinojax.patches.matching import nearest_patches, unit

_BATCH = 64  # candidates that are followed between two passes over the bank
SIGMA_PX = 4.0


def coreset(
    features: Float[Array | np.ndarray, "patches dim"], count: int, *, first: int = 0
) -> Int[np.ndarray, " {count}"]:
    """A greedy k-centre subset: each patch that is added is the farthest, by cosine, from those that were added before.

    Ties go to the lower index. The result is that of adding one patch after the other; but a pass over all patches
    serves several additions: the farthest patches are followed on their own for as long as none of the others can be
    farther.

    Args:
        features: of any length.
        count: number of patches to keep.
        first: index of the patch that is added first.

    Returns:
        Indices in the order in which they were added.

    Raises:
        UserError: a `count` or `first` that the patches do not have.
    """
    require(1 <= count <= len(features), "count", count, f"between 1 and the {len(features):,} patches")
    require(0 <= first < len(features), "first", first, f"the index of one of {len(features):,} patches")
    batch = min(_BATCH, len(features))
    return np.asarray(_coreset(unit(jnp.asarray(features)), count, first, batch))


def patch_distances(
    features: Float[Array | np.ndarray, "rows columns dim"],
    bank: Float[Array | np.ndarray, "patches bank_dim"],
) -> Float[np.ndarray, "rows columns"]:
    """The cosine distance (1 − similarity) of each patch of an image to the nearest one of a bank.

    Raises:
        UserError: an empty bank, or features of two widths.
    """
    nearest = nearest_patches(features.reshape(-1, features.shape[-1]), bank)
    return np.maximum(1 - nearest.similarity, 0).reshape(features.shape[:2])


def anomaly_map(
    distances: Float[np.ndarray, "rows columns"], height: int, width: int, *, sigma_px: float = SIGMA_PX
) -> Float[np.ndarray, "{height} {width}"]:
    """The distances of patches as a map of pixels: enlarged (bilinear), then blurred by a Gaussian.

    Raises:
        UserError: a deviation that is negative.
    """
    from scipy.ndimage import gaussian_filter

    if not sigma_px >= 0:
        raise UserError(f"sigma_px={sigma_px!r} is not 0 or more")
    large = np.asarray(jax.image.resize(jnp.asarray(distances), (height, width), "linear", antialias=False))
    return gaussian_filter(large, sigma_px)


def _coreset(features: Float[Array, "patches dim"], count: int, first: int, batch: int) -> Array:
    start = (
        jnp.zeros(count, jnp.int32).at[0].set(first),
        jnp.int32(1),
        jnp.full(len(features), jnp.inf, features.dtype),
        jnp.full(batch, first, jnp.int32),
    )
    return _grow(features, start)[0]


@jax.jit
def _grow(features: Array, state: tuple) -> tuple:
    """Adds patches until all are found.

    The state holds the patches, how many of them are found, the distance of every patch to the nearest one that was
    added before the last pass, and the ones added since (repeated where they are fewer than the batch).
    """
    count, batch = len(state[0]), len(state[3])

    def unfinished(state):
        return state[1] < count

    def one_pass(state):
        chosen, found, distance, recent = state
        similarity = jnp.matmul(features, features[recent].T, precision="highest").max(axis=1)
        distance = jnp.minimum(distance, 1 - similarity)
        distance = distance.at[recent].set(-1)  # rounding never adds a patch twice
        # The farthest patches, and the largest distance among the others.
        extended = jnp.append(distance, -jnp.inf)
        farthest, indices = jax.lax.top_k(extended, batch + 1)
        bound, candidates = farthest[-1], features[indices[:-1]]

        def still_farthest(inner):
            _, found, distance, _, added = inner
            return (found < count) & ((added == 0) | (distance.max() > bound))

        def add(inner):
            chosen, found, distance, recent, added = inner
            largest = distance == distance.max()
            place = jnp.where(largest, indices[:-1], len(features)).argmin()
            index = indices[place]
            nearer = 1 - jnp.matmul(candidates, candidates[place], precision="highest")
            distance = jnp.minimum(distance, nearer).at[place].set(-1)
            recent = jnp.where(jnp.arange(batch) < added, recent, index)
            return chosen.at[found].set(index), found + 1, distance, recent, added + 1

        inner = (chosen, found, farthest[:-1], recent, jnp.int32(0))
        chosen, found, _, recent, _ = jax.lax.while_loop(still_farthest, add, inner)
        return chosen, found, distance, recent

    return jax.lax.while_loop(unfinished, one_pass, state)
