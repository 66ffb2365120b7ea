"""LOST and TokenCut beside plain numpy, with dense eigenvectors and loops."""

import jax
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

from dinojax import UserError, VisionTransformer, ViTConfig, patches
from dinojax.patches import discovery


def scene(rows, columns, seed=0, noise=0.4, dim=12):
    """An object of 4 × 5 patches along one direction, on a background along another."""
    rng = np.random.default_rng(seed)
    features = noise * rng.standard_normal((rows, columns, dim))
    features[..., 0] += 1
    features[3:7, 2:7] += 2 * np.eye(dim)[1] - 1.6 * np.eye(dim)[0]
    return features


def grown(inside, seed):
    """The connected part around the seed, by filling."""
    waiting, part = [seed], set()
    while waiting:
        row, column = waiting.pop()
        if (row, column) in part or not (0 <= row < inside.shape[0] and 0 <= column < inside.shape[1]):
            continue
        if inside[row, column]:
            part.add((row, column))
            waiting += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    return part


def boxed(part):
    rows, columns = ([place[axis] for place in part] for axis in (0, 1))
    return min(rows), min(columns), max(rows) + 1, max(columns) + 1


def plain_lost(features, expansion):
    rows, columns, dim = features.shape
    flat = features.reshape(-1, dim)
    products = np.array([[one @ other for other in flat] for one in flat])
    degrees = [sum(products[i, j] > 0 for j in range(len(flat)) if j != i) for i in range(len(flat))]
    order = sorted(range(len(flat)), key=lambda i: (degrees[i], i))[:expansion]
    like = [i for i in order if products[order[0], i] > 0]
    score = products[like].sum(axis=0).reshape(rows, columns)
    return divmod(order[0], columns), score


def plain_token_cut(features, tau, edge):
    rows, columns, dim = features.shape
    flat = features.reshape(-1, dim)
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    weights = np.where(flat @ flat.T > tau, 1.0, edge)
    diagonal = np.diag(weights.sum(1))
    vector = scipy.linalg.eigh(diagonal - weights, diagonal)[1][:, 1]
    seed = int(np.flatnonzero(np.isclose(np.abs(vector), np.abs(vector).max(), rtol=1e-6))[0])
    inside = vector > vector.mean()
    inside = inside if inside[seed] else ~inside
    vector = vector * np.sign(vector[seed]) / np.linalg.norm(vector)
    return divmod(seed, columns), inside.reshape(rows, columns), vector.reshape(rows, columns)


@pytest.mark.parametrize(("seed", "expansion"), [(0, 100), (1, 7), (2, 1)])
def test_lost_is_that_of_loops(seed, expansion):
    features = scene(11, 9, seed)
    with jax.enable_x64(True):
        found = patches.lost(features, expansion=expansion)
    place, score = plain_lost(features, expansion)
    assert found.seed == place
    np.testing.assert_allclose(found.score, score, rtol=0, atol=1e-11)
    part = grown(score > 0, place)
    assert {tuple(map(int, one)) for one in np.argwhere(found.mask)} == part and found.box == boxed(part)


def test_lost_in_chunks(monkeypatch):
    features = scene(11, 9)
    whole = patches.lost(features)
    monkeypatch.setattr(discovery, "_SIMILARITIES", 1500)
    found = patches.lost(features)
    np.testing.assert_array_equal(found.mask, whole.mask)
    assert found.seed == whole.seed


@pytest.mark.parametrize(("size", "seed"), [((11, 9), 0), ((8, 13), 1), ((21, 17), 2)])
def test_token_cut_is_that_of_a_dense_decomposition(size, seed):
    """The last one has more patches than are decomposed densely."""
    features = scene(*size, seed)
    with jax.enable_x64(True):
        found = patches.token_cut(features)
    place, inside, vector = plain_token_cut(features, 0.2, 1e-5)
    assert found.seed == place
    sign = np.sign(vector[place]) * np.sign(found.score[place])
    np.testing.assert_allclose(found.score, sign * vector, rtol=0, atol=1e-9)
    part = grown(inside, place)
    assert {tuple(map(int, one)) for one in np.argwhere(found.mask)} == part and found.box == boxed(part)


@pytest.mark.parametrize("method", [patches.lost, patches.token_cut])
def test_the_object_of_a_scene_is_found(method):
    found = method(scene(12, 14, noise=0.1).astype(np.float32))
    assert found.box == (3, 2, 7, 7)
    assert found.mask.sum() == 20


def test_images_that_no_cut_divides_are_refused():
    with pytest.raises(UserError, match=r"all patches of the image are similar at tau=0\.2"):
        patches.token_cut(np.ones((3, 4, 5)))
    with pytest.raises(UserError, match="all patches of the image are dissimilar"):
        patches.token_cut(np.eye(12).reshape(3, 4, 12))
    with pytest.raises(UserError, match=r"10,201 patches are too many for TokenCut"):
        patches.token_cut(np.ones((101, 101, 2), np.float32))
    with pytest.raises(UserError, match="expansion=0 is not a positive number"):
        patches.lost(np.ones((3, 4, 5)), expansion=0)


@pytest.mark.parametrize("registers", [0, 4])
def test_keys_are_those_whose_products_with_the_queries_give_the_attention(registers):
    config = ViTConfig(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_register_tokens=registers)
    model = VisionTransformer(config, rngs=nnx.Rngs(0))
    images = np.random.default_rng(0).standard_normal((1, 16, 12, 3)).astype(np.float32)
    keys = np.asarray(jax.jit(lambda x: model.get_last_keys(x))(images))
    assert keys.shape == (1, 4, 3, 24)
    attention = np.asarray(jax.jit(lambda x: model.get_last_selfattention(x))(images))[0, :, 0, 1 + registers :]
    first = jax.jit(lambda x: model.get_intermediate_layers(x, [0], norm=False, return_class_token=True)[0][1])
    x = np.asarray(first(images))[0]
    block = model.blocks[-1]
    query = np.asarray(block.attn.qkv(block.norm1(x[None])))[0, :24]
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        scores = keys.reshape(12, 24)[:, part] @ query[part] / np.sqrt(8)
        np.testing.assert_allclose(np.log(attention[head]) - np.log(attention[head, 0]), scores - scores[0], atol=1e-5)
