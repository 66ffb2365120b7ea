"""The rotation of DINOv3: plain numpy loops, complex numbers, and what it does to a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dinojax import VARIANTS, UserError, VisionTransformer, ViTConfig
from dinojax.models.files import abstract_model, load, save
from dinojax.models.rope import periods, rotate, rotation

CONFIG = ViTConfig(
    img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, init_values=0.1, num_register_tokens=3,
    layer_norm_eps=1e-5, key_bias=False, rope_base=100.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    made = VisionTransformer(CONFIG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), nnx.state(made, nnx.Param))
    nnx.update(made, noisy)
    return made


def images(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).standard_normal((2, height, width, 3), np.float32)


def test_each_pair_of_channels_is_a_complex_number_that_turns():
    """Written out patch by patch: centre, period, angle; the first tokens stay as they are."""
    rows, columns, channels, prefix = 3, 5, 16, 2
    x = np.random.default_rng(0).standard_normal((1, 1, prefix + rows * columns, channels))
    with jax.enable_x64(True):
        by = rotation(rows, columns, channels, unrotated=prefix, base=100.0, dtype=jnp.float64)
        found = np.asarray(rotate(jnp.asarray(x), by))
    np.testing.assert_array_equal(found[:, :, :prefix], x[:, :, :prefix])
    for row in range(rows):
        for column in range(columns):
            token = prefix + row * columns + column
            for pair in range(channels // 2):
                place, count = (row, rows) if pair < channels // 4 else (column, columns)
                coordinate = 2 * (place + 0.5) / count - 1
                angle = 2 * np.pi * coordinate / 100.0 ** (4 * (pair % (channels // 4)) / channels)
                before = complex(x[0, 0, token, pair], x[0, 0, token, pair + channels // 2])
                after = before * np.exp(1j * angle)
                assert found[0, 0, token, pair] == pytest.approx(after.real, abs=1e-12)
                assert found[0, 0, token, pair + channels // 2] == pytest.approx(after.imag, abs=1e-12)


def test_products_depend_on_the_distance_alone():
    x, y = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 8))
    by = rotation(4, 4, 8, unrotated=0, base=100.0)
    grid = [rotate(jnp.broadcast_to(jnp.asarray(z, jnp.float32), (1, 1, 16, 8)), by)[0, 0] for z in (x, y)]
    products = np.asarray(grid[0] @ grid[1].T).reshape(4, 4, 4, 4)
    for row, column in ((0, 0), (1, 2), (2, 1)):
        np.testing.assert_allclose(products[row, column, row + 1, column + 1], products[0, 0, 1, 1], atol=1e-5)


def test_half_precision_is_rotated_in_float32():
    x = jax.random.normal(jax.random.key(0), (1, 2, 17, 16), jnp.bfloat16)
    by = rotation(4, 4, 16, unrotated=1, base=100.0)
    assert by.cos.dtype == jnp.float32
    exact = np.asarray(rotate(x.astype(jnp.float32), by))
    np.testing.assert_array_equal(rotate(x, by), exact.astype(jnp.bfloat16))


def test_bfloat16_periods_are_those_of_float32_rounded():
    exact, rounded = periods(64, 100.0), periods(64, 100.0, "bfloat16")
    assert exact[0] == rounded[0] == 1 and 70 < exact[-1] < 100 and len(exact) == 16
    assert 1e-4 < np.abs(rounded / exact - 1).max() < 2**-8


@jax.jit
def run(model, pixels, masks=None):
    return model(pixels, masks)


def test_a_model_in_half_precision_stays_close(model):
    pixels = images(32, 48)
    exact, half = run(model, pixels).patch_tokens, run(model.astype(jnp.bfloat16), pixels).patch_tokens
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(np.float32) - exact).max() < 0.05 * np.abs(exact).max()


def test_pixels_beyond_the_last_patch_are_cut_off_as_transformers_does(model):
    pixels = images(39, 55)
    np.testing.assert_array_equal(run(model, pixels).prenorm, run(model, pixels[:, :32, :48]).prenorm)


def test_outputs_of_every_kind_agree(model):
    """Maps and the attention of a non-square image, beside the tokens of one forward pass."""
    pixels, masks = images(32, 48), np.zeros((2, 24), bool)
    features = run(model, pixels)
    get = jax.jit(lambda model, x: model.get_intermediate_layers(x, reshape=True, return_class_token=True))
    ((patches, cls_token),) = get(model, pixels)
    np.testing.assert_allclose(patches.reshape(2, 24, -1), features.patch_tokens, atol=1e-6)
    np.testing.assert_allclose(cls_token, features.cls_token, atol=1e-6)
    attention = jax.jit(lambda model, x: model.get_last_selfattention(x))(model, pixels)
    assert attention.shape == (2, 2, 28, 28)
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(run(model, pixels, masks).cls_token, features.cls_token, atol=1e-6)
    masks[:, 3] = True
    assert np.abs(run(model, pixels, masks).cls_token - features.cls_token).max() > 1e-4
    with pytest.raises(ValueError, match="has no position table"):
        model.interpolated_pos_embed(32, 32)


def test_a_training_cannot_move_a_key_bias(model):
    """The keys have none: a gradient reaches the biases of queries and values, and there are no others."""
    graphdef, state = nnx.split(model, nnx.Param)
    assert model.blocks[0].attn.qkv.bias.shape == (64,)

    @jax.jit
    @jax.grad
    def gradients(state):
        return jnp.sum(nnx.merge(graphdef, state)(images(32, 32)).cls_token ** 2 * jnp.arange(32.0)[None])

    gradient = gradients(state)["blocks"][0]["attn"]["qkv"]["bias"][...]
    assert np.abs(gradient).min() > 0


def test_a_model_comes_back_and_older_files_stay_as_they_were(model, tmp_path):
    assert load(save(model, tmp_path / "v3")).config == CONFIG
    older = dataclasses.replace(VARIANTS["dinov2_vits14_reg"], embed_dim=16, depth=1, num_heads=2, img_size=28)
    later = {"layer_norm_eps", "key_bias", "rope_base", "rope_periods"}
    assert not later & set(older.settings()) and ViTConfig(**older.settings()) == older
    assert later - {"rope_periods"} <= set(CONFIG.settings()) and ViTConfig(**CONFIG.settings()) == CONFIG


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_base": None}, "rope_base=None is not a number for the family 'dinov3'"),
        ({"family": "dinov2"}, "rope_base=100.0 is not a number for the family 'dinov3' and None for others"),
        ({"embed_dim": 12}, "embed_dim=12 is not 4 or a multiple of it for each of num_heads=2 heads"),
        ({"rope_base": 1.0}, "rope_base=1.0 is not a number from 1.001"),
        ({"layer_norm_eps": -1}, "layer_norm_eps=-1 is not a number from 0 to 1"),
    ],
)
def test_settings_that_no_model_has_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)


# Of `DINOv3ViTModel` in transformers 5.24 with the settings of each; arXiv 2508.10104 gives 21 M, 29 M, 86 M, 300 M,
# 840 M and 6,716 M.
PARAMETERS = {
    "dinov3_vits16": 21_596_544,
    "dinov3_vits16plus": 28_692_864,
    "dinov3_vitb16": 85_660_416,
    "dinov3_vitl16": 303_129_600,
    "dinov3_vitl16_sat493m": 303_129_600,
    "dinov3_vith16plus": 840_592_640,
    "dinov3_vit7b16": 6_716_035_072,
    "dinov3_vit7b16_sat493m": 6_716_035_072,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_as_many_parameters_as_published(name):
    """Blocks are alike, so one and two of them tell the rest."""
    one, two = (_count(dataclasses.replace(VARIANTS[name], depth=depth)) for depth in (1, 2))
    assert one + (VARIANTS[name].depth - 1) * (two - one) == PARAMETERS[name]


def test_every_published_model_is_counted():
    assert {name for name in VARIANTS if name.startswith("dinov3")} == set(PARAMETERS)


def _count(config: ViTConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract_model(config), nnx.Param)))
