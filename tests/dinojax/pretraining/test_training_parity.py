"""Six steps of DINO equal the official ones: losses, centers, gradients, final student and teacher."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from converters.torch_to_flax import to_torch
from dinojax.pretraining.step import init_state, make_train_step
from tests.support.reference_files import names, read
from tests.support.training_parity import (
    crops_of_step,
    differences,
    ill_conditioned,
    network,
    schedules,
    too_large,
    train,
)

RUNS = names("dino_v1_training_6_steps*")


@pytest.mark.reference
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", RUNS)
def test_six_steps_equal_the_official_ones(name, dtype, record_difference):
    """In float32 without the few elements whose update is ill-conditioned, by their float64 gradients."""
    reference = read(name)
    left_out = ill_conditioned(name) if dtype == "float32" else None
    with jax.enable_x64(dtype == "float64"):
        found = differences(reference, train(reference, np.dtype(dtype).type), left_out)
    if left_out is not None:
        count, total = (sum(f(mask) for mask in left_out.values()) for f in (np.count_nonzero, np.size))
        record_difference(f"{name} ({count} of {total:,} elements left out)", "elements", count)
        assert 1 <= count <= 8
    for kind, difference in found.items():
        record_difference(f"{name} (official code, {dtype})", kind, difference)
    assert not too_large(found, dtype)


@pytest.mark.reference
@pytest.mark.parametrize("name", RUNS)
def test_schedules_follow_from_the_settings(name):
    reference = read(name)
    with jax.enable_x64(True):
        for kind in ("lr", "weight_decay", "teacher_momentum"):
            stored = reference.arrays[f"schedule/{kind}"]
            found = [float(schedules(reference)[kind](step)) for step in range(len(stored))]
            np.testing.assert_allclose(found, stored, rtol=1e-12, atol=1e-15, err_msg=kind)


@pytest.mark.reference
@pytest.mark.parametrize("name", RUNS)
def test_gradients_of_the_first_step_equal_the_official_ones(name):
    reference = read(name)
    with jax.enable_x64(True):
        model = network(reference, "state/initial", np.float64)
        # An optimizer whose state is the last gradient.
        spy = optax.GradientTransformation(
            lambda params: params, lambda updates, state, params=None: (updates, updates)
        )
        temp, config = schedules(reference)["teacher_temp"], reference.config
        step = make_train_step(
            model,
            spy,
            teacher_temp=temp,
            teacher_momentum=lambda step: 1.0,
            student_temp=config.get("student_temp", 0.1),
        )
        state, _ = jax.jit(step)(init_state(model, spy), crops_of_step(reference, 0, np.float64))
        found = to_torch(nnx.merge(nnx.graphdef(model), state.opt_state))
    for key, array in reference.group("out/step0_raw_gradient").items():
        key = key.removeprefix("module.")
        # What storing the reference in float32 leaves.
        np.testing.assert_allclose(found[key], array, rtol=0, atol=1e-7 * np.abs(array).max() + 1e-12, err_msg=key)
