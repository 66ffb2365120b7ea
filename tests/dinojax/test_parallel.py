"""Meshes: the same numbers on any number of devices, work and memory divided, nothing large exchanged."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from dinojax.errors import UserError
from dinojax.parallel import check_divides, make_mesh, mesh_in_words, on_mesh, parameter_spec, state_shardings
from tests.support import mesh_runs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=3", "mesh data=3 takes 3 devices, which does not divide the 8 that there are"),
        ("data=8,fsdp=2", "takes 16 devices"),
        ("model=8", "'model=8' is not of the form data=4,fsdp=2"),
        ("data=", "is not of the form"),
        ("data=0", "is not of the form"),
        ("data=2,data=4", "names an axis twice"),
    ],
)
def test_a_mesh_that_there_is_not_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        make_mesh(text, jax.devices()[:1] * 8)


def test_a_batch_that_the_devices_cannot_share_is_refused():
    eight = Mesh(np.array(jax.devices()[:1] * 8).reshape(4, 2), ("data", "fsdp"))
    check_divides(eight, 64, parts=4)
    expected = "a batch of 63 images is not divided by the 8 devices of mesh data=4,fsdp=2: take 56 or 64 images"
    with pytest.raises(UserError, match=expected):
        check_divides(eight, 63)
    with pytest.raises(UserError, match=r"a batch of 48 images in 4 parts .* take 32 or 64 images"):
        check_divides(eight, 48, parts=4)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((384, 1536), PartitionSpec(None, "fsdp")),
        ((65536, 256), PartitionSpec("fsdp")),
        ((1, 197, 384), PartitionSpec(None, None, "fsdp")),  # 197 is divided by nothing
        ((65536,), PartitionSpec()),  # vectors are whole
        ((8, 8), PartitionSpec()),
        ((1001, 1003), PartitionSpec()),
    ],
)
def test_the_largest_axis_that_can_be_divided_is(shape, spec):
    assert parameter_spec(shape, 8) == spec
    assert parameter_spec(shape, 1) == PartitionSpec()


@pytest.mark.parametrize("family", ["dino", "dinov2"])
def test_a_mesh_of_one_device_is_the_same_program(family):
    step, state = mesh_runs.step_and_state(family)
    mesh = make_mesh()
    crops = [np.zeros((2, 16, 16, 16, 3), np.float32), np.zeros((4, 16, 8, 8, 3), np.float32)]
    placed = jax.device_put(state, state_shardings(mesh, state))
    alone = jax.jit(step).lower(state, crops, jax.random.key(0)).as_text()
    on_one = jax.jit(on_mesh(step, mesh)).lower(placed, crops, jax.random.key(0)).as_text()
    assert mesh_in_words(mesh) == "data=1"
    # That the state is bound to its device is noted at each argument, and at nothing else.
    bound = re.compile(r" \{sdy\.sharding = #sdy\.sharding<@empty_mesh, [^>]*>\}")
    assert bound.sub("", on_one) == bound.sub("", alone)


def test_each_device_searches_its_share_of_a_bank():
    mesh_runs.run("neighbours")


@pytest.mark.slow  # compiles the sweep three times
def test_each_device_trains_its_share_of_a_sweep():
    mesh_runs.run("sweep")


@pytest.mark.slow  # compiles each step four times
@pytest.mark.parametrize("family", ["dino", "dinov2"])
def test_steps_on_eight_devices_equal_those_on_one(family):
    print(mesh_runs.run(f"{family}_steps"))


@pytest.mark.slow  # compiles four official trainings four times each
def test_official_steps_on_four_devices():
    print(mesh_runs.run("golden"))


@pytest.mark.slow  # compiles augmentation and step eight times
def test_augmented_steps_on_eight_devices_equal_those_on_one():
    print(mesh_runs.run("augmented"))


@pytest.mark.slow  # compiles augmentation and step four times
def test_a_checkpoint_moves_to_another_mesh():
    print(mesh_runs.run("checkpoints"))
