"""Every image operation against Pillow itself, on cut-outs of photographs, colour fields, noise and a chequerboard."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import PIL
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dinojax import image_ops as ops
from tests.support import pillow_reference as reference

# Pillow rounds between its two resizing passes, and the order of these is that of version 13 and later.
pins_pass_order = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow before 13 always takes the horizontal pass first"
)

PIXELS = reference.photo_like(72, 96)
PHOTOS = [Image.fromarray(pixels) for pixels in PIXELS]
PLANES = ops.to_planes(jnp.asarray(PIXELS))
FACTORS = np.array([0, 0.2, 0.63, 0.999, 1, 1.001, 1.4, 2.5], np.float32)


def difference(planes: jax.Array, images: list[Image.Image]) -> np.ndarray:
    expected = np.stack([np.asarray(image) for image in images]).astype(np.float64)
    return np.abs(np.asarray(planes).transpose(0, 1, 3, 2) - expected)


def boxes(count: int, height: int, width: int, seed: int) -> np.ndarray:
    """Random boxes after the whole image, its corners, a thin column and a thin row."""
    rng = np.random.default_rng(seed)
    found = [(0, 0, height, width), (0, 0, 20, 31), (height - 9, width - 7, 9, 7), (3, 5, height - 3, 1)]
    found.append((height // 2, 0, 2, width))
    while len(found) < count:
        h, w = rng.integers(4, height + 1), rng.integers(4, width + 1)
        found.append((rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w))
    return np.array(found, np.int32)


def many(size: int) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """Five boxes in each of the images: boxes, their images' indices, and the planes to crop."""
    which = np.repeat(np.arange(len(PIXELS)), 5)
    return boxes(len(which), 72, 96, seed=size), which, PLANES[which]


@pytest.mark.parametrize("size", [16, 32, 48, 96, 160])
def test_crop_and_resize_without_rounding(size):
    where, which, planes = many(size)
    ours = np.asarray(
        jax.jit(ops.crop_resize, static_argnums=2, static_argnames="eight_bit")(planes, where, size, eight_bit=False)
    )
    for box, index, result in zip(where, which, ours):
        for channel in range(3):
            image = Image.fromarray(PIXELS[index, :, :, channel].astype(np.float32))
            expected = np.asarray(reference.crop_resize(image, box, size))
            # Sums in float32 of values up to 255: 3.1e-4 measured, twenty units in the last place.
            np.testing.assert_allclose(result[:, channel], expected, rtol=0, atol=5e-4)


@pins_pass_order
@pytest.mark.parametrize("size", [16, 32, 48, 96, 160])
def test_crop_and_resize_in_8_bits(size):
    where, which, planes = many(size)
    ours = jax.jit(ops.crop_resize, static_argnums=2)(planes, where, size)
    error = difference(ours, [reference.crop_resize(PHOTOS[i], box, size) for box, i in zip(where, which)])
    # Pillow's weights are whole multiples of 2⁻²²: where a pass ends halfway between two values, it may round the other
    # way than float32, the second pass adds at most another step.
    assert error.max() <= 2
    assert np.mean(error <= 1) > 0.9999
    # The other order of passes leaves about a third of the values a step apart. (Chequers are full of halves.)
    assert np.mean(error[which < 4] == 0) > 0.999


@pins_pass_order
def test_pillow_takes_the_vertical_pass_first_where_we_do():
    """At the border of the rule, height − size > 2 max(width − size, 0): just outside and just inside."""
    size = 24
    sides = [(size + 2 * k + more, size + k) for k in (1, 5, 12, 20) for more in (0, 1)]
    sides += [(25, 10), (24, 10), (23, 40), (70, 23)]
    pixels = np.random.default_rng(3).integers(0, 256, (len(sides), 80, 80, 3), np.uint8)
    where = np.array([(5, 7, height, width) for height, width in sides], np.int32)
    ours = jax.jit(ops.crop_resize, static_argnums=2)(ops.to_planes(jnp.asarray(pixels)), where, size)
    expected = [reference.crop_resize(Image.fromarray(image), box, size) for image, box in zip(pixels, where)]
    same = np.mean(difference(ours, expected) == 0, axis=(1, 2, 3))
    assert same.min() > 0.99, dict(zip(sides, same))


def test_nothing_around_the_crop_shines_through():
    inside = np.array([[20, 30, 24, 40]], np.int32)
    framed = np.full((1, 72, 96, 3), 255, np.uint8)
    framed[:, 20:44, 30:70] = 100
    result = ops.crop_resize(ops.to_planes(jnp.asarray(framed)), jnp.asarray(inside), 64, eight_bit=False)
    np.testing.assert_allclose(result, 100, atol=3e-5)


def test_flip_mirrors_left_to_right():
    where = np.tile(np.array([[8, 16, 40, 56]], np.int32), (len(PIXELS), 1))
    flip = np.arange(len(PIXELS)) % 2 == 0
    ours = ops.crop_resize(PLANES, jnp.asarray(where), 32, jnp.asarray(flip))
    plain = [reference.crop_resize(image, box, 32) for image, box in zip(PHOTOS, where)]
    mirrored = [ImageOps.mirror(image) if f else image for image, f in zip(plain, flip)]
    assert difference(ours, mirrored).max() <= 1


def test_a_crop_of_the_same_size_changes_nothing():
    where = np.tile(np.array([[11, 7, 48, 48]], np.int32), (len(PIXELS), 1))
    ours = ops.crop_resize(PLANES, jnp.asarray(where), 48)
    np.testing.assert_array_equal(ours, PLANES[:, 11:59, :, 7:55])


def test_grayscale_and_solarize_are_pillow_s():
    assert difference(ops.grayscale(PLANES), [image.convert("L").convert("RGB") for image in PHOTOS]).max() == 0
    assert difference(ops.solarize(PLANES), [ImageOps.solarize(image, 128) for image in PHOTOS]).max() == 0


@pytest.mark.parametrize(
    ("ours", "pillow"),
    [
        (ops.brightness, ImageEnhance.Brightness),
        (ops.contrast, ImageEnhance.Contrast),
        (ops.saturation, ImageEnhance.Color),
    ],
)
def test_enhancements(ours, pillow):
    for shift in range(len(FACTORS)):
        factors = np.roll(FACTORS, shift)
        expected = [pillow(image).enhance(float(f)) for image, f in zip(PHOTOS, factors)]
        error = difference(jax.jit(ours)(PLANES, factors), expected)
        assert error.max() <= 1
        # Truncation makes rounding visible: rounding to nearest would move half of all values.
        assert np.mean(error == 0) > 0.999


@pytest.mark.parametrize("factor", [-0.5, -0.1, -0.0039, 0.0, 0.0041, 0.05, 0.3, 0.5])
def test_hue_of_all_sorts_of_colors(factor):
    """Every fourth value of each channel, and the last: 65³ colours; a hue is off by one step where rounding ties."""
    levels = np.append(np.arange(0, 256, 4), 255)
    colors = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).astype(np.uint8).reshape(1, -1, 65, 3)
    ours = jax.jit(ops.hue)(ops.to_planes(jnp.asarray(colors)), np.array([factor], np.float32))
    error = difference(ours, [reference.adjust_hue(Image.fromarray(colors[0]), float(np.float32(factor)))])
    assert error.max() <= 1
    assert error.mean() < 1e-4


def test_color_jitter_in_every_order():
    rng = np.random.default_rng(4)
    orders = np.array(list(itertools.permutations(range(4))), np.int32)
    run = jax.jit(ops.color_jitter)
    for some in np.split(orders, 3):
        factors = np.column_stack([rng.uniform(0.4, 1.6, (8, 3)), rng.uniform(-0.3, 0.3, 8)]).astype(np.float32)
        expected = [reference.jitter(image, f, order) for image, f, order in zip(PHOTOS, factors, some)]
        error = difference(run(PLANES, factors, some), expected)
        # A value one step off before the hue turns may come out of it a few steps off.
        assert error.max() <= 6
        assert np.mean(error <= 1) > 0.9999
        assert error.mean() < 1e-3


@pytest.mark.parametrize(("height", "width"), [(72, 96), (5, 3), (1, 40)])
def test_blur_of_v1_is_pillow_s_three_box_blurs(height, width):
    radii = np.array([0.1, 0.2, 0.5, 0.9, 1.3, 1.42, 1.7, 2.0], np.float32)
    expected = [
        image.crop((0, 0, width, height)).filter(ImageFilter.GaussianBlur(float(r))) for image, r in zip(PHOTOS, radii)
    ]
    error = difference(jax.jit(ops.box_gaussian_blur)(PLANES[:, :height, :, :width], radii), expected)
    # One step where a pass ends halfway between two values, as on the chequers.
    assert error.max() <= 1
    assert error.mean() < 0.01


def test_blur_reaches_as_far_as_the_largest_radius_asks():
    radii = np.linspace(0.5, 6, len(PIXELS)).astype(np.float32)
    expected = [image.filter(ImageFilter.GaussianBlur(float(r))) for image, r in zip(PHOTOS, radii)]
    error = difference(ops.box_gaussian_blur(PLANES, jnp.asarray(radii), 6.0), expected)
    assert error.max() <= 1
    assert error.mean() < 0.01


def test_blur_of_v2_is_torchvision_s_kernel():
    sigmas = np.linspace(0.1, 2, len(PIXELS)).astype(np.float32)
    expected = [reference.kernel_blur(image, float(s)) for image, s in zip(PHOTOS, sigmas)]
    error = difference(jax.jit(ops.kernel_gaussian_blur)(PLANES, sigmas), expected)
    assert error.max() <= 1
    assert error.mean() < 1e-3


def test_normalize():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (PIXELS / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(ops.normalize(PLANES, mean, std), expected, atol=1e-6)
