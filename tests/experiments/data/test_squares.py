"""Squares from images of any shape: the pixels are torchvision's, and each way has a key of its own."""

import hashlib
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinojax.images.resize import Resampling, resize_centre_crop
from experiments.data.splits import Split
from experiments.data.squares import centre_cropped, load_square


@pytest.mark.parametrize("shape", [(40, 71), (71, 40), (13, 29), (28, 28), (8, 8)])
def test_images_are_resized_and_cropped_as_torchvision_does(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    split = Split("train", ["0"], np.zeros(1, int), lambda i: pixels, "one")
    shorter = min(shape)
    # torchvision's Resize(28) gives the longer side int(28 * longer / shorter); CenterCrop cuts round((side - 28) / 2).
    height, width = (28 if side == shorter else int(28 * side / shorter) for side in shape)
    resized = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - 28) / 2), round((width - 28) / 2)
    square = load_square(split, 0, 28)
    assert square.shape == (28, 28, 3)
    np.testing.assert_array_equal(square, resized[top : top + 28, left : left + 28])


@pytest.mark.parametrize("shape", [(40, 71), (71, 40), (20, 20)])
def test_squares_are_cropped_from_larger_images_as_torchvision_does(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    split = Split("train", ["0"], np.zeros(1, int), lambda i: pixels, "one")
    larger = centre_cropped(split, 32, 28)
    height, width = (32 if side == min(shape) else int(32 * side / min(shape)) for side in shape)
    resized = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - 28) / 2), round((width - 28) / 2)
    np.testing.assert_array_equal(larger.read(0), resized[top : top + 28, left : left + 28])
    others = [centre_cropped(split, 33, 28), centre_cropped(split, 32, 28, interpolation="bilinear")]
    assert len({one.fingerprint for one in (split, larger, *others)}) == 4


@pytest.mark.parametrize("shape", [(3, 200), (200, 3), (1, 90), (4, 97)])
@pytest.mark.parametrize("resample", [Resampling.BILINEAR, Resampling.BICUBIC])
def test_of_a_long_image_only_the_kept_part_is_resized(shape, resample):
    """The values are those of the whole image, but for rounding.

    They are chosen such that nothing is clipped: Pillow resizes one side after the other, the cheaper one first.
    """
    pixels = np.random.default_rng(0).integers(64, 192, (*shape, 3), dtype=np.uint8)
    height, width = (32 if side == min(shape) else int(32 * side / min(shape)) for side in shape)
    whole = np.asarray(Image.fromarray(pixels).resize((width, height), resample))
    top, left = round((height - 28) / 2), round((width - 28) / 2)
    found = resize_centre_crop(pixels, 32, 28, resample=resample)
    assert np.abs(found.astype(int) - whole[top : top + 28, left : left + 28]).max() <= 1


def test_a_line_of_pixels_takes_the_memory_of_a_square():
    """As a whole it would be 256 × 5,120,000 px, 4 GB. A process of 1 GB more than now has room for the square."""
    line = np.random.default_rng(0).integers(0, 256, (1, 20_000, 3), dtype=np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (virtual_bytes() + 2**30, hard))
    try:
        assert resize_centre_crop(line, 256, 224).shape == (224, 224, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def virtual_bytes():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def test_the_key_of_cached_crops_stays():
    """Features that were cached under this key by earlier versions are found again."""
    split = Split("train", ["0"], np.zeros(1, int), lambda i: None, "one")
    expected = hashlib.sha256(b"oneshorter side 32 px bicubic, centre 28 px").hexdigest()
    assert centre_cropped(split, 32, 28).fingerprint == expected
