"""Steps of DINOv2 equal the official ones: losses, norms, logits, targets, centers, gradient, student and teacher."""

import jax
import numpy as np
import pytest

from dinojax.pretraining.dinov2_optim import is_last_layer, learning_rate_factors, weight_decay_factors
from tests.support.dinov2_parity import (
    differences,
    network,
    official,
    parameters,
    schedules,
    too_large,
    train,
)
from tests.support.reference_files import names, read

RUNS = names("dinov2_training_*")


@pytest.mark.reference
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", RUNS)
def test_all_steps_equal_the_official_ones(name, dtype, record_difference):
    reference = read(name)
    with jax.enable_x64(dtype == "float64"):
        found = differences(reference, train(reference, np.dtype(dtype).type))
    for kind, difference in found.items():
        record_difference(f"{name} (official code, {dtype})", kind, difference)
    assert not too_large(found, dtype)


@pytest.mark.reference
@pytest.mark.parametrize("name", RUNS)
def test_schedules_follow_from_the_settings(name):
    reference = read(name)
    config = reference.config
    frozen = config["freeze_last_layer_epochs"] * config["steps_per_epoch"]
    with jax.enable_x64(True):
        for kind, schedule in schedules(config).items():
            stored = reference.arrays[f"schedule/{kind}"]
            found = np.array(jax.vmap(schedule)(np.arange(len(stored))))
            np.testing.assert_allclose(found, stored, rtol=1e-12, atol=1e-15, err_msg=kind)
            if kind == "lr":
                found[:frozen] = 0
                np.testing.assert_allclose(found, reference.arrays["schedule/last_layer_lr"], rtol=1e-12, atol=1e-15)


@pytest.mark.reference
@pytest.mark.parametrize("name", RUNS)
def test_factors_of_each_parameter_are_the_official_ones(name):
    reference = read(name)
    config, arrays = reference.config, reference.arrays
    model, params = network(reference, "state/initial", np.float32), parameters(reference, "state/initial", np.float32)
    rates = learning_rate_factors(
        params, layer_decay=config["layerwise_decay"], patch_embed_factor=config["patch_embed_lr_mult"]
    )
    trees = {
        "lr_multiplier": rates,
        "wd_multiplier": weight_decay_factors(params),
        "is_last_layer": is_last_layer(params),
    }
    for kind, tree in trees.items():
        spread = jax.tree.map(lambda param, factor: np.full(param.shape, factor, np.float64), params, tree)
        found = official(model, spread)
        assert found.keys() == set(arrays["out/parameter_names"])
        for parameter, factor in zip(arrays["out/parameter_names"], arrays[f"out/{kind}"]):
            np.testing.assert_allclose(found[parameter], factor, rtol=1e-12, err_msg=f"{kind} of {parameter}")
