"""The model's contract: shapes and order of tokens, intermediate layers, sizes, drop path, dtypes, initial values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dinojax import VARIANTS, DINOHead, UserError, VisionTransformer, ViTConfig
from dinojax.models.files import abstract_model, named_parameters
from dinojax.models.layers import drop_path

SMALL = ViTConfig(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2)
V2 = dataclasses.replace(SMALL, init_values=0.5, num_register_tokens=2, family=None)


def model(config: ViTConfig = SMALL) -> VisionTransformer:
    return VisionTransformer(config, rngs=nnx.Rngs(0))


def images(height: int = 32, width: int = 48, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, height, width, 3), np.float32)


def test_tokens_have_the_documented_shapes_and_order():
    features = model(V2)(images())
    assert features.cls_token.shape == (2, 24)
    assert features.register_tokens.shape == (2, 2, 24)
    assert features.patch_tokens.shape == (2, 24, 24)
    assert features.prenorm.shape == (2, 1 + 2 + 24, 24)
    normalised = model(V2).norm(features.prenorm)
    parts = [features.cls_token[:, None], features.register_tokens, features.patch_tokens]
    np.testing.assert_allclose(normalised, jnp.concatenate(parts, axis=1), atol=1e-6)


def test_models_without_registers_have_none():
    assert model()(images()).register_tokens.shape == (2, 0, 24)


@pytest.mark.parametrize("config", [SMALL, V2])
def test_intermediate_layers_by_number_and_by_index(config):
    vit, x = model(config), images()
    last_two = vit.get_intermediate_layers(x, n=2, return_class_token=True)
    by_index = vit.get_intermediate_layers(x, n=[1, 2], return_class_token=True)
    jax.tree.map(np.testing.assert_array_equal, last_two, by_index)
    features = vit(x)
    np.testing.assert_allclose(last_two[-1][0], features.patch_tokens, atol=1e-6)
    np.testing.assert_allclose(last_two[-1][1], features.cls_token, atol=1e-6)


def test_intermediate_layers_as_maps_and_before_the_norm():
    vit, x = model(V2), images()
    (patches,) = vit.get_intermediate_layers(x)
    (maps,) = vit.get_intermediate_layers(x, reshape=True)
    assert maps.shape == (2, 4, 6, 24)
    np.testing.assert_array_equal(maps[:, 1, 2], patches[:, 1 * 6 + 2])
    (raw,) = vit.get_intermediate_layers(x, norm=False)
    np.testing.assert_allclose(raw, vit(x).prenorm[:, 3:], atol=1e-6)


@pytest.mark.parametrize("n", [0, 4, [3], [], -1])
def test_blocks_that_do_not_exist_are_refused(n):
    with pytest.raises(ValueError, match="does not name blocks"):
        model().get_intermediate_layers(images(), n=n)


def test_attention_rows_are_distributions():
    attention = model(V2).get_last_selfattention(images())
    assert attention.shape == (2, 2, 27, 27)
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-6)


def test_dinov2_refuses_what_dino_cuts_off():
    odd = images(35, 50)
    np.testing.assert_array_equal(model()(odd).cls_token, model()(odd[:, :32, :48]).cls_token)
    with pytest.raises(ValueError, match="35×50 px are not a multiple of the patch size 8"):
        model(V2)(odd)
    with pytest.raises(ValueError, match="smaller than one patch"):
        model()(images(4, 32))


def test_dino_cuts_a_square_at_its_trained_count_but_still_takes_the_stored_table():
    """Upstream compares token counts and the images' sides, not the grid's."""
    np.testing.assert_array_equal(model().interpolated_pos_embed(39, 39), model().pos_embed[...])
    assert not np.allclose(model().interpolated_pos_embed(39, 38), model().pos_embed[...])


def test_masks_need_a_mask_token():
    masks = np.zeros((2, 24), bool)
    with pytest.raises(ValueError, match="no mask token"):
        model()(images(), masks)
    np.testing.assert_array_equal(model(V2)(images(), masks).prenorm, model(V2)(images()).prenorm)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = jnp.ones((4000, 3))
    dropped = drop_path(x, 0.3, jax.random.key(0))
    assert set(np.unique(dropped.sum(1).round(4))) == {0.0, np.float32(3 / 0.7).round(4)}
    assert abs(float((dropped[:, 0] == 0).mean()) - 0.3) < 0.03
    np.testing.assert_array_equal(drop_path(x, 0.3, None), x)


def test_drop_path_is_drawn_only_with_a_key_and_for_each_block():
    vit = model(dataclasses.replace(SMALL, drop_path_rate=0.5))
    assert [block.drop_path_rate for block in vit.blocks] == [0.0, 0.25, 0.5]
    x = images(batch=16)
    np.testing.assert_array_equal(vit(x).cls_token, model()(x).cls_token)
    first, again, other = (vit(x, key=jax.random.key(seed)).cls_token for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    uniform = dataclasses.replace(SMALL, drop_path_rate=0.5, drop_path_uniform=True)
    assert [block.drop_path_rate for block in model(uniform).blocks] == [0.5] * 3


def test_the_model_computes_in_the_dtype_of_its_parameters():
    graphdef, state = nnx.split(model(V2))
    half = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    found, expected = half(images()), model(V2)(images())
    assert {array.dtype for array in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    # bfloat16 has 8 bits: 2⁻⁸ of values up to 1.7, a few roundings in a row; 0.0165 measured.
    np.testing.assert_allclose(np.asarray(found.cls_token, np.float32), expected.cls_token, atol=0.03)


def test_initial_values_are_upstreams():
    params = named_parameters(model(ViTConfig(embed_dim=192, num_heads=3, depth=2)))
    for name in ("blocks.1.mlp.fc1.kernel", "pos_embed"):
        sampling_error = (2 * params[name].size) ** -0.5  # relative, of a deviation of so many normal numbers
        assert np.std(params[name]) == pytest.approx(0.02, rel=4 * sampling_error)
    assert not params["blocks.0.attn.qkv.bias"].any()
    bound = (3 * 16 * 16) ** -0.5
    # The largest of n uniform numbers falls short of the bound by a share of about 1 / n.
    kernel = np.abs(params["patch_embed.proj.kernel"])
    assert kernel.max() == pytest.approx(bound, rel=10 / kernel.size)
    assert np.abs(params["patch_embed.proj.bias"]).max() <= bound
    head = named_parameters(DINOHead(64, 1000, hidden_dim=96, bottleneck_dim=32, rngs=nnx.Rngs(0)))
    prototypes = np.abs(head["last_layer.weight_v"])
    assert prototypes.max() == pytest.approx(32**-0.5, rel=10 / prototypes.size)
    assert (head["last_layer.weight_g"] == 1).all()


# Counts of facebookresearch's models: 22,056,576 is also torch.hub's for dinov2_vits14.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("dino_vits16", 21_665_664),
        ("dino_vits8", 21_670_272),
        ("dino_vitb16", 85_798_656),
        ("dino_vitb8", 85_807_872),
        ("dinov2_vits14", 22_056_576),
        ("dinov2_vitb14", 86_580_480),
        ("dinov2_vitl14", 304_368_640),
        ("dinov2_vitg14", 1_136_480_768),
        ("dinov2_vits14_reg", 22_058_112),
        pytest.param("dinov2_vitg14_reg", 1_136_486_912, marks=pytest.mark.slow),  # 40 blocks again
    ],
)
def test_published_models_have_their_number_of_parameters(name, parameters):
    shapes = nnx.state(abstract_model(VARIANTS[name]), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 5},
        {"patch_size": 64},
        {"ffn_layer": "moe"},
        {"num_heads": 0},
        {"depth": "12"},
        {"depth": 12.0},
        {"depth": 10**6},
        {"num_register_tokens": True},
        {"mlp_ratio": float("nan")},
        {"mlp_ratio": [4]},
        {"init_values": "1"},
        {"interpolate_offset": None},
        {"qkv_bias": 1},
        {"family": "dinov3"},
        {"family": []},
        {"ffn_layer": []},
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(changes):
    """The constructor is left out: under tests, jaxtyping would refuse wrong types before it is reached."""
    config = object.__new__(ViTConfig)
    vars(config).update(vars(SMALL) | changes)
    with pytest.raises(UserError, match=next(iter(changes))):
        config.__post_init__()


def test_one_compilation_serves_every_batch_of_one_shape():
    graphdef, state = nnx.split(model())
    forward = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x).cls_token)
    for _ in range(3):
        forward(state, images())
    assert forward._cache_size() == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (images().astype(np.uint8), r"images of uint8 are not normalised: dinojax\.preprocess"),
        (images()[0], r"images of shape \(32, 48, 3\) do not have four axes; images\[None\]"),
        (images().transpose(0, 3, 1, 2), r"do not end with the 3 channels .*transpose\(0, 2, 3, 1\)"),
        (images()[..., :1], r"images of shape \(2, 32, 48, 1\) do not end with the 3 channels of the model; RGB has 3"),
        (images()[:0], "the batch is empty"),
    ],
)
def test_what_is_not_a_batch_of_normalised_images_is_refused(given, message):
    for call in (model(), model().get_intermediate_layers, model().get_last_selfattention, jax.jit(model())):
        with pytest.raises(ValueError, match=message):
            call(given)


@pytest.mark.parametrize("masks", [np.zeros((2, 23), bool), np.zeros((1, 24), bool), np.zeros((2, 24), np.float32)])
def test_misshapen_masks_are_refused(masks):
    with pytest.raises(ValueError, match=r"expected is bool of shape \(2, 24\), one for each image and patch"):
        model(V2)(images(), masks)
