"""Commands on eight simulated devices give what they give on one."""

import pytest

from tests.support import mesh_runs

MODULE = "tests.support.mesh_commands"


@pytest.mark.slow  # compiles six trainings
@pytest.mark.parametrize("method", ["dino", "dinov2"])
def test_a_pretraining_on_a_mesh_is_that_of_one_device(method):
    print(mesh_runs.run(method, MODULE))


@pytest.mark.slow  # starts JAX in a process of its own, and compiles a model twice
def test_features_of_a_divided_batch_are_those_of_one_device():
    mesh_runs.run("features", MODULE)
