"""Steps of DINOv2 beside a reference file: trajectory, logits, and which parts differ by too much."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from converters import from_torch, head_from_torch
from converters.torch_to_flax import to_torch
from dinojax import ViTConfig
from dinojax.parallel import batch_sharding, make_mesh, on_mesh, state_shardings
from dinojax.pretraining.dinov2_optim import dinov2_optimizer
from dinojax.pretraining.dinov2_step import (
    Centers,
    DINOv2,
    DINOv2Objective,
    _ask_teacher,
    init_dinov2_state,
    make_dinov2_train_step,
)
from dinojax.pretraining.masking import gather_patches, masked_patches
from dinojax.pretraining.schedules import Schedule, cosine_schedule
from dinojax.pretraining.step import TrainState, make_network
from tests.support.reference_files import BUNDLED, Reference, read
from tests.support.training_parity import keeping_gradients

CENTERING, SINKHORN = "dinov2_training_centering", "dinov2_training_sinkhorn"
# Largest absolute differences, of norms relative ones: the reference's own. The key part of `qkv.bias` has a gradient
# that is zero in exact arithmetic, and AdamW turns what rounding leaves of it into steps: it is compared apart.
TOLERANCES = {
    "float32": {"loss": 2e-5, "norm": 2e-5, "logits": 3e-5, "probs": 3e-5, "center": 1e-6, "gradient": 5e-5,
                "student": 1e-5, "teacher": 2e-6, "key_bias": 1e-2},
    "float64": {"loss": 1e-9, "norm": 1e-9, "logits": 1e-7, "probs": 1e-7, "center": 1e-9, "gradient": 3e-7,
                "student": 2e-7, "teacher": 2e-7, "key_bias": 2e-7},
}  # fmt: skip


def network(reference: Reference, group: str, dtype: Any) -> DINOv2:
    """A student or teacher of the file, through the converters, which undo whatever layout its names have."""
    config = reference.config
    state = {name: array.astype(dtype) for name, array in reference.group(group).items()}
    separate = {n.removeprefix("ibot_head."): x for n, x in state.items() if n.startswith("ibot_head.")}
    assert bool(separate) == config["ibot_separate_head"]
    model = DINOv2(
        from_torch(state, config=ViTConfig(**config["vit"])),
        head_from_torch(state, norm_last_layer=False),
        head_from_torch(separate, norm_last_layer=False) if separate else None,
    )
    for head, sizes in ((model.dino_head, config["dino_head"]), (model.ibot_head, config["ibot_head"])):
        if head is not None:
            assert head.last_layer.weight_v.shape == (sizes["n_prototypes"], sizes["bottleneck_dim"])
    return model


def parameters(reference: Reference, group: str, dtype: Any) -> Any:
    return nnx.state(network(reference, group, dtype), nnx.Param)


def official(model: DINOv2, parameters: Any) -> dict[str, np.ndarray]:
    """Parameters, or anything of their structure, under official names and in torch's layout."""
    return to_torch(nnx.merge(nnx.graphdef(model), parameters))


def initial_teacher(reference: Reference) -> str:
    return "state/initial_teacher" if reference.config["teacher_differs"] else "state/initial"


def crops_of_step(reference: Reference, step: int, dtype: Any) -> list[jax.Array]:
    """Global crops and local crops, each "crops batch height width channels"."""
    groups = []
    for kind in ("global", "local"):
        images = reference.arrays.get(f"in/{kind}_crops_int8")
        if images is not None and images.shape[1]:
            crops = images[step].reshape(-1, reference.config["batch"], *images.shape[2:])
            groups.append(jnp.asarray(crops.transpose(0, 1, 3, 4, 2) / 32.0, dtype))
    return groups


def masks_of_step(reference: Reference, step: int) -> jax.Array:
    masks = reference.arrays["in/masks"][step]
    return jnp.asarray(masks.reshape(2, reference.config["batch"], -1))


def most_masked(reference: Reference) -> int:
    """Longer than any step needs."""
    return int(reference.arrays["in/upperbound"].max())


def steps_of(reference: Reference) -> int:
    return len(reference.arrays["out/total_loss_backpropagated"])


def objective_of(config: dict[str, Any]) -> DINOv2Objective:
    names = [field.name for field in dataclasses.fields(DINOv2Objective)]
    return DINOv2Objective(**{name: config[name] for name in names if name in config})


def schedules(config: dict[str, Any]) -> dict[str, Schedule]:
    """From the settings alone."""
    per_epoch, total = config["steps_per_epoch"], config["epochs"] * config["steps_per_epoch"]
    warmup = config["warmup_teacher_temp_epochs"] * per_epoch
    temperature = config["teacher_temp"]
    learning_rate = cosine_schedule(
        config["lr"], config["min_lr"], total, warmup_steps=config["warmup_epochs"] * per_epoch
    )
    return {
        "lr": learning_rate,
        "weight_decay": cosine_schedule(config["weight_decay"], config["weight_decay_end"], total),
        "teacher_momentum": cosine_schedule(config["momentum_teacher"], config["final_momentum_teacher"], total),
        "teacher_temp": cosine_schedule(
            temperature,
            temperature,
            max(total, warmup),
            warmup_steps=warmup,
            start_value=config["warmup_teacher_temp"],
        ),
    }


def optimizer_of(config: dict[str, Any]) -> optax.GradientTransformation:
    values = schedules(config)
    return dinov2_optimizer(
        values["lr"],
        values["weight_decay"],
        clip_norm=config["clip_grad"],
        layer_decay=config["layerwise_decay"],
        patch_embed_factor=config["patch_embed_lr_mult"],
        freeze_last_layer_steps=config["freeze_last_layer_epochs"] * config["steps_per_epoch"],
    )


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """What the steps gave: the states before, between and after them, their metrics and raw gradients."""

    model: DINOv2
    states: list[TrainState]
    metrics: list[dict[str, float]]
    gradients: list[Any]


def start(reference: Reference, model: DINOv2, optimizer: optax.GradientTransformation) -> TrainState:
    dtype = model.backbone.cls_token.dtype
    return init_dinov2_state(model, optimizer)._replace(
        teacher=parameters(reference, initial_teacher(reference), dtype)
    )


def train(reference: Reference, dtype: Any, mesh: Mesh | None = None, **options: Any) -> Trajectory:
    """The steps of a file; on a mesh, the state and the images of a batch are divided among its devices."""
    config, values = reference.config, schedules(reference.config)
    model = network(reference, "state/initial", dtype)
    optimizer = keeping_gradients(optimizer_of(config))
    mesh = mesh or make_mesh("data=1")
    step = make_dinov2_train_step(
        model,
        optimizer,
        teacher_temp=values["teacher_temp"],
        teacher_momentum=values["teacher_momentum"],
        most_masked=most_masked(reference),
        objective=objective_of(config),
        **options,
    )
    step, state = jax.jit(on_mesh(step, mesh)), start(reference, model, optimizer)
    states, metrics, gradients = [jax.device_put(state, state_shardings(mesh, state))], [], []
    for index in range(steps_of(reference)):
        images = crops_of_step(reference, index, dtype), masks_of_step(reference, index)
        state, found = step(states[-1], *jax.device_put(images, batch_sharding(mesh, axis=1)))
        states.append(state)
        metrics.append({name: float(value) for name, value in found.items()})
        gradients.append(state.opt_state[1])
    return Trajectory(model, states, metrics, gradients)


def intermediates(reference: Reference, trajectory: Trajectory, steps: list[int]) -> list[dict[str, np.ndarray]]:
    """Logits and targets of steps, under the reference's names and in its order."""
    most, model = most_masked(reference), trajectory.model
    network = make_network(model, None)

    @jax.jit
    def observe(state: TrainState, crops: list[jax.Array], masks: jax.Array) -> dict[str, jax.Array]:
        student, teacher, masked = network(state.student), network(state.teacher), masked_patches(masks, most)
        temperature = schedules(reference.config)["teacher_temp"](state.step)
        answer, _ = _ask_teacher(
            teacher, crops[0][None], masks[None], state.center, temperature, most, objective_of(reference.config)
        )
        tokens, patches = teacher.tokens(crops[0])
        class_logits, patch_logits = teacher.logits(tokens, gather_patches(patches, masked))
        own, own_patches = student.tokens(crops[0], masks)
        others = [student.tokens(group)[0] for group in crops[1:]]
        own_logits, own_patch_logits = student.logits(
            jnp.concatenate([own, *others]), gather_patches(own_patches, masked)
        )
        return {  # upstream exchanges the teacher's crops before its head
            "dino_teacher_logits": class_logits[::-1],
            "dino_teacher_probs": answer.class_targets[0, ::-1],
            "ibot_teacher_logits": patch_logits,
            "ibot_teacher_probs": answer.patch_targets[0],
            "student_patch_logits": own_patch_logits,
            "student_local_logits": own_logits[2:],
            "student_global_logits": own_logits[:2],
            "class_tokens": own,
        }

    found = []
    for step in steps:
        masks = masks_of_step(reference, step)
        crops = crops_of_step(reference, step, model.backbone.cls_token.dtype)
        arrays = observe(trajectory.states[step], crops, masks)
        flat = {name: np.asarray(x).reshape(-1, x.shape[-1]) for name, x in arrays.items()}
        count = int(masks.sum())
        found.append({name: x[:count] if name in _OF_MASKED_PATCHES else x for name, x in flat.items()})
    return found


_OF_MASKED_PATCHES = ("ibot_teacher_logits", "ibot_teacher_probs", "student_patch_logits")


def logged(config: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """A step's losses as upstream logs them: KoLeo with its weight, and halved as the patch loss is."""
    found = {
        "dino_local_crops_loss": metrics["class_loss_local"],
        "dino_global_crops_loss": metrics["class_loss_global"],
        "koleo_loss": config["koleo_loss_weight"] * metrics["koleo_loss"] / 2,
        "ibot_loss": metrics["patch_loss"] / 2,
    }
    return found | {"total_loss_logged": sum(found.values()), "total_loss_backpropagated": metrics["loss"]}


def differences(reference: Reference, found: Trajectory) -> dict[str, float]:
    """Largest difference of each kind, over all steps."""
    expected = reference.arrays
    result = {"loss": 0.0, "norm": 0.0, "center": 0.0}
    for step, metrics in enumerate(found.metrics):
        for name, value in logged(reference.config, metrics).items():
            result["loss"] = max(result["loss"], abs(value - expected[f"out/{name}"][step]))
        for place, name in enumerate(expected["out/submodule_names"]):
            norm = expected["out/grad_norms_before_clip"][step, place]
            result["norm"] = max(result["norm"], abs(metrics[f"gradient_norm_{name}"] / norm - 1))
    result["center"] = center_difference(reference, [state.center for state in found.states])
    gradient = official(found.model, found.gradients[0])
    raw = reference.group("out/step0_raw_gradient")
    assert raw.keys() == gradient.keys()
    result["gradient"] = max(np.abs(gradient[name] - array).max() for name, array in raw.items())
    for group, state in (("after_2_steps", found.states[2]), ("final", found.states[-1])):
        for kind, difference in state_differences(reference, group, found.model, state).items():
            result[kind] = max(result.get(kind, 0.0), difference)
    for step, arrays in enumerate(intermediates(reference, found, [0, 1])):
        stored = reference.group(f"out/step{step}")
        assert stored.keys() <= arrays.keys()
        for name, array in stored.items():
            kind = name.rpartition("_")[2]
            result[kind] = max(result.get(kind, 0.0), np.abs(arrays[name] - array).max())
    return {name: float(value) for name, value in result.items()}


def center_difference(reference: Reference, centers: list[Centers]) -> float:
    """Of the centers before each step and after the last one; without centering they stay zero."""
    largest = 0.0
    for name, values in (("dino", [c.classes for c in centers]), ("ibot", [c.patches for c in centers])):
        used = reference.arrays.get(f"out/{name}_center_used")
        if used is None:
            assert reference.config["centering"] != "centering" and not np.any(values)
        else:
            pending = reference.arrays[f"out/{name}_center_pending_applied"]
            largest = max(largest, np.abs(np.array(values) - np.concatenate([used, pending[None]])).max())
    return float(largest)


def state_differences(reference: Reference, group: str, model: DINOv2, state: TrainState) -> dict[str, float]:
    """Of student and teacher; the key part of `qkv.bias` apart."""
    result = {"key_bias": 0.0}
    for which in ("student", "teacher"):
        stored = reference.group(f"state/{group}_{which}")
        ours = official(model, getattr(state, which))
        assert ours.keys() == stored.keys()
        result[which] = 0.0
        for name, array in stored.items():
            difference = np.abs(ours[name] - array)
            if name.endswith("attn.qkv.bias"):
                query, key, value = np.split(difference, 3)
                result["key_bias"] = max(result["key_bias"], key.max())
                difference = np.concatenate([query, value])
            result[which] = max(result[which], difference.max())
    return result


def too_large(found: dict[str, float], dtype: str = "float32") -> dict[str, float]:
    return {name: value for name, value in found.items() if not value <= TOLERANCES[dtype][name]}


@functools.cache
def exact(name: str) -> tuple[Reference, Trajectory]:
    """The float64 trajectory of one of the files that come with the tests, computed once."""
    reference = read(name, BUNDLED)
    with jax.enable_x64(True):
        return reference, train(reference, np.float64)
