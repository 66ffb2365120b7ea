"""Prototypes in chunks: targets, losses, gradients and steps are those of all prototypes at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dinojax import DINOHead, VisionTransformer, ViTConfig
from dinojax.pretraining.dinov2_chunks import (
    centering_in_chunks,
    class_token_losses_in_chunks,
    ibot_loss_in_chunks,
    sinkhorn_knopp_in_chunks,
    targets_in_chunks,
)
from dinojax.pretraining.dinov2_losses import class_token_losses, ibot_loss, sinkhorn_knopp, updated_patch_center
from dinojax.pretraining.dinov2_optim import dinov2_optimizer
from dinojax.pretraining.dinov2_step import DINOv2, DINOv2Objective, init_dinov2_state, make_dinov2_train_step
from dinojax.pretraining.losses import teacher_probs
from dinojax.pretraining.masking import BlockMasking, block_masks
from tests.support.dinov2_parity import differences, too_large, train
from tests.support.reference_files import names, read

ROWS, PROTOTYPES, DIM, TEMPERATURE = 6, 12, 5, 0.05
WAYS = ["centering", "sinkhorn_knopp"]


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]


def probabilities(rows, prototypes):
    """What the stored divisors stand for."""
    weight = prototypes.weight.reshape(-1, prototypes.weight.shape[-1])
    scores = (rows.embedding @ weight.T - rows.largest[:, None]) / prototypes.temperature
    return jnp.exp(scores - prototypes.of_prototype.reshape(1, -1) - rows.of_row[:, None])


def close(found, expected, atol=1e-13):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=atol)


@pytest.mark.parametrize("chunk", [4, 12])
def test_targets_are_those_of_all_prototypes_at_once(chunk):
    with jax.enable_x64(True):
        embedding, weight, center = arrays((ROWS, DIM), (PROTOTYPES, DIM), PROTOTYPES)
        valid = jnp.arange(ROWS) < 4
        found = {
            "centered": centering_in_chunks(embedding, weight, center, TEMPERATURE, chunk=chunk),
            "balanced": sinkhorn_knopp_in_chunks(embedding, weight, TEMPERATURE, chunk=chunk),
            "padded": sinkhorn_knopp_in_chunks(embedding, weight, TEMPERATURE, valid, chunk=chunk),
        }
        expected = {
            "centered": teacher_probs(embedding @ weight.T, center, TEMPERATURE),
            "balanced": sinkhorn_knopp(embedding @ weight.T, TEMPERATURE),
            "padded": sinkhorn_knopp(embedding @ weight.T, TEMPERATURE, valid),
        }
        for name, (rows, prototypes) in found.items():
            count = 4 if name == "padded" else ROWS
            close(probabilities(rows, prototypes)[:count], expected[name][:count])
            close(rows.entropy[:count], jax.scipy.special.entr(expected[name][:count]).sum(axis=1))


def test_rows_none_of_which_counts_give_finite_targets():
    embedding, weight = arrays((ROWS, DIM), (PROTOTYPES, DIM))
    found = sinkhorn_knopp_in_chunks(embedding, weight, TEMPERATURE, jnp.zeros(ROWS, bool), chunk=4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize("local_crops", [0, 3])
def test_losses_and_their_gradients_are_those_of_all_prototypes_at_once(local_crops):
    """The gradients reach the student's tokens and head, and not the teacher's."""
    sizes = {"hidden_dim": 7, "bottleneck_dim": DIM, "nlayers": 2, "norm_last_layer": False}
    graph, weights = nnx.split(DINOHead(6, PROTOTYPES, **sizes, rngs=nnx.Rngs(0)), nnx.Param)

    def plain(tokens, ours, theirs, teacher, center, share):
        logits = nnx.merge(graph, ours)(tokens)
        targets = teacher_probs(nnx.merge(graph, teacher)(theirs), center, TEMPERATURE)
        losses = class_token_losses(logits[2:], logits[:2], targets)
        return losses[0] + 2 * losses[1] + 3 * ibot_loss(logits[0], targets[1], share, 7), losses

    def in_chunks(tokens, ours, theirs, teacher, center, share):
        head, their_head = nnx.merge(graph, ours), nnx.merge(graph, teacher)
        ways = {"centering": "centering", "center_momentum": 0.9, "chunk": 4}
        everything = jnp.ones(theirs.shape[:-1], bool)
        rows, shared, _ = targets_in_chunks(their_head, theirs, everything, center, TEMPERATURE, **ways)
        losses = class_token_losses_in_chunks(head, tokens, rows, shared)
        one = jax.tree.map(lambda x: x[1], rows)
        return losses[0] + 2 * losses[1] + 3 * ibot_loss_in_chunks(head, tokens[0], one, shared, share, 7), losses

    with jax.enable_x64(True):
        tokens, theirs, center, share = arrays((2 + local_crops, ROWS, 6), (2, ROWS, 6), PROTOTYPES, ROWS)
        ours, teacher = (jax.tree.map(lambda x, k=k: x.astype(float) * k, weights) for k in (1.0, 1.3))
        inputs = (tokens, ours, theirs, teacher, center, share)
        (expected, terms), of_plain = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(*inputs)
        (found, own_terms), of_ours = jax.jit(jax.value_and_grad(in_chunks, range(5), has_aux=True))(*inputs)
        close(found, expected)
        close(own_terms, terms)
        jax.tree.map(close, of_ours[:2], of_plain)
        assert not any(gradient.any() for gradient in jax.tree.leaves(of_ours[2:]))


def test_the_center_of_patches_moves_as_that_of_all_logits():
    with jax.enable_x64(True):
        model = tiny_model(jnp.float64)
        tokens, center = arrays((ROWS, 12), 24)
        for valid in (jnp.arange(ROWS) < 4, jnp.zeros(ROWS, bool)):
            ways = {"centering": "centering", "center_momentum": 0.9, "chunk": 6}
            found = targets_in_chunks(model.dino_head, tokens, valid, center, TEMPERATURE, **ways)[2]
            close(found, updated_patch_center(center, model.dino_head(tokens), valid, 0.9))


def test_a_chunk_that_does_not_divide_the_prototypes_is_refused():
    embedding, weight, center = arrays((ROWS, DIM), (PROTOTYPES, DIM), PROTOTYPES)
    with pytest.raises(ValueError, match="chunk=5 does not divide 12 prototypes"):
        sinkhorn_knopp_in_chunks(embedding, weight, TEMPERATURE, chunk=5)
    with pytest.raises(ValueError, match="chunk=0 does not divide 12 prototypes"):
        centering_in_chunks(embedding, weight, center, TEMPERATURE, chunk=0)


# Steps: two heads of 24 and 15 prototypes, or one of 24.
BATCH, MASKING = 4, BlockMasking(rows=4, columns=4)


def tiny_model(dtype, separate=True):
    rngs = nnx.Rngs(0)
    config = ViTConfig(img_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=2, init_values=1.0)
    heads = [
        DINOHead(12, prototypes, hidden_dim=16, bottleneck_dim=8, nlayers=2, norm_last_layer=False, rngs=rngs)
        for prototypes in (24, 15)
    ]
    model = DINOv2(VisionTransformer(config, rngs=rngs), heads[0], heads[1] if separate else None)
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model, nnx.Param)))
    return model


def make(dtype, separate, parts=1, **options):
    """The first state of a model, its step, and what the step takes."""
    model, rng = tiny_model(dtype, separate), np.random.default_rng(0)
    optimizer = dinov2_optimizer(lambda step: 1e-2, lambda step: 0.04, clip_norm=0.3, freeze_last_layer_steps=1)
    step = make_dinov2_train_step(
        model, optimizer, teacher_temp=lambda step: TEMPERATURE, teacher_momentum=lambda step: 0.9,
        accumulation_steps=parts, most_masked=MASKING.most_masked(2 * BATCH, 2 * BATCH // parts), **options,
    )  # fmt: skip
    shapes = ((2, BATCH, 16, 16, 3), (2, BATCH, 8, 8, 3))
    crops = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    return init_dinov2_state(model, optimizer), step, crops


def after_two_steps(*about, **options):
    state, step, crops = make(*about, **options)
    step, metrics = jax.jit(step, compiler_options={"xla_backend_optimization_level": 0}), []
    for seed in range(2):
        masks = block_masks(jax.random.key(seed), MASKING, 2 * BATCH).reshape(2, BATCH, -1)
        state, found = step(state, crops, masks)
        metrics.append(found)
    return state, metrics


@pytest.mark.slow  # compiles two steps in float64 for each objective
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("centering", WAYS)
def test_steps_and_metrics_are_those_of_all_prototypes_at_once(centering, separate, parts):
    run = functools.partial(
        after_two_steps, jnp.float64, separate, parts, objective=DINOv2Objective(centering, koleo_group=2)
    )
    with jax.enable_x64(True):
        (state, metrics), (expected, expected_metrics) = run(prototype_chunk=3, remat=parts > 1), run()
        jax.tree.map(functools.partial(close, atol=1e-12), state, expected)
        for ours, theirs in zip(metrics, expected_metrics):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                np.testing.assert_allclose(ours[name], value, rtol=1e-11, err_msg=name)


@pytest.mark.slow  # compiles the steps of the reference again, with a loop over chunks
@pytest.mark.reference
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", names("dinov2_training_*"))
def test_all_steps_equal_the_official_ones(name, dtype):
    reference = read(name)
    chunk = np.gcd(*(reference.config[head]["n_prototypes"] for head in ("dino_head", "ibot_head")))
    with jax.enable_x64(dtype == "float64"):
        trajectory = train(reference, np.dtype(dtype).type, prototype_chunk=int(chunk) // 2)
        assert not too_large(differences(reference, trajectory), dtype)


@pytest.mark.parametrize("centering", WAYS)
def test_no_array_holds_the_logits_of_more_than_a_chunk(centering):
    objective = DINOv2Objective(centering, koleo_group=2)
    state, step, crops = make(jnp.float32, True, objective=objective, prototype_chunk=3)
    masks = jax.ShapeDtypeStruct((2, BATCH, 16), bool)
    jaxpr = str(jax.make_jaxpr(lambda *inputs: step(*inputs)[1])(state, crops, masks))
    assert f"f32[4,{BATCH},3]" in jaxpr  # student
    assert f"f32[{2 * BATCH},3]" in jaxpr  # teacher
    rows = (f"4,{BATCH}", f"2,{BATCH}", str(2 * BATCH), str(4 * BATCH), str(MASKING.most_masked(2 * BATCH)))
    assert not [shape for n in rows for k in (24, 15) if (shape := f"f32[{n},{k}]") in jaxpr]
