"""Variants of the DINOv2 step are the plain step; what it refuses, what it keeps small, and what its monitors say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dinojax import DINOHead, UserError, VisionTransformer, ViTConfig
from dinojax.pretraining.augment import MultiCropConfig
from dinojax.pretraining.dinov2_optim import dinov2_optimizer
from dinojax.pretraining.dinov2_step import (
    DINOv2,
    DINOv2Objective,
    init_dinov2_state,
    make_dinov2_train_step,
    with_masks,
)
from dinojax.pretraining.masking import BlockMasking, block_masks
from dinojax.pretraining.monitors import diagnose_dinov2_collapse
from dinojax.pretraining.step import Batches, make_pretrain_steps

BATCH, PROTOTYPES, PATCH_PROTOTYPES, PATCHES = 4, 23, 29, 16
MASKING = BlockMasking(rows=4, columns=4)
CONFIG = ViTConfig(img_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=2, init_values=1.0)
# Half of the time of these tests would be LLVM's.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SINKHORN = DINOv2Objective(centering="sinkhorn_knopp", koleo_group=2)


def tiny_model(drop_path_rate=0.0):
    rngs = nnx.Rngs(0)
    config = dataclasses.replace(CONFIG, drop_path_rate=drop_path_rate, drop_path_uniform=True)
    heads = [
        DINOHead(12, prototypes, hidden_dim=16, bottleneck_dim=8, nlayers=2, norm_last_layer=False, rngs=rngs)
        for prototypes in (PROTOTYPES, PATCH_PROTOTYPES)
    ]
    return DINOv2(VisionTransformer(config, rngs=rngs), *heads)


def crops(local_crops=2, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((2, BATCH, 16, 16, 3), (local_crops, BATCH, 8, 8, 3))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes if shape[0]]


def masks(seed=0):
    return block_masks(jax.random.key(seed), MASKING, 2 * BATCH).reshape(2, BATCH, PATCHES)


def make(drop_path_rate=0.0, **options):
    """The first state of a model, and its step."""
    model = tiny_model(drop_path_rate)
    optimizer = dinov2_optimizer(lambda step: 1e-2, lambda step: 0.04, clip_norm=0.3, freeze_last_layer_steps=1)
    options = {"most_masked": MASKING.most_masked(2 * BATCH), "objective": SINKHORN} | options
    step = make_dinov2_train_step(
        model, optimizer, teacher_temp=lambda step: 0.05, teacher_momentum=lambda step: 0.9, **options
    )
    return init_dinov2_state(model, optimizer), step


def after_two_steps(**options):
    state, step = make(**options)
    state = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)
    step, metrics = compiled(step), []
    for seed in range(2):
        state, found = step(state, crops(dtype=jnp.float64), masks(seed))
        metrics.append(found)
    return state, metrics


# slow: compiles two steps in float64 for each objective
@pytest.mark.slow
@pytest.mark.parametrize("objective", [SINKHORN, DINOv2Objective(koleo_group=2)])
def test_accumulation_with_rematerialisation_is_the_plain_step(objective):
    """Sinkhorn-Knopp and centers see the whole batch; KoLeo looks for neighbours in groups that divide the parts."""
    with jax.enable_x64(True):
        plain, metrics = after_two_steps(objective=objective)
        most = MASKING.most_masked(2 * BATCH, among=BATCH)
        found, found_metrics = after_two_steps(objective=objective, accumulation_steps=2, remat=True, most_masked=most)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11), found, plain)
        for ours, theirs in zip(found_metrics, metrics):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                np.testing.assert_allclose(ours[name], value, rtol=1e-10, err_msg=name)


@pytest.fixture(scope="module")
def half_precision():
    """A state and a compiled step in bfloat16 that drops paths."""
    objective = DINOv2Objective(koleo_group=None)
    state, step = make(drop_path_rate=0.4, compute_dtype=jnp.bfloat16, objective=objective)
    return state, compiled(step)


@pytest.mark.slow  # compiles a step in bfloat16, as the next two do together with it
def test_networks_in_bfloat16_leave_the_state_in_float32_and_compile_once(half_precision):
    state, step = half_precision
    for seed in range(3):
        state, metrics = step(state, crops(), masks(seed), jax.random.key(seed))
        assert all(np.isfinite(value) for value in metrics.values())
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    assert step._cache_size() == 1
    assert int(state.step) == 3


@pytest.mark.slow  # as above
def test_a_batch_without_a_mask_trains_on_class_tokens_and_leaves_the_center_of_patches(half_precision):
    state, step = half_precision
    state, _ = step(state, crops(), masks(), jax.random.key(0))
    after, metrics = step(state, crops(), jnp.zeros((2, BATCH, PATCHES), bool), jax.random.key(1))
    assert metrics["patch_loss"] == 0 and metrics["masked_share"] == 0
    assert metrics["gradient_norm_ibot_head"] == 0
    assert state.center.patches.any() and (after.center.patches == state.center.patches).all()
    assert (after.center.classes != state.center.classes).any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


@pytest.mark.slow  # as above
def test_more_masked_patches_than_announced_end_in_nan_not_in_silence(half_precision):
    state, step = half_precision
    _, metrics = step(state, crops(), jnp.ones((2, BATCH, PATCHES), bool), jax.random.key(1))
    assert np.isnan(metrics["loss"])


def test_no_patch_has_logits_unless_it_is_masked():
    """Nothing as long as the prototypes has more rows than crops and masked patches, forwards or backwards."""
    state, step = make()
    jaxpr = jax.make_jaxpr(step)(state, crops(), masks())
    most = {PROTOTYPES: 4 * BATCH, PATCH_PROTOTYPES: MASKING.most_masked(2 * BATCH)}
    seen = dict.fromkeys(most, 0)
    for shape in shapes_in(jaxpr.jaxpr):
        if shape and shape[-1] in most:
            seen[shape[-1]] = max(seen[shape[-1]], int(np.prod(shape[:-1])))
    assert seen == most and most[PATCH_PROTOTYPES] < 2 * BATCH * PATCHES


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars if hasattr(variable.aval, "shape"))
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes_in(inner)


@pytest.mark.parametrize("local_crops", [0, 3])
def test_any_number_of_local_crops_and_a_shared_head_are_taken(local_crops):
    model = tiny_model()
    model.ibot_head = None
    optimizer = dinov2_optimizer(lambda step: 1e-2, lambda step: 0.04)
    constant = lambda step: 0.05  # noqa: E731
    step = make_dinov2_train_step(model, optimizer, teacher_temp=constant, teacher_momentum=constant, most_masked=9)
    state = init_dinov2_state(model, optimizer)
    after, metrics = jax.eval_shape(step, state, crops(local_crops), masks())
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert {name for name in metrics if name.startswith("gradient_norm")} == {
        "gradient_norm_backbone",
        "gradient_norm_dino_head",
    }


def test_float32_networks_keep_their_dtypes_where_jax_computes_in_64_bits():
    state, step = make(accumulation_steps=2)
    with jax.enable_x64(True):
        after, _ = jax.eval_shape(step, state, crops(), masks(), jax.random.key(0))
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulation_steps": 3}, "accumulation_steps=3 does not divide the batch of 4"),
        ({"objective": DINOv2Objective(koleo_group=3)}, "koleo_group=3 does not divide the 4 images of a part"),
        ({"objective": DINOv2Objective(), "accumulation_steps": 4}, "KoLeo was given 1 image"),
    ],
)
def test_batches_that_cannot_be_split_are_refused(options, message):
    state, step = make(**options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, state, crops(), masks())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"centering": "sinkhorn"}, "centering='sinkhorn' is not"), ({"koleo_group": 1}, "koleo_group=1 is not two")],
)
def test_objectives_out_of_bounds_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DINOv2Objective(**settings)


def test_masks_of_a_step_follow_the_key_of_the_run_and_the_step_number():
    def spy(state, crops, masks, key):
        assert key is None
        return state, {"masks": masks}

    state, _ = make()
    key = jax.random.key(7)
    _, found = with_masks(spy, MASKING, key)(state._replace(step=jnp.asarray(5)), crops(), None)
    expected = block_masks(jax.random.fold_in(key, 5), MASKING, 2 * BATCH)
    assert (found["masks"] == expected.reshape(2, BATCH, PATCHES)).all()


def test_many_steps_from_pixels_take_the_step():
    state, step = make()
    views = MultiCropConfig(global_size=16, local_size=8, local_crops=2)
    steps = make_pretrain_steps(with_masks(step, MASKING, jax.random.key(0)), views, jax.random.key(1), drop_path=True)
    rows = jnp.zeros((3, BATCH), jnp.int32)
    images = jnp.zeros((5, 20, 20, 3), jnp.uint8)
    after, metrics = jax.eval_shape(steps, state, images, Batches(rows, rows, rows[:, 0]), 2)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert metrics["loss"].shape == (3,)


def test_collapse_is_named():
    healthy = {"class_cross_entropy": 3.0, "patch_cross_entropy": 3.5, "feature_std": 0.9, "masked_share": 0.15}
    assert diagnose_dinov2_collapse(healthy, 100, 200) is None
    assert "log(100)" in diagnose_dinov2_collapse(healthy | {"class_cross_entropy": np.log(100)}, 100, 200)
    patches = diagnose_dinov2_collapse(healthy | {"patch_cross_entropy": np.log(200)}, 100, 200)
    assert patches.startswith("masked patches: collapse: the loss") and "log(200)" in patches
    assert "same way" in diagnose_dinov2_collapse(healthy | {"feature_std": 0.01}, 100, 200)
    unmasked = healthy | {"patch_cross_entropy": np.log(200), "masked_share": 0.0}
    assert diagnose_dinov2_collapse(unmasked, 100, 200) is None
