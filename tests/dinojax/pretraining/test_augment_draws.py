"""What multi-crop draws, against the documented distributions, and whole views against Pillow's pipeline."""

import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dinojax.errors import UserError
from dinojax.pretraining.augment import MultiCropConfig, Views, draw_box, draw_jitter, draw_views, multi_crop
from tests.support import pillow_reference as reference

DRAWS = 20_000
RATIO = (3 / 4, 4 / 3)
# All tests together make some 60 comparisons of a fixed seed: one in 10⁴ by chance is rare enough.
SIGNIFICANCE = 1e-4
SMALL = MultiCropConfig(global_size=32, local_size=16, local_crops=3)


def keys(seed: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), DRAWS)


def boxes(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float] = RATIO) -> np.ndarray:
    draw = jax.jit(jax.vmap(lambda key: draw_box(key, height, width, scale, ratio)))
    return np.asarray(draw(keys(height * width)))


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    assert low <= values.min() and values.max() <= high
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > SIGNIFICANCE


def torchvision_box(rng: np.random.Generator, height: int, width: int, scale, ratio) -> tuple[int, int, int, int]:
    """`RandomResizedCrop.get_params`, as documented, with numpy's generator."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def test_boxes_have_uniform_area_log_uniform_ratio_and_uniform_place():
    """On an image so large that rounding to pixels is invisible and every small box fits at the first try."""
    side, rng = 20_000, np.random.default_rng(0)
    top, left, height, width = boxes(side, side, (0.05, 0.4)).T.astype(np.float64)
    assert_uniform(height * width / side**2, 0.0499, 0.4001)
    assert_uniform(np.log(width / height), math.log(RATIO[0]) - 1e-3, math.log(RATIO[1]) + 1e-3)
    for start, length in ((top, height), (left, width)):
        assert_uniform((start + rng.uniform(size=DRAWS)) / (side - length + 1), 0, 1)


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(64, 64, (0.4, 1.0)), (32, 32, (0.05, 0.4)), (48, 80, (0.4, 1.0)), (20, 90, (0.2, 1))],
)
def test_boxes_are_distributed_as_torchvision_s(height, width, scale):
    """On small images, where tries fail and the central box steps in: each of the four numbers' distribution."""
    rng = np.random.default_rng(1)
    expected = np.array([torchvision_box(rng, height, width, scale, RATIO) for _ in range(DRAWS)])
    drawn = boxes(height, width, scale)
    assert (drawn[:, :2] >= 0).all() and (drawn[:, :2] + drawn[:, 2:] <= [height, width]).all()
    for ours, theirs in zip(drawn.T, expected.T):
        counts = np.array([np.bincount(x, minlength=width + 1) for x in (ours, theirs)])
        rare = counts.sum(0) < 20
        table = np.column_stack([counts[:, ~rare], counts[:, rare].sum(1)])
        table = table[:, table.sum(0) > 0]
        if table.shape[1] > 1:
            assert stats.chi2_contingency(table).pvalue > SIGNIFICANCE


@pytest.mark.parametrize(
    ("height", "width", "ratio", "expected"),
    [
        (100, 10, RATIO, (43, 0, 13, 10)),
        (10, 100, RATIO, (0, 43, 10, 13)),
        (50, 50, (1.1, 1.2), (2, 0, 45, 50)),
    ],
)
def test_when_no_try_fits_the_central_box_is_taken(height, width, ratio, expected):
    assert (boxes(height, width, (1.0, 1.0), ratio) == expected).all()


def test_jitter_factors_are_uniform_and_orders_equally_frequent():
    strength = (0.4, 0.4, 0.2, 0.1)
    factors, orders = jax.jit(jax.vmap(lambda key: draw_jitter(key, strength)))(keys(2))
    for values, low, high in zip(np.asarray(factors).T, (0.6, 0.6, 0.8, -0.1), (1.4, 1.4, 1.2, 0.1)):
        assert_uniform(values, low - 1e-6, high + 1e-6)
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    counts = np.unique(np.asarray(orders) @ [64, 16, 4, 1], return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > SIGNIFICANCE
    assert np.abs(np.corrcoef(np.column_stack([factors, orders[:, 0]]).T) - np.eye(5)).max() < 0.04


def test_a_strength_above_one_never_makes_a_factor_negative():
    factors, _ = jax.vmap(lambda key: draw_jitter(key, (1.5, 0, 0, 0)))(keys(3))
    assert_uniform(np.asarray(factors)[:, 0], 0, 2.5)


# Blur and solarize of the first global, the second global and the local crops.
CHANCES = {
    "v1": ((1.0, 0.0), (0.1, 0.2), (0.5, 0.0)),
    "v2_paper": ((1.0, 0.0), (0.1, 0.2), (0.5, 0.0)),
    "v2_as_released": ((0.0, 0.0), (0.9, 0.2), (0.5, 0.0)),
}


@pytest.mark.parametrize("mode", CHANCES)
def test_how_often_each_operation_happens(mode):
    config = MultiCropConfig(mode=mode, global_crops=3, local_crops=2)
    draw = jax.jit(lambda key: draw_views(key, jnp.arange(DRAWS), 64, 64, config))
    first_to_third, local = jax.tree.map(np.asarray, draw(jax.random.key(0)))
    views = [Views(*leaves) for group in (first_to_third, local) for leaves in zip(*group)]
    first, second, small = CHANCES[mode]
    for view, (blur, solarize) in zip(views, (first, second, second, small, small)):
        happened = {"flip": 0.5, "jitter": 0.8, "grayscale": 0.2, "blur": blur, "solarize": solarize}
        for name, chance in happened.items():
            count = int(getattr(view, name).sum())
            assert stats.binomtest(count, DRAWS, chance).pvalue > SIGNIFICANCE, name
        assert_uniform(view.radius, 0.1, 2.0)
        flags = np.array([getattr(view, name) for name, chance in happened.items() if 0 < chance < 1])
        assert np.abs(np.corrcoef(flags) - np.eye(len(flags))).max() < 0.04
    area = (views[3].box[:, 2] * views[3].box[:, 3]) / 64**2
    assert 0.04 < area.min() < 0.06 and 0.39 < area.max() < 0.41
    # Neither the crops of an image nor neighbouring images share their numbers.
    radii = np.stack([view.radius for view in views] + [np.roll(views[0].radius, 1)])
    assert np.abs(np.corrcoef(radii) - np.eye(len(radii))).max() < 0.04


def unnormalised(crops: jax.Array, config: MultiCropConfig) -> np.ndarray:
    return (np.asarray(crops) * np.array(config.std) + np.array(config.mean)) * 255


# slow: compiles a third augmentation, which differs from v2_paper only in its blur
@pytest.mark.parametrize("mode", ["v1", "v2_paper", pytest.param("v2_as_released", marks=pytest.mark.slow)])
def test_whole_views_are_what_pillow_s_pipeline_makes(mode):
    height, width = 48, 80
    config = MultiCropConfig(global_size=48, local_size=24, local_crops=4, mode=mode)
    pixels = np.tile(reference.photo_like(height, width)[:6], (2, 1, 1, 1))
    key = jax.random.key(5)
    crops = jax.jit(lambda key, images: multi_crop(key, images, config))(key, pixels)
    views = draw_views(key, jnp.arange(len(pixels)), height, width, config)
    for group, drawn, size in zip(crops, views, (48, 24)):
        drawn = {name: np.asarray(value) for name, value in drawn._asdict().items()}
        for crop, image in np.ndindex(*group.shape[:2]):
            given = {name: value[crop, image] for name, value in drawn.items()}
            expected = reference.view(pixels[image], given, size, v2=mode != "v1")
            error = np.abs(unnormalised(group[crop, image], config) - expected)
            # A single step from the resize may grow in contrast and hue, and solarize turns one across 128 into a jump.
            assert np.mean(error < 1.01) > 0.995, given
            assert error.mean() < 0.02, given


def test_an_image_s_views_depend_on_its_id_alone():
    pixels, key = reference.photo_like(32, 32), jax.random.key(6)
    run = jax.jit(lambda images, ids: multi_crop(key, images, SMALL, ids))
    ids = np.array([70, 3, 11, 2**30, 0, 5, 6, 8], np.int32)
    everything, some = run(pixels, ids), np.array([6, 1, 3])
    for all_views, views in zip(everything, run(pixels[some], ids[some])):
        np.testing.assert_allclose(views, all_views[:, some], rtol=0, atol=1e-5)
    by_place = run(pixels, np.arange(8, dtype=np.int32))
    default = jax.jit(lambda images: multi_crop(key, images, SMALL))(pixels)
    for views, others, same in zip(by_place, everything, default):
        np.testing.assert_allclose(views, same, rtol=0, atol=1e-5)
        apart = np.abs(views - others)[:, ids != np.arange(8)].max(axis=(2, 3, 4))
        assert apart.min() > 0.1, "each crop of each image with another id"  # 0.19 measured, where rounding leaves 1e-5


SPREAD_OVER_TWO_DEVICES = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from dinojax.pretraining.augment import MultiCropConfig, multi_crop

jax.config.update("jax_num_cpu_devices", 2)
pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
config = MultiCropConfig(global_size=32, local_size=16, local_crops=3)
run = jax.jit(lambda images, ids: multi_crop(jax.random.key(6), images, config, ids))
mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
place = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
ids = np.arange(8, dtype=np.int32) + 3
spread, alone = run(place(pixels), place(ids)), run(pixels, ids)
assert len(spread[0].sharding.device_set) == 2, spread[0].sharding
for one, other in zip(spread, alone):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
"""


@pytest.mark.slow  # compiles the augmentation twice in a process of its own
def test_the_number_of_devices_changes_nothing():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SPREAD_OVER_TWO_DEVICES], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(("global_crops", "local_crops"), [(1, 0), (1, 2), (3, 1)])
def test_any_number_of_crops(global_crops, local_crops):
    config = MultiCropConfig(global_size=20, local_size=12, global_crops=global_crops, local_crops=local_crops)
    large, small = jax.jit(lambda images: multi_crop(jax.random.key(0), images, config))(reference.photo_like(16, 24))
    assert large.shape == (global_crops, 8, 20, 20, 3) and small.shape == (local_crops, 8, 12, 12, 3)
    assert large.dtype == small.dtype == jnp.float32 and bool(jnp.isfinite(large).all())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"global_crops": 0}, "global_crops=0 is not 1 or more"),
        ({"local_crops": -1}, "local_crops=-1 is not 0 or more"),
        ({"local_size": 4, "mode": "v2_paper"}, "crop size=4"),
        ({"local_scale": (0.4, 0.1)}, "local_scale"),
        ({"global_scale": (0.4, 1.5)}, "global_scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"blur_probabilities": (1.0, 1.1, 0.5)}, "1.1"),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "the last at most 0.5"),
    ],
)
def test_impossible_settings_are_refused_by_name(wrong, message):
    with pytest.raises(UserError, match=message):
        MultiCropConfig(**wrong)
