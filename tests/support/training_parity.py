"""Six steps of DINO beside a reference file: the trajectory, and which parts differ by too much."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters import from_torch, head_from_torch
from converters.torch_to_flax import to_torch
from dinojax import ViTConfig
from dinojax.pretraining.optim import dino_optimizer
from dinojax.pretraining.schedules import cosine_schedule, teacher_temp_schedule
from dinojax.pretraining.step import DINO, init_state, make_train_step
from tests.support.reference_files import Reference

PLAIN, CLIPPING = "dino_v1_training_6_steps", "dino_v1_training_6_steps_clipping"


# Largest absolute differences; the float32 ones are the reference's own. The gradient of the key part of `qkv.bias` is
# zero in exact arithmetic, and AdamW turns what rounding leaves of it into real steps: it is compared apart.
TOLERANCES = {
    "float32": {"loss": 2e-5, "center": 1e-6, "student": 1e-5, "teacher": 2e-6, "key_bias": 1e-2},
    "float64": {"loss": 1e-12, "center": 1e-7, "student": 1e-7, "teacher": 1e-7, "key_bias": 1e-7},
}


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """What six steps gave."""

    losses: list[float]
    centers: list[np.ndarray]
    student: dict[str, np.ndarray]
    teacher: dict[str, np.ndarray]


def network(reference: Reference, group: str, dtype: type) -> DINO:
    """A student or teacher of the file, through the converters, which undo whatever layout its names have."""
    settings = reference.config
    vit, head = dict(settings["vit"]), settings["head"]
    vit["img_size"] = vit["img_size"][0]
    assert not head["use_bn"]
    state = {name: array.astype(dtype) for name, array in reference.group(group).items()}
    model = DINO(
        from_torch(state, config=ViTConfig(**vit)),
        head_from_torch(state, norm_last_layer=settings["norm_last_layer"]),
    )
    assert model.head.last_layer.weight_v.shape == (head["out_dim"], head["bottleneck_dim"])
    return model


def crops_of_step(reference: Reference, step: int, dtype: type) -> list[jax.Array]:
    """Global crops and local crops, each "crops batch height width channels"."""
    groups = []
    for kind in ("global", "local"):
        found = sorted(name for name in reference.arrays if name.startswith(f"in/{kind}_crop_"))
        if found:
            stack = np.stack([reference.arrays[name][step] for name in found])
            groups.append(jnp.asarray(stack.transpose(0, 1, 3, 4, 2) / 32.0, dtype))
    return groups


def schedules(reference: Reference) -> dict:
    """From the settings alone; `train` compares them with the stored ones."""
    config = reference.config
    per_epoch, epochs = config["steps_per_epoch"], config["epochs"]
    total = per_epoch * epochs
    return {
        "lr": cosine_schedule(
            config["lr"] * config["batch"] / 256,
            config["min_lr"],
            total,
            warmup_steps=config["warmup_epochs"] * per_epoch,
        ),
        "weight_decay": cosine_schedule(config["weight_decay"], config["weight_decay_end"], total),
        "teacher_momentum": cosine_schedule(config["momentum_teacher"], 1.0, total),
        "teacher_temp": teacher_temp_schedule(
            config["warmup_teacher_temp"],
            config["teacher_temp"],
            warmup_epochs=config["warmup_teacher_temp_epochs"],
            steps_per_epoch=per_epoch,
        ),
    }


def train(reference: Reference, dtype: type) -> Trajectory:
    config, values = reference.config, schedules(reference)
    model = network(reference, "state/initial", dtype)
    optimizer = dino_optimizer(
        values["lr"],
        values["weight_decay"],
        clip_norm=config["clip_grad"],
        freeze_last_layer_steps=config["freeze_last_layer"] * config["steps_per_epoch"],
        frozen=("weight_g",) if config["norm_last_layer"] else (),
    )
    step = jax.jit(
        make_train_step(
            model,
            optimizer,
            teacher_temp=values["teacher_temp"],
            teacher_momentum=values["teacher_momentum"],
            student_temp=config.get("student_temp", 0.1),
            center_momentum=config.get("center_momentum", 0.9),
        )
    )
    state = init_state(model, optimizer)
    losses, centers = [], []
    for index in range(len(reference.arrays["out/loss"])):
        state, metrics = step(state, crops_of_step(reference, index, dtype))
        losses.append(float(metrics["loss"]))
        centers.append(np.asarray(state.center))
    student, teacher = (to_torch(nnx.merge(nnx.graphdef(model), part)) for part in (state.student, state.teacher))
    return Trajectory(losses, centers, student, teacher)


def differences(reference: Reference, found: Trajectory) -> dict[str, float]:
    """Largest absolute difference of each kind."""
    expected = reference.arrays
    result = {
        "loss": np.abs(np.array(found.losses) - expected["out/loss"]).max(),
        "center": max(np.abs(a - b.ravel()).max() for a, b in zip(found.centers, expected["out/center_after_step"])),
        "key_bias": 0.0,
    }
    for which in ("student", "teacher"):
        state = to_torch(network(reference, f"state/final_{which}", np.float64))
        ours = getattr(found, which)
        assert ours.keys() == state.keys()
        result[which] = 0.0
        for name, array in state.items():
            difference = np.abs(ours[name] - array)
            if name.endswith("attn.qkv.bias"):
                query, key, value = np.split(difference, 3)
                result["key_bias"] = max(result["key_bias"], key.max())
                difference = np.concatenate([query, value])
            result[which] = max(result[which], difference.max())
    return {name: float(value) for name, value in result.items()}


def too_large(found: dict[str, float], dtype: str = "float32") -> dict[str, float]:
    return {name: value for name, value in found.items() if not value <= TOLERANCES[dtype][name]}
