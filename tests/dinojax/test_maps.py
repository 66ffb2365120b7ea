"""Maps against plain loops, exact fractions, NumPy and scikit-learn."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from flax import nnx
from sklearn.decomposition import PCA

from dinojax import VisionTransformer, ViTConfig, maps

REGISTERED = ViTConfig(
    img_size=28, patch_size=14, embed_dim=24, depth=2, num_heads=3, init_values=0.5, num_register_tokens=4
)


def random(*shape, seed=0):
    return np.random.default_rng(seed).random(shape)


def blobs(*sizes, seed=0):
    """Features of images with an object in the middle that differs from its surroundings along one direction."""
    rng = np.random.default_rng(seed)
    images = []
    for rows, columns in sizes:
        features = rng.standard_normal((rows, columns, 8)).astype(np.float32)
        features[2:-2, 2:-2, 3] += 20
        images.append(features)
    return images


@pytest.mark.parametrize("registers", [0, 4])
def test_attention_of_the_class_token_leaves_itself_and_the_registers_out(registers):
    rows, columns = 3, 5
    attention = random(2, 3, *[1 + registers + rows * columns] * 2)
    found = maps.cls_attention(attention, rows, columns, num_register_tokens=registers)
    assert found.shape == (2, 3, rows, columns)
    for image, head, row, column in itertools.product(range(2), range(3), range(rows), range(columns)):
        patch = 1 + registers + row * columns + column
        assert found[image, head, row, column] == attention[image, head, 0, patch]


def test_attention_of_a_model_with_registers():
    model = VisionTransformer(REGISTERED, rngs=nnx.Rngs(0))
    attention = np.asarray(model.get_last_selfattention(random(1, 42, 28, 3).astype(np.float32)))
    found = maps.cls_attention(attention, 3, 2, num_register_tokens=4)
    left_out = attention[:, :, 0, :5].sum(-1)
    np.testing.assert_allclose(found.sum((-2, -1)) + left_out, 1, atol=1e-6)
    for registers in (0, 3, 5):
        with pytest.raises(ValueError, match=rf"11 tokens are not CLS, {registers} registers and 3×2 patches"):
            maps.cls_attention(attention, 3, 2, num_register_tokens=registers)


def test_the_score_is_relative_to_the_largest_of_each_map():
    attention = random(3, 4, 5) * np.array([1, 0.01, 100])[:, None, None]
    found = maps.score_mask(attention, 0.7)
    for head, row, column in itertools.product(range(3), range(4), range(5)):
        assert found[head, row, column] == (attention[head, row, column] / attention[head].max() >= 0.7)
    assert maps.score_mask(attention, 0).all()
    only = maps.score_mask(attention, 1)
    assert [int(np.argmax(one)) for one in attention] == [int(np.flatnonzero(one)[0]) for one in only]
    assert only.sum() == 3


def test_mass_keeps_the_shares_above_one_minus_mass_of_the_ascending_cumulative_sum():
    """By exact fractions: small whole numbers that sum to 48, the mass in sixteenths, so that sums meet it exactly."""
    attention = np.random.default_rng(1).integers(1, 4, (4, 3, 6))
    attention[:, 1, 2] += 48 - attention.sum(axis=(1, 2))
    for sixteenths in range(1, 17):
        found = maps.mass_mask(attention.astype(np.float32), sixteenths / 16)
        for head, mask in zip(attention.reshape(4, -1).tolist(), found.reshape(4, -1)):
            cumulative, kept = Fraction(0), np.zeros(len(head), bool)
            for attended, patch in sorted(zip(head, range(len(head)))):
                cumulative += Fraction(attended, sum(head))
                kept[patch] = cumulative > 1 - Fraction(sixteenths, 16)
            np.testing.assert_array_equal(mask, kept)


@pytest.mark.parametrize("mass", [1e-6, 0.1, 0.6, 0.95, 1.0])
def test_the_kept_patches_are_the_fewest_that_hold_the_mass(mass):
    attention = random(6, 7, 9).astype(np.float32) ** 4
    for head, mask in zip(attention.astype(float), maps.mass_mask(attention, mass)):
        kept = np.sort(head[mask])
        assert kept.sum() / head.sum() >= mass - 1e-12
        assert kept[1:].sum() / head.sum() < mass
        assert kept[0] >= head[~mask].max(initial=0)


def test_colours_are_the_principal_components_of_all_images_together():
    images = [random(3, 4, 8), random(5, 2, 8, seed=1)]
    components = PCA(3, svd_solver="full").fit_transform(np.concatenate([image.reshape(-1, 8) for image in images]))
    expected = (components - components.min(0)) / np.ptp(components, axis=0)
    found = maps.pca_maps([image.astype(np.float32) for image in images], threshold=None)
    assert [(one.rgb.shape, one.foreground.all()) for one in found] == [((3, 4, 3), True), ((5, 2, 3), True)]
    colours = np.concatenate([one.rgb.reshape(-1, 3) for one in found])
    for channel, truth in zip(colours.T, expected.T):  # up to the sign
        assert min(np.abs(channel - truth).max(), np.abs(channel - (1 - truth)).max()) < 1e-5
    alone = maps.pca_maps([images[0]], threshold=None)[0]
    assert np.abs(alone.rgb - found[0].rgb).max() > 0.1


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_foreground_by_the_first_component_and_colours_from_it_alone(threshold):
    images = blobs((9, 7), (6, 10))
    patches = np.concatenate([image.reshape(-1, 8) for image in images]).astype(float)
    first = PCA(1, svd_solver="full").fit_transform(patches)[:, 0]
    first *= np.sign(np.corrcoef(first, patches[:, 3])[0, 1])
    expected = (first - first.min()) / np.ptp(first) > threshold
    found = maps.pca_maps(images, threshold=threshold)
    np.testing.assert_array_equal(np.concatenate([one.foreground.ravel() for one in found]), expected)
    colours = np.concatenate([one.rgb.reshape(-1, 3) for one in found])
    assert not colours[~expected].any()
    components = PCA(3, svd_solver="full").fit_transform(patches[expected])
    truth = (components - components.min(0)) / np.ptp(components, axis=0)
    for channel, column in zip(colours[expected].T, truth.T):
        assert min(np.abs(channel - column).max(), np.abs(channel - (1 - column)).max()) < 1e-5


@pytest.mark.parametrize("sign", [1, -1])
def test_the_object_inside_is_the_foreground_whatever_its_sign_unless_flipped(sign):
    images = [sign * image for image in blobs((9, 7), (6, 10))]
    inside = [np.zeros(image.shape[:2], bool) for image in images]
    for mask in inside:
        mask[2:-2, 2:-2] = True
    for one, mask in zip(maps.pca_maps(images), inside):
        np.testing.assert_array_equal(one.foreground, mask)
    for one, mask in zip(maps.pca_maps(images, flip=True), inside):
        np.testing.assert_array_equal(one.foreground, ~mask)


def test_pca_of_many_patches_passes_in_chunks(monkeypatch):
    images = blobs((9, 7), (6, 10))
    whole = maps.pca_maps(images)
    monkeypatch.setattr(maps, "_ROWS", 10)
    for one, other in zip(whole, maps.pca_maps(images)):
        np.testing.assert_allclose(one.rgb, other.rgb, atol=1e-12)


def test_an_image_without_foreground_keeps_its_patches():
    """One image with an object beside one of mere background, of which an outlier alone is above the threshold."""
    rng = np.random.default_rng(0)
    images = [*blobs((9, 7)), rng.standard_normal((6, 10, 8)).astype(np.float32)]
    images[1][3, 4, 3] = 20
    plain = maps.pca_maps(images, least_foreground=0)
    assert [int(one.foreground.sum()) for one in plain] == [5 * 3, 1]
    found = maps.pca_maps(images)
    np.testing.assert_array_equal(found[0].foreground, plain[0].foreground)
    assert found[1].foreground.all() and (found[1].rgb.max(axis=-1) > 0).all()
    images[1][3, 3:6, 3] = 20  # 3 of 60 patches are not fewer than 5 %
    assert maps.pca_maps(images)[1].foreground.sum() == 3


def test_the_range_of_a_map_is_that_of_its_percentiles():
    values = np.random.default_rng(0).permutation(np.arange(101.0)).reshape(1, 101)
    assert maps.value_range(values) == (1, 99)
    assert maps.value_range(values, (0, 50)) == (0, 50)


def test_every_map_has_a_range():
    constant = np.full((3, 3), 0.25, np.float32)
    low, high = maps.value_range(constant)
    assert low < 0.25 < high
    assert maps.value_range(np.zeros((2, 2)))[0] < 0 < maps.value_range(np.zeros((2, 2)))[1]
    spike = np.zeros((20, 20))
    spike[3, 4] = 1  # the percentiles are equal
    assert maps.value_range(spike) == (0, 1)


def test_pca_without_spread_is_grey():
    (found,) = maps.pca_maps([np.ones((1, 1, 8), np.float32)], threshold=0.3)
    assert found.foreground.all() and (found.rgb == 0.5).all()


def test_similarity_is_the_cosine():
    features = random(4, 5, 8).astype(np.float32) - 0.5
    found = maps.patch_similarity(features, 7 * features[2, 3])
    for row, column in itertools.product(range(4), range(5)):
        one, other = features[row, column].astype(float), features[2, 3].astype(float)
        cosine = sum(one * other) / np.sqrt(sum(one * one) * sum(other * other))
        assert found[row, column] == pytest.approx(cosine, abs=1e-7)
    assert found[2, 3] == pytest.approx(1, abs=1e-7) and found.argmax() == 2 * 5 + 3


def test_upsampling_repeats_every_patch():
    heads, colours = random(2, 3, 4), random(3, 4, 3)
    np.testing.assert_array_equal(maps.upsample(heads, 5), np.kron(heads, np.ones((1, 5, 5))))
    np.testing.assert_array_equal(maps.upsample(colours, 2, axes=(0, 1)), np.kron(colours, np.ones((2, 2, 1))))
