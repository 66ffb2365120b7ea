"""Photos to arrays: equal to the official evaluation's transform, whatever a photo is given as; refusals say why."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dinojax
from dinojax import Preprocessing, UserError, VisionTransformer, ViTConfig
from dinojax.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD

OWN = Preprocessing((0.5, 0.4, 0.3), (0.25, 0.3, 0.2), image_size=32, patch_size=8)
PIXELS = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def official(pixels: np.ndarray, size: int, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> np.ndarray:
    """Shorter side bicubic, centre crop, /255, mean and deviation; by Pillow and float64."""
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    resized = Image.fromarray(pixels).resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in resized.size)
    crop = np.asarray(resized.crop((left, top, left + size, top + size)), np.float64) / 255
    return (crop - mean) / std


def test_a_photo_is_prepared_as_in_the_official_evaluation():
    found = dinojax.preprocess(PIXELS)
    assert found.shape == (1, 224, 224, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found[0], official(PIXELS, 224), atol=1e-6)
    own = dinojax.preprocess([PIXELS, PIXELS[:, ::-1]], OWN, size=None)
    assert own.shape == (2, 32, 32, 3)
    np.testing.assert_allclose(own[1], official(PIXELS[:, ::-1], 32, OWN.mean, OWN.std), atol=1e-6)


def test_paths_pillow_images_and_arrays_give_the_same(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "photo.png")
    expected = dinojax.preprocess(PIXELS, OWN, size=32)
    photos = [tmp_path / "photo.png", str(tmp_path / "photo.png"), Image.fromarray(PIXELS), jnp.asarray(PIXELS)]
    for photo in photos:
        np.testing.assert_array_equal(dinojax.preprocess(photo, OWN, size=32), expected)
    several = dinojax.preprocess((photo for photo in photos), OWN, size=32)
    np.testing.assert_array_equal(several, np.repeat(expected, 4, axis=0))
    np.testing.assert_array_equal(dinojax.preprocess(np.stack([PIXELS] * 2), OWN, size=32), several[:2])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_any_mode_of_pillow_is_read_as_rgb(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    expected = official(np.asarray(image.convert("RGBA" if mode == "P" else "RGB").convert("RGB")), 32)
    np.testing.assert_allclose(dinojax.preprocess(image, size=32)[0], expected, atol=1e-6)


def test_greyscale_and_alpha_channels_of_arrays():
    grey = PIXELS[..., 0]
    expected = dinojax.preprocess(np.stack([grey] * 3, axis=-1), size=32)
    for given in (grey, grey[..., None]):
        np.testing.assert_array_equal(dinojax.preprocess(given, size=32), expected)
    alpha = np.concatenate([PIXELS, PIXELS[..., :1]], axis=-1)
    np.testing.assert_array_equal(dinojax.preprocess(alpha, size=32), dinojax.preprocess(PIXELS, size=32))


def test_floats_are_resized_without_rounding_to_eight_bits():
    """Pillow rounds uint8 to whole numbers, so the two differ by half a step, and by what it clips at the ends."""
    soft = (PIXELS // 2 + 64).astype(np.uint8)  # nothing to clip
    whole = dinojax.preprocess(soft, Preprocessing((0.0,) * 3, (1.0,) * 3), size=32)
    fine = dinojax.preprocess(soft / 255, Preprocessing((0.0,) * 3, (1.0,) * 3), size=32)
    difference = np.abs(whole - fine) * 255
    assert 0.2 < difference.max() < 1.01  # two passes, each rounded


def test_the_whole_image_keeps_its_aspect_in_whole_patches():
    assert dinojax.preprocess(PIXELS, OWN, size=32, crop=False).shape == (1, 32, 48, 3)
    assert dinojax.preprocess(PIXELS[:50], OWN, size=40, crop=False).shape == (1, 40, 72, 3)
    assert dinojax.preprocess(PIXELS, OWN, size=37, crop=False).shape == (1, 40, 56, 3)  # nearest to 37 × 55.5
    found = dinojax.preprocess(PIXELS, size=56, crop=False)
    resized = Image.fromarray(PIXELS).resize((84, 56), Image.Resampling.BICUBIC)
    expected = (np.asarray(resized, np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_normalize_is_the_last_step_inside_jit():
    small = dinojax.preprocess(PIXELS[:32, :32], OWN, size=32)
    normalize = jax.jit(lambda images: dinojax.normalize(images, OWN))
    np.testing.assert_allclose(normalize(PIXELS[None, :32, :32]), small, atol=1e-6)
    np.testing.assert_allclose(normalize((PIXELS[None, :32, :32] / 255).astype(np.float32)), small, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([], {}, "there are no images"),
        ("nowhere.jpg", {}, "nowhere.jpg cannot be read"),
        (PIXELS.astype(np.int64), {}, r"image 0 has pixels of int64; pass uint8 \(0–255\) or floats"),
        (PIXELS.astype(np.float32), {}, "image 0 has floats from 0 to 255, not from 0 to 1: divide 0–255 by 255"),
        (np.full((8, 8, 3), np.nan), {}, "image 0 has floats from nan"),
        (PIXELS.transpose(2, 0, 1), {}, r"image 0 has the shape \(3, 60, 90\), .*transpose\(1, 2, 0\)"),
        ([PIXELS, 3], {}, "image 1 is a int; pass a path"),
        ([PIXELS, PIXELS[:40]], {"crop": False}, "with crop=False the images have several sizes"),
        (np.zeros((1, 20_000, 3), np.uint8), {"crop": False}, r"an image of 20000×1 px would become"),
        (PIXELS, {"size": 0}, "size=0 is not a whole number"),
    ],
)  # fmt: skip
def test_what_cannot_be_prepared_is_refused_with_the_way_on(images, options, message):
    with pytest.raises(UserError, match=message):
        dinojax.preprocess(images, **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"mean": (0.5, math.nan, 0.5)}, "mean=.* is not a number for each channel"),
        ({"std": (1.0, 0.0, 1.0)}, "is not positive"),
        ({"std": (1.0,)}, "is not as long as mean"),
        ({"image_size": 0}, "image_size=0 is not a whole number"),
        ({"interpolation": "cubic"}, "interpolation='cubic' is not bicubic or"),
    ],
)
def test_a_preprocessing_that_no_model_has_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        Preprocessing(**words)


def test_a_model_keeps_its_preprocessing_on_disk(tmp_path):
    config = ViTConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    model = VisionTransformer(config, rngs=nnx.Rngs(0), preprocessing=OWN)
    assert dinojax.load(dinojax.save(model, tmp_path / "model")).preprocessing == OWN
    assert model.astype(jnp.bfloat16).preprocessing == OWN
    expected = Preprocessing(image_size=32, patch_size=8)
    assert VisionTransformer(config, rngs=nnx.Rngs(0)).preprocessing == expected


def test_a_published_name_is_not_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"converters\.load_pretrained\('dinov2_vits14'\) loads it"):
        dinojax.load("dinov2_vits14")
    with pytest.raises(UserError, match=r"did you mean converters\.load_pretrained\('dinov2_vitb14'\)"):
        dinojax.load("dinov2_vit_b14")
