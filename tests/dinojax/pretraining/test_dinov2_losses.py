"""DINOv2's losses and targets equal the official ones, their gradients the numerical ones; padding changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dinojax.pretraining.dinov2_losses import (
    class_token_losses,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
    updated_patch_center,
)
from dinojax.pretraining.losses import teacher_probs, updated_center
from dinojax.pretraining.masking import gather_patches, masked_patches
from tests.support.reference_files import BUNDLED, names, read

# Of the official Sinkhorn-Knopp only the probabilities are stored all in double: its loss follows a cast to float32.
TOLERANCES = {
    "float32": {"loss": 1e-5, "class_loss": 5e-5, "sinkhorn_loss": 5e-5, "others": 3e-6, "class_others": 1e-5},
    "float64": {"loss": 1e-12, "class_loss": 1e-12, "sinkhorn_loss": 2e-6, "others": 1e-7, "class_others": 1e-7},
}
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


def close(found, expected, atol):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def targets(logits, center, temperature, way, valid=None):
    rows = logits.reshape(-1, logits.shape[-1])
    if way == "softmax_center":
        return teacher_probs(rows, center, temperature)
    return sinkhorn_knopp(rows, temperature, valid)


def all_in_double(arrays, prefix, way, dtype):
    """The stored probabilities that suit the dtype."""
    suffix = "_all_in_double" if way == "sinkhorn_knopp" and dtype == "float64" else ""
    return arrays[f"{prefix}{way}/teacher_probs{suffix}"]


@pytest.mark.reference
@DTYPES
@pytest.mark.parametrize("way", ["softmax_center", "sinkhorn_knopp"])
@pytest.mark.parametrize("name", names("dinov2_dino_loss*"))
def test_class_token_losses_equal_the_official_ones(name, way, dtype):
    reference, tolerance = read(name), TOLERANCES[dtype]
    config, arrays = reference.config, reference.arrays

    def official(student, probs):
        """Upstream sums over all pairs it is given; ours divides, by all pairs with two global crops."""
        divided, _ = class_token_losses(student, jnp.zeros_like(probs), probs, config["student_temp"])
        return divided * (2 * len(student) + 2)

    @jax.jit
    def one_step(student, teacher, center, temperature):
        probs = targets(teacher, center, temperature, way)
        loss, gradient = jax.value_and_grad(official)(student, probs.reshape(teacher.shape))
        return probs, loss, gradient, updated_center(center, teacher, config["center_momentum"])

    with jax.enable_x64(dtype == "float64"):
        center = np.zeros(config["out_dim"], dtype)
        for step, temperature in enumerate(arrays["in/teacher_temp_of_step"]):
            student, teacher = (arrays[f"in/{who}_logits"][step].astype(dtype) for who in ("student", "teacher"))
            probs, loss, gradient, next_center = one_step(student, teacher, jnp.asarray(center), float(temperature))
            close(probs, all_in_double(arrays, "out/", way, dtype)[step], tolerance["class_others"])
            kind = "class_loss" if way == "softmax_center" else "sinkhorn_loss"
            close(loss, arrays[f"out/{way}/loss"][step], tolerance[kind])
            close(gradient, arrays[f"out/{way}/grad_student_logits"][step], max(tolerance["class_others"], 1e-6))
            if way == "softmax_center":
                close(center, arrays["out/softmax_center/center_used"][step].ravel(), tolerance["class_others"])
                center = next_center
        if way == "softmax_center":
            close(center, arrays["out/softmax_center/center_final"].ravel(), tolerance["class_others"])


@pytest.mark.reference
@DTYPES
@pytest.mark.parametrize("way", ["softmax_center", "sinkhorn_knopp"])
@pytest.mark.parametrize("name", names("dinov2_ibot_loss*"))
def test_patch_losses_equal_the_official_ones(name, way, dtype):
    """In arrays five rows longer than needed, which count nowhere."""
    reference, tolerance = read(name), TOLERANCES[dtype]
    config, arrays = reference.config, reference.arrays
    count, images = int(arrays["in/masks"].sum()), len(arrays["in/masks"])

    @jax.jit
    def one_step(masks, student, teacher, center):
        masked = masked_patches(masks, count + 5)
        rows = gather_patches(teacher, masked)
        probs = targets(rows, center, config["teacher_temp"], way, masked.valid)

        def official(student):
            return ibot_loss(gather_patches(student, masked), probs, masked.weight, images, config["student_temp"])

        loss, gradient = jax.value_and_grad(official)(student)
        after = updated_patch_center(center, rows, masked.valid, config["center_momentum"])
        return masked.weight, probs, loss, gradient, after

    with jax.enable_x64(dtype == "float64"):
        student = arrays["in/student_patch_logits"].astype(dtype)
        center = np.zeros(config["out_dim"], dtype)
        for step, teacher in enumerate(arrays["in/teacher_patch_logits"]):
            prefix = f"out/step{step}/"
            found = one_step(arrays["in/masks"], student, teacher.astype(dtype), jnp.asarray(center))
            weight, probs, loss, gradient, next_center = found
            close(weight[:count], arrays["in/masks_weight"], 1e-7)
            close(probs[:count], all_in_double(arrays, prefix, way, dtype), tolerance["others"])
            # The official weights are made in float32.
            expected = arrays[f"{prefix}{way}/loss_forward_masked"]
            close(loss, expected, tolerance["loss"] + 6e-8 * expected if way == "softmax_center" else 1e-5)
            close(gradient, arrays[f"{prefix}{way}/grad_student_patch_logits"], max(tolerance["others"], 1e-6))
            if way == "softmax_center":
                close(center, arrays[f"{prefix}{way}/center_used"].ravel(), tolerance["others"])
                center = next_center
        if way == "softmax_center":
            close(center, arrays["out/center_final"].ravel(), tolerance["others"])
        else:
            assert not probs[count:].any()
            close(loss, arrays["out/padded_buffers/loss_forward_masked"], 1e-5)


@pytest.mark.reference
@DTYPES
@pytest.mark.parametrize("name", names("dinov2_ibot_loss*"))
def test_the_patch_loss_equals_the_official_dense_one(name, dtype):
    reference, tolerance = read(name), TOLERANCES[dtype]
    config, arrays = reference.config, reference.arrays

    @jax.jit
    def dense(masks, student, teacher):
        masked = masked_patches(masks, masks.size)
        center = jnp.zeros(teacher.shape[-1], teacher.dtype)
        probs = teacher_probs(teacher, center, config["teacher_temp"])

        def official(student):
            rows, wanted = gather_patches(student, masked), gather_patches(probs, masked)
            return ibot_loss(rows, wanted, masked.weight, len(student), config["student_temp"])

        return probs, *jax.value_and_grad(official)(student)

    with jax.enable_x64(dtype == "float64"):
        inputs = (arrays["in/student_patch_logits"], arrays["in/teacher_patch_logits"][0])
        probs, loss, gradient = dense(arrays["in/masks"], *(x.astype(dtype) for x in inputs))
    close(probs, arrays["out/dense/teacher_probs_plain_softmax"], tolerance["others"])
    close(loss, arrays["out/dense/loss_forward"], tolerance["loss"])
    close(gradient, arrays["out/dense/grad_student_patch_logits"], tolerance["others"])


def koleo_differences(reference, dtype, loss_of=koleo_loss):
    """Differences of the losses, and of the gradients as a share of their largest number."""
    found = {}
    for key in reference.config["sets"]:
        features = jnp.asarray(reference.arrays[f"in/{key}/student_output"], dtype)
        loss, gradient = jax.jit(jax.value_and_grad(loss_of))(features)
        expected = reference.arrays[f"out/{key}/grad_student_output"]
        found[f"{key} loss"] = abs(float(loss) - float(reference.arrays[f"out/{key}/loss"]))
        found[f"{key} gradient"] = float(np.abs(gradient - expected).max() / np.abs(expected).max())
    return found


@pytest.mark.reference
@DTYPES
@pytest.mark.parametrize("name", names("dinov2_koleo_loss*"))
def test_koleo_equals_the_official_one(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        found = koleo_differences(read(name), dtype)
    assert all(difference <= (1e-5 if dtype == "float32" else 1e-7) for difference in found.values()), found


@pytest.mark.near_miss
def test_a_neighbour_without_a_gradient_shows():
    def detached(features):
        unit = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
        near = jnp.argmax(unit @ unit.T - 3 * jnp.eye(len(unit)), axis=1)
        differences = unit - jax.lax.stop_gradient(unit)[near] + 1e-8
        return -jnp.mean(jnp.log(jnp.linalg.norm(differences, axis=-1) + 1e-8))

    found = koleo_differences(read("dinov2_koleo_loss", BUNDLED), np.float32, detached)
    assert found["a loss"] < 1e-5 < 1e-2 < found["a gradient"]


def test_gradients_are_the_numerical_ones():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))  # noqa: E731
        probs, patch_probs = jax.nn.softmax(5 * draw(2, 3, 7)), jax.nn.softmax(5 * draw(6, 7))
        weights = jnp.asarray([0.5, 0.5, 1, 0.25, 0, 0])
        for objective, arguments in (
            (lambda *logits: sum(class_token_losses(*logits, probs)), (draw(4, 3, 7), draw(2, 3, 7))),
            (lambda logits: class_token_losses(draw(0, 3, 7), logits, probs)[1], (draw(2, 3, 7),)),
            (lambda logits: ibot_loss(logits, patch_probs, weights, 5), (draw(6, 7),)),
            (koleo_loss, (draw(6, 5),)),
        ):
            check_grads(jax.jit(objective), arguments, order=1, modes=["rev"], eps=1e-5)


def test_the_terms_of_class_tokens_add_up_to_the_mean_over_pairs():
    """And without local crops the divisor is 3, where there are two pairs."""
    rng = np.random.default_rng(0)
    student = jnp.asarray(rng.standard_normal((5, 3, 7)), jnp.float32)
    probs = jax.nn.softmax(jnp.asarray(rng.standard_normal((2, 3, 7)), jnp.float32))
    pair = lambda t, s: -(probs[t] * jax.nn.log_softmax(student[s] / 0.1)).sum(-1).mean()  # noqa: E731
    local = sum(pair(t, s) for t in (0, 1) for s in (2, 3, 4))
    found = jax.jit(class_token_losses)(student[2:], student[:2], probs)
    close(jnp.stack(found), jnp.stack([local, pair(0, 1) + pair(1, 0)]) / 8, 1e-5)
    found = jax.jit(class_token_losses)(student[:0], student[:2], probs)
    close(jnp.stack(found), jnp.stack([jnp.zeros([]), (pair(0, 1) + pair(1, 0)) / 3]), 1e-5)


def test_the_teacher_gets_no_gradient():
    rng = np.random.default_rng(0)
    student, logits = (jnp.asarray(rng.standard_normal((2, 3, 5)), jnp.float32) for _ in range(2))

    def loss(logits):
        probs = sinkhorn_knopp(logits.reshape(6, 5), 0.04).reshape(2, 3, 5)
        return sum(class_token_losses(student, student, probs))

    assert not jax.jit(jax.grad(loss))(logits).any()
    assert not jax.jit(jax.grad(lambda probs: sum(class_token_losses(student, student, probs))))(logits).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sinkhorn_is_the_plain_loop_and_padding_changes_nothing(dtype):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((9, 6)), dtype)
    plain = np.exp(np.asarray(logits, np.float64) / 0.3)
    for _ in range(3):
        plain /= plain.sum(axis=0, keepdims=True)
        plain /= plain.sum(axis=1, keepdims=True)
    found = jax.jit(sinkhorn_knopp)(logits, 0.3)
    assert found.dtype == jnp.float32
    close(found, plain, 1e-6)
    close(found.sum(axis=1), np.ones(9), 1e-6)
    rows = np.array([0, 3, 4, 5, 6, 8, 9, 10, 12])
    padded = jnp.full((14, 6), 7.0, dtype).at[rows].set(logits)
    within = jax.jit(sinkhorn_knopp)(padded, 0.3, jnp.zeros(14, bool).at[rows].set(True))
    close(within[rows], found, 1e-6)
    assert not np.delete(within, rows, axis=0).any()


def test_sinkhorn_of_logits_far_apart_or_of_nothing_is_finite():
    """exp(1,000 / 0.04) is no float; a batch without a mask has no row that counts."""
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)) * 1000, jnp.float32)
    probs = sinkhorn_knopp(logits, 0.04)
    assert np.isfinite(probs).all()
    close(probs.sum(axis=1), np.ones(6), 1e-3)
    assert not sinkhorn_knopp(logits, 0.04, jnp.zeros(6, bool)).any()
    with pytest.raises(ValueError, match="iterations=0"):
        sinkhorn_knopp(logits, 0.04, iterations=0)


def test_a_batch_without_a_mask_has_no_patch_loss_and_leaves_the_center():
    masked = masked_patches(jnp.zeros((2, 3, 8), bool), 5)
    tokens = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 8, 4)), jnp.float32)
    center = jnp.asarray([1.0, -2.0, 0.5, 0.0])

    def loss(tokens):
        rows = gather_patches(tokens, masked)
        return ibot_loss(rows, sinkhorn_knopp(rows, 0.05, masked.valid), masked.weight, 6)

    value, gradient = jax.jit(jax.value_and_grad(loss))(tokens)
    assert value == 0 and not gradient.any()
    after = updated_patch_center(center, gather_patches(tokens, masked), masked.valid)
    assert (after == center).all()


def test_koleo_of_equal_or_zero_features_is_finite_and_of_one_image_refused():
    for features in (jnp.ones((3, 4)), jnp.zeros((3, 4))):
        loss, gradient = jax.value_and_grad(koleo_loss)(features)
        assert np.isfinite(loss) and np.isfinite(gradient).all()
    with pytest.raises(ValueError, match="1 image, which has no neighbour"):
        koleo_loss(jnp.ones((1, 4)))


def test_the_gradient_keeps_nothing_of_the_logits_size_in_float32():
    logits, probs = jnp.zeros((10, 8, 512), jnp.bfloat16), jnp.full((2, 8, 512), 1 / 512)
    _, pullback = jax.vjp(lambda x: class_token_losses(x, x[:2], probs)[0], logits)
    large = [x for x in jax.tree.leaves(pullback) if x.size >= logits.size]
    assert [x.dtype for x in large] == [jnp.bfloat16]
