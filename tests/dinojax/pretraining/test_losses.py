"""The DINO loss, its center and its schedules equal the official ones, and the plain double loop over pairs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.pretraining.losses import dino_loss, dino_loss_in_chunks, teacher_probs, updated_center
from dinojax.pretraining.optim import clip_by_tensor_norm
from dinojax.pretraining.schedules import cosine_schedule, teacher_temp_schedule
from tests.support.reference_files import names, read

TOLERANCES = {"float32": {"loss": 1e-5, "others": 2e-6}, "float64": {"loss": 1e-12, "others": 1e-7}}


@pytest.mark.reference
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", names("dino_v1_loss*"))
def test_losses_gradients_and_centers_equal_the_official_ones(name, dtype):
    reference = read(name)
    arrays, config = reference.arrays, reference.config
    crops, batch = config["ncrops"], config["batch"]
    tolerance = TOLERANCES[dtype]
    with jax.enable_x64(dtype == "float64"):
        temperature = teacher_temp_schedule(
            config["warmup_teacher_temp"],
            config["teacher_temp"],
            warmup_epochs=config["warmup_teacher_temp_epochs"],
            steps_per_epoch=1,
        )
        student_temp, momentum = config.get("student_temp", 0.1), config.get("center_momentum", 0.9)
        center = jnp.zeros(config["out_dim"], dtype)
        for call, epoch in enumerate(arrays["in/epoch_of_call"]):
            student = jnp.asarray(arrays["in/student_logits"][call].reshape(crops, batch, -1), dtype)
            teacher = jnp.asarray(arrays["in/teacher_logits"][call].reshape(2, batch, -1), dtype)
            probs = teacher_probs(teacher, center, temperature(int(epoch)))
            loss, gradient = jax.value_and_grad(dino_loss)(student, probs, student_temp)
            center = updated_center(center, teacher, momentum)
            np.testing.assert_allclose(loss, arrays["out/loss"][call], rtol=0, atol=tolerance["loss"])
            expected = arrays["out/grad_student_logits"][call].reshape(crops, batch, -1)
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=tolerance["others"])
            found = arrays["out/center_after_call"][call].ravel()
            np.testing.assert_allclose(center, found, rtol=0, atol=tolerance["others"])
        found = [float(temperature(epoch)) for epoch in range(config["nepochs"])]
        np.testing.assert_allclose(
            found, arrays["out/teacher_temp_schedule"], rtol=1e-6 if dtype == "float32" else 1e-12
        )


def double_loop(student, probs):
    """The mean over pairs of different crops, pair by pair."""
    terms = [
        -(probs[g] * jax.nn.log_softmax(student[v] / 0.1, axis=-1)).sum(-1).mean()
        for g, v in itertools.product(range(len(probs)), range(len(student)))
        if g != v
    ]
    return sum(terms) / len(terms)


COUNTS = [(2, 2), (2, 7), (1, 3), (3, 5)]


@pytest.mark.parametrize(("global_crops", "crops"), COUNTS)
def test_the_loss_is_the_double_loop_over_pairs(global_crops, crops):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        student = jnp.asarray(rng.standard_normal((crops, 4, 11)))
        probs = jax.nn.softmax(jnp.asarray(10 * rng.standard_normal((global_crops, 4, 11))), axis=-1)
        expected, expected_gradient = jax.value_and_grad(double_loop)(student, probs)
        found, gradient = jax.value_and_grad(dino_loss)(student, probs)
        np.testing.assert_allclose(found, expected, rtol=1e-13)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-14)


# slow: compiles as many losses again; with one chunk, the loop over chunks has a single turn
@pytest.mark.parametrize("chunk", [3, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("global_crops", "crops"), COUNTS)
def test_the_loss_in_chunks_is_the_double_loop_over_pairs(global_crops, crops, chunk):
    def plain(student, weight, teacher, center):
        probs = jax.nn.softmax((teacher @ weight.T - center[None, None]) / 0.05, axis=-1)
        probs = jax.lax.stop_gradient(probs)
        return double_loop(student @ weight.T, probs), -(probs * jnp.log(probs)).sum(-1).mean()

    def in_chunks(student, weight, teacher, center):
        return dino_loss_in_chunks(student, weight, teacher, weight, center, 0.05, chunk=chunk)

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = {"student": (crops, 4, 5), "weight": (12, 5), "teacher": (global_crops, 4, 5), "center": (12,)}
        arrays = [jnp.asarray(0.3 * rng.standard_normal(shape)) for shape in shapes.values()]
        everything = tuple(range(len(arrays)))
        (expected, entropy), expected_gradients = jax.value_and_grad(plain, everything, has_aux=True)(*arrays)
        (found, found_entropy), gradients = jax.value_and_grad(in_chunks, everything, has_aux=True)(*arrays)
        np.testing.assert_allclose(found, expected, rtol=1e-13)
        np.testing.assert_allclose(found_entropy, entropy, rtol=1e-13)
        for name, gradient, other in zip(shapes, gradients, expected_gradients):
            np.testing.assert_allclose(gradient, other, rtol=0, atol=1e-14, err_msg=name)
        assert not gradients[2].any()  # the teacher's


def test_a_chunk_that_does_not_divide_the_prototypes_is_refused():
    x, weight = jnp.zeros((2, 1, 5)), jnp.zeros((12, 5))
    with pytest.raises(ValueError, match="chunk=5 does not divide 12 prototypes"):
        dino_loss_in_chunks(x, weight, x, weight, jnp.zeros(12), 0.05, chunk=5)


def test_the_gradient_keeps_nothing_of_the_logits_size_in_float32():
    """What is kept for the gradient: the bfloat16 logits, the teacher's probabilities, one number a row."""
    logits, probs = jnp.zeros((10, 8, 512), jnp.bfloat16), jnp.full((2, 8, 512), 1 / 512)
    _, pullback = jax.vjp(lambda x: dino_loss(x, probs), logits)
    large = [x for x in jax.tree.leaves(pullback) if x.size >= logits.size]
    assert [x.dtype for x in large] == [jnp.bfloat16]


def test_a_loss_without_a_pair_is_refused():
    with pytest.raises(ValueError, match="make no pair"):
        dino_loss(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 3)))


def test_the_teacher_gets_no_gradient():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5)), jnp.float32)
    gradient = jax.grad(lambda x: dino_loss(logits, teacher_probs(x, jnp.zeros(5), 0.04)))(logits)
    assert not gradient.any()


@pytest.mark.reference
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", names("dino_v1_cosine_schedules*"))
def test_cosine_schedules_equal_the_official_ones(name, dtype):
    reference = read(name)
    with jax.enable_x64(dtype == "float64"):
        for kind, settings in reference.config["settings"].items():
            per_epoch = settings["niter_per_ep"]
            schedule = cosine_schedule(
                settings["base_value"],
                settings["final_value"],
                settings["epochs"] * per_epoch,
                warmup_steps=settings.get("warmup_epochs", 0) * per_epoch,
                start_value=settings.get("start_warmup_value", 0.0),
            )
            expected = reference.arrays[f"out/{kind}"]
            found = jax.vmap(schedule)(jnp.arange(len(expected), dtype=jnp.int32))
            rtol, atol = (1e-6, 1e-9) if dtype == "float32" else (1e-12, 1e-15)
            np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=kind)


@pytest.mark.reference
@pytest.mark.parametrize("name", names("dino_v1_clip_gradients*"))
def test_clipping_equals_the_official_one(name):
    reference = read(name)
    gradients = reference.group("in/grad")
    for clip in reference.config["clips"]:
        expected = reference.group(f"out/clip_{clip:g}/grad")
        found, _ = clip_by_tensor_norm(clip).update(
            jax.tree.map(jnp.asarray, gradients), clip_by_tensor_norm(clip).init({})
        )
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_allclose(found[key], array, rtol=1e-6, atol=1e-7, err_msg=f"{clip} {key}")
