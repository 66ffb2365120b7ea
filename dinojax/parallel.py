"""Meshes of devices: how a batch and a training state are spread over them, and what a step needs to stay spread.

A mesh has two axes, and each image of a batch belongs to one device of the whole mesh. "data" only divides the batch:
each of its devices has all parameters. "fsdp" divides parameters, optimiser state and prototypes too; they are gathered
where they are used.

A function that `on_mesh` wraps is compiled for a mesh. In it, the functions below that take arrays move them or fix
where they are; anywhere else, so also on a mesh of one device, they leave arrays as they are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Int, PyTree, Shaped

from dinojax.errors import UserError

DATA, FSDP = "data", "fsdp"
AXES = (DATA, FSDP)
_SMALL = 1024  # tensors of fewer numbers are not worth gathering

Function = TypeVar("Function", bound=Callable[..., Any])


def make_mesh(text: str | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes "data" and "fsdp".

    Args:
        text: sizes of the axes, such as "data=4,fsdp=2" or "fsdp=8"; an axis that is left out has size 1. A mesh may
            take fewer devices than there are, if it divides their number and there is one process. None takes all
            devices for "data".
        devices: those to be used; None takes all of all processes.

    Raises:
        UserError: a text that names no mesh, or a mesh that does not divide the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {DATA: len(devices), FSDP: 1} if text is None else _sizes(text)
    wanted, there = math.prod(sizes.values()), len(devices)
    whole = wanted == there if jax.process_count() > 1 else there % wanted == 0
    if not whole:
        raise UserError(f"mesh {text} takes {wanted} devices, which does not divide the {there} that there are: {_way}")
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, AXES, (AxisType.Auto, AxisType.Auto), devices=devices[:wanted])


_way = "give sizes whose product is their number, such as data=4,fsdp=2 for eight"


def _sizes(text: str) -> dict[str, int]:
    sizes = {DATA: 1, FSDP: 1}
    named = [part.strip().partition("=") for part in text.split(",")]
    for name, _, size in named:
        if name not in sizes or not size.isdecimal() or int(size) < 1:
            raise UserError(f"mesh {text!r} is not of the form data=4,fsdp=2, with whole numbers from 1")
        sizes[name] = int(size)
    if len({name for name, _, _ in named}) < len(named):
        raise UserError(f"mesh {text!r} names an axis twice; write it once, as in data=4,fsdp=2")
    return sizes


def mesh_in_words(mesh: Mesh) -> str:
    """Its sizes, as `make_mesh` takes them."""
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or f"{DATA}=1"


def check_divides(mesh: Mesh, batch: int, parts: int = 1) -> None:
    """Raises a `UserError` unless each device gets as many images of each of the equal `parts` of a batch."""
    if batch % (mesh.size * parts):
        step = mesh.size * parts
        near = [size for size in (batch // step * step, -(-batch // step) * step) if size]
        of_parts = f" in {parts} parts" if parts > 1 else ""
        raise UserError(
            f"a batch of {batch} images{of_parts} is not divided by the {mesh.size} devices of mesh "
            f"{mesh_in_words(mesh)}: take {' or '.join(map(str, near))} images, or another mesh"
        )


def replicated(mesh: Mesh) -> NamedSharding | SingleDeviceSharding:
    """Where arrays are that every device has as a whole."""
    return _sharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding | SingleDeviceSharding:
    """Where an array is whose `axis` is divided among all devices."""
    return _sharding(mesh, PartitionSpec(*[None] * axis, AXES))


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """Where the leaves of a training state are, given their shapes: large tensors are divided over "fsdp"."""
    return jax.tree.map(lambda leaf: _sharding(mesh, parameter_spec(leaf.shape, mesh.shape[FSDP])), state)


def abstract_on(mesh: Mesh, state: PyTree) -> PyTree:
    """The state as `jax.ShapeDtypeStruct`s with their shardings: what a checkpoint is restored to."""
    places = state_shardings(mesh, state)
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, places)


def parameter_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Which axis of a parameter is divided over `fsdp` devices: the largest whose length allows it.

    Vectors, and tensors of fewer than 1,024 numbers, are not divided.
    """
    possible = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
    if fsdp == 1 or len(shape) < 2 or math.prod(shape) < _SMALL or not possible:
        return PartitionSpec()
    largest = max(possible, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * largest, FSDP)


def _sharding(mesh: Mesh, spec: PartitionSpec) -> NamedSharding | SingleDeviceSharding:
    # One device is named as without a mesh, so that the compiled program is the same.
    return SingleDeviceSharding(mesh.devices.item()) if mesh.size == 1 else NamedSharding(mesh, spec)


def on_mesh(function: Function, mesh: Mesh) -> Function:
    """The function, to be compiled for a mesh; for a mesh of one device, the function itself."""
    if mesh.size == 1:
        return function

    def traced(*args: Any, **options: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **options)

    return traced  # type: ignore[return-value]


def by_share(function: Function, mesh: Mesh, divided: Sequence[bool]) -> Function:
    """The function, called by each device with its share of some arguments.

    Args:
        function: each device must find the same result, so it joins what the shares give by `joined`.
        mesh: of more than one device.
        divided: for each argument, whether its first axis is divided; the others are whole on each device.
    """
    places = tuple(PartitionSpec(AXES) if one else PartitionSpec() for one in divided)
    return jax.shard_map(function, mesh=mesh, in_specs=places, out_specs=PartitionSpec(), check_vma=False)


def share_number() -> Int[Array, ""]:
    """Inside `by_share`, which share this device has, from 0."""
    return jax.lax.axis_index(AXES)


def joined(x: Shaped[Array, "*shape"], axis: int) -> Shaped[Array, "*_shape"]:
    """Inside `by_share`, the arrays of all devices, one after the other along `axis`."""
    return jax.lax.all_gather(x, AXES, axis=axis, tiled=True)


def device_count() -> int:
    """Number of devices of the mesh that a function is compiled for; 1 without a mesh."""
    return math.prod(_here().values())


def divide(x: Shaped[Array, "*shape"], axis: int = 0) -> Shaped[Array, "*shape"]:
    """The same array, divided along `axis` among all devices; left as it is where they cannot have equal shares."""
    return _constrained(x, PartitionSpec(*[None] * axis, AXES)) if x.shape[axis] % device_count() == 0 else x


def gather(tree: PyTree) -> PyTree:
    """The same arrays, whole on every device; gradients by them are divided again, as parameters are."""
    return jax.tree.map(_gather, tree) if _here() else tree


def replicate(tree: PyTree) -> PyTree:
    """The same arrays, whole on every device; for what has no gradient, or a small one."""
    return jax.tree.map(lambda x: _constrained(x, PartitionSpec()), tree)


def divide_parameters(tree: PyTree) -> PyTree:
    """The same training state, or part of one, with its leaves where `state_shardings` says."""
    return jax.tree.map(_divided, tree)


def merge(x: Shaped[Array, "*shape"], keep: int) -> Shaped[Array, "_rows *_rest"]:
    """All axes but the last `keep` as one, whose rows are divided among the devices.

    The last of the merged axes is that of the images. Alone, a device merges in order. On a mesh images come first:
    after another axis, those of one device would not be neighbours, and all would be moved to all devices.
    """
    merged = x.ndim - keep
    if _here() and merged > 1:
        x = jnp.moveaxis(x, merged - 1, 0)
    return divide(x.reshape(-1, *x.shape[merged:]))


def unmerge(rows: Shaped[Array, "_rows *_rest"], axes: tuple[int, ...]) -> Shaped[Array, "*_shape"]:
    """The inverse of `merge`; `axes` are the lengths of the axes that were merged."""
    if not _here() or len(axes) == 1:
        return rows.reshape(*axes, *rows.shape[1:])
    *others, images = axes
    return jnp.moveaxis(rows.reshape(images, *others, *rows.shape[1:]), 0, len(others))


def merged_order(axes: tuple[int, ...]) -> Int[np.ndarray, " rows"] | None:
    """The place of each row of `merge` among those that a device alone merges; None where it is the same."""
    if not _here():
        return None
    return np.moveaxis(np.arange(math.prod(axes)).reshape(axes), -1, 0).ravel()


def by_rows(function: Callable[[Array], Array], x: Shaped[Array, "*rows width"]) -> Shaped[Array, "*rows _width"]:
    """`function(x)`, where `function` treats each row on its own and the axis before the last is that of the images."""
    return unmerge(function(merge(x, keep=1)), x.shape[:-1]) if _here() else function(x)


def norm(x: Shaped[Array, "*shape"]) -> Shaped[Array, ""]:
    """The root of the sum of all squares; a tensor that is divided along any axis stays divided."""
    return jnp.linalg.norm(x if _here() else x.ravel())


def rounded_up(rows: int) -> int:
    """The least number of rows that can be divided equally among the devices."""
    return -(-rows // device_count()) * device_count()


def _here() -> dict[str, int]:
    return dict(jax.sharding.get_abstract_mesh().shape)


def _constrained(x: Array, spec: PartitionSpec) -> Array:
    return jax.lax.with_sharding_constraint(x, spec) if _here() else x


def _divided(x: Array) -> Array:
    here = _here()
    return _constrained(x, parameter_spec(x.shape, here[FSDP])) if here else x


@jax.custom_vjp
def _gather(x: Array) -> Array:
    return _constrained(x, PartitionSpec())


_gather.defvjp(lambda x: (_gather(x), None), lambda _, cotangent: (_divided(cotangent),))
