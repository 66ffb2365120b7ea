"""Bilinear resizing beside PyTorch's, and padding to whole patches."""

import jax
import numpy as np
import pytest

from dinojax.heads.depth import pad_to_patches
from dinojax.heads.resize import resize_bilinear
from tests.support.torch_heads import padded


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(6, 10), (7, 5), (3, 5), (1, 9), (2, 3)])
def test_equals_interpolate(size, align_corners):
    torch = pytest.importorskip("torch")
    with jax.enable_x64(True):
        maps = np.random.default_rng(0).standard_normal((2, 3, 5, 4))
        found = resize_bilinear(jax.numpy.asarray(maps), size, align_corners=align_corners)
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(maps.transpose(0, 3, 1, 2)), size, mode="bilinear", align_corners=align_corners
        )
        np.testing.assert_allclose(found, expected.numpy().transpose(0, 2, 3, 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("height", "width"), [(14, 28), (15, 27), (1, 40)])
def test_pads_on_both_sides_and_more_after(height, width):
    images = np.random.default_rng(0).standard_normal((1, height, width, 3), np.float32)
    np.testing.assert_array_equal(pad_to_patches(images, 14), padded(images))
