"""One object of an image, found without labels in the similarities of its patches: LOST and TokenCut.

Both were published with the keys of the last block's attention as features (`VisionTransformer.get_last_keys`).

Sources: Siméoni et al., "Localizing Objects with Self-Supervised Transformers and no Labels" (BMVC 2021) and
valeoai/LOST; Wang et al., "Self-Supervised Transformers for Unsupervised Object Discovery using Normalized Cut" (CVPR
2022) and YangtaoWANG95/TokenCut.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dinojax.errors import UserError, require
from dinojax.patches.matching import unit
from dinojax.precision import at_least_float32

EXPANSION, TAU, EDGE = 100, 0.2, 1e-5
MOST_PATCHES = 10_000  # of TokenCut, whose graph then takes 800 MB
_DENSE = 256  # patches: up to here all eigenvectors are as fast as one
_SIMILARITIES = 2**24  # that are in memory at once: 64 MiB of float32
_EQUAL = 1e-6


class Discovery(NamedTuple):
    """An object.

    Attributes:
        mask: its patches, connected along rows and columns.
        box: first row, first column, last row + 1 and last column + 1 of the mask.
        seed: row and column of the patch that it grew from.
        score: of every patch: with LOST the sum of its similarities to the seed and its like, with TokenCut its entry
            in the eigenvector. The object is where it is high.
    """

    mask: Bool[np.ndarray, "rows columns"]
    box: tuple[int, int, int, int]
    seed: tuple[int, int]
    score: Float[np.ndarray, "rows columns"]


def lost(features: Float[Array | np.ndarray, "rows columns dim"], *, expansion: int = EXPANSION) -> Discovery:
    """The object of LOST, grown from the patch that is similar to the fewest others.

    The seed is the patch with the fewest positive products with other patches, ties to the lower index. Of the
    `expansion` patches with the fewest, those with a positive product with the seed join it. The object is the
    connected part around the seed of the patches whose products with these sum to more than 0. The image's similarities
    are never in memory all at once.

    Raises:
        UserError: an `expansion` that is not positive.
    """
    require(expansion >= 1, "expansion", expansion, "a positive number of patches")
    rows, columns, dim = features.shape
    flat = jnp.asarray(features).reshape(-1, dim)
    flat = flat.astype(at_least_float32(flat.dtype))
    chunk = -(-len(flat) // -(-(len(flat) ** 2) // _SIMILARITIES))
    degrees = np.asarray(_degrees(flat, chunk))
    order = np.argsort(degrees, kind="stable")[:expansion]
    score = np.asarray(_expanded(flat, jnp.asarray(order))).reshape(rows, columns)
    return _object_at(score > 0, int(order[0]), score)


def token_cut(
    features: Float[Array | np.ndarray, "rows columns dim"], *, tau: float = TAU, edge: float = EDGE
) -> Discovery:
    """The object of TokenCut: one side of a normalised cut through the graph of similar patches.

    Two patches are joined by an edge of weight 1 where their cosine similarity is above `tau`, else of weight `edge`.
    The eigenvector of (D − W) x = λ D x with the second smallest λ, D being the sums of the weights W, is cut at its
    mean. The seed is the patch with the largest absolute entry, ties to the lower index; the object is the connected
    part around it of its side.

    Args:
        features: of the patches, of any length.
        tau: threshold of the similarity.
        edge: weight of the other edges, above 0.

    Raises:
        UserError: more than 10,000 patches, settings that no cut has, or an image whose patches are all similar or all
            dissimilar, which no cut divides.
    """
    rows, columns, dim = features.shape
    patches = rows * columns
    require(-1 <= tau < 1, "tau", tau, "a cosine similarity of at least −1 and below 1")
    require(0 < edge < 1, "edge", edge, "a weight above 0 and below 1")
    if patches > MOST_PATCHES:
        raise UserError(
            f"{patches:,} patches are too many for TokenCut, whose graph would take {8 * patches**2 / 1e9:.1f} GB; "
            f"give a smaller image, of {MOST_PATCHES:,} patches or fewer"
        )
    joined = np.array(_joined(jnp.asarray(features).reshape(patches, dim), tau))
    np.fill_diagonal(joined, True)
    if joined.all() or joined.sum() == patches:
        how = "similar" if joined.all() else "dissimilar"
        raise UserError(f"all patches of the image are {how} at tau={tau:g}, so that no cut divides them; change tau")
    vector = _second_eigenvector(np.where(joined, 1.0, edge))
    # Patches with the same edges have the same entry, but for rounding.
    seed = int(np.argmax(np.abs(vector) > (1 - _EQUAL) * np.abs(vector).max()))
    inside = vector > vector.mean()
    vector = vector if inside[seed] else -vector
    return _object_at((inside == inside[seed]).reshape(rows, columns), seed, vector.reshape(rows, columns))


def _object_at(inside: np.ndarray, seed: int, score: np.ndarray) -> Discovery:
    """The connected part of `inside` that holds the seed; the seed alone where it is not inside."""
    from scipy.ndimage import label

    place = np.unravel_index(seed, inside.shape)
    inside = inside.copy()
    inside[place] = True  # a LOST seed always is, but for rounding
    parts = label(inside)[0]
    mask = parts == parts[place]
    tall, wide = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = int(tall[0]), int(wide[0]), int(tall[-1]) + 1, int(wide[-1]) + 1
    return Discovery(mask, box, (int(place[0]), int(place[1])), score)


def _second_eigenvector(weights: Float[np.ndarray, "patches patches"]) -> Float[np.ndarray, " patches"]:
    """The generalised eigenvector with the second smallest eigenvalue, of length 1; its sign is arbitrary.

    With x = D^−½ y the problem is that of the symmetric D^−½ W D^−½, whose second largest eigenvalue is wanted: a few
    dozen products with a vector instead of a decomposition.
    """
    from scipy.linalg import eigh
    from scipy.sparse.linalg import ArpackError, eigsh

    root = np.sqrt(weights.sum(axis=1))
    symmetric = weights / root[:, None]
    symmetric /= root[None]
    patches = len(weights)
    found = None
    if patches > _DENSE:
        try:  # a fixed start, so that the result is the same in every run
            start = np.random.default_rng(0).standard_normal(patches)
            found = eigsh(symmetric, k=2, which="LA", v0=start)[1][:, 0]
        except ArpackError:  # eigenvalues too close to each other
            found = None
    if found is None:
        found = eigh(symmetric, subset_by_index=[patches - 2, patches - 2])[1][:, 0]
    vector = found / root
    return vector / np.linalg.norm(vector)


def _degrees(features: Float[Array, "patches dim"], chunk: int) -> Array:
    """The number of other patches with which each patch has a positive product."""
    padded = jnp.pad(features, ((0, -len(features) % chunk), (0, 0))).reshape(-1, chunk, features.shape[1])
    own = (features * features).sum(axis=1) > 0
    return _counts(padded, features).ravel()[: len(features)] - own


@jax.jit
def _counts(chunks: Array, features: Array) -> Array:
    return jax.lax.map(lambda part: (_product(part, features.T) > 0).sum(axis=1), chunks)


@jax.jit
def _expanded(features: Float[Array, "patches dim"], order: Array) -> Array:
    """The sum of the products of each patch with the seed's like; products are summed before they are taken."""
    candidates = features[order]
    like = _product(candidates, candidates[0][:, None])[:, 0] > 0
    return _product(features, jnp.where(like[:, None], candidates, 0).sum(axis=0)[:, None])[:, 0]


@jax.jit
def _joined(features: Array, tau: Array) -> Array:
    features = unit(features)
    return _product(features, features.T) > tau


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision="highest")
