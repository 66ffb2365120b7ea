"""The DINO training step as one pure function: networks on all crops, loss, optimiser, moving averages.

`make_train_step` starts from crops, `make_pretrain_steps` from raw pixels on the device.

Source: facebookresearch/dino 7c446df `main_dino.train_one_epoch`, `utils.MultiCropWrapper`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, Key, PyTree, Shaped, UInt8

from dinojax.accumulation import moving_average, part_size, sum_over_parts
from dinojax.models.chunks import in_chunks
from dinojax.models.files import Network
from dinojax.models.head import DINOHead
from dinojax.models.layers import Module
from dinojax.models.vit import VisionTransformer
from dinojax.parallel import by_rows, divide, divide_parameters, gather, merge, merged_order, unmerge
from dinojax.precision import at_least_float32
from dinojax.pretraining.augment import MultiCropConfig, multi_crop
from dinojax.pretraining.losses import dino_loss, dino_loss_in_chunks, entropy, teacher_probs, updated_center
from dinojax.pretraining.monitors import feature_std, gradient_norms
from dinojax.pretraining.schedules import Schedule

Crops = Float[Array, "_crops batch _height _width channels"]
Metrics = dict[str, Array]


class DINO(Module):
    """A backbone and a head. The backbone takes crops of one size together, the head takes all crops together.

    Args:
        backbone: computes the features of each crop.
        head: computes logits from class tokens.
    """

    def __init__(self, backbone: VisionTransformer, head: DINOHead):
        self.backbone = backbone
        self.head = head

    def __call__(
        self, crops: Sequence[Crops], *, key: Key[Array, ""] | None = None, remat: bool = False
    ) -> Float[Array, "crops batch prototypes"]:
        """Logits of groups of crops, in the given order; the crops of a group have one size."""
        return by_rows(self.head, self.features(crops, key=key, remat=remat))

    def features(
        self, crops: Sequence[Crops], *, key: Key[Array, ""] | None = None, remat: bool = False
    ) -> Float[Array, "crops batch dim"]:
        """The class tokens of groups of crops; without a key and `remat`, as `in_chunks` computes them."""
        keys = [None] * len(crops) if key is None else list(jax.random.split(key, len(crops)))
        tokens = []
        for group, group_key in zip(crops, keys):
            images, axes = merge(group, keep=3), group.shape[:2]
            if key is None and not remat:
                outputs = in_chunks(self.backbone, self.backbone.config, images)
            else:
                outputs = self.backbone(images, key=group_key, drop_order=merged_order(axes), remat=remat)
            tokens.append(unmerge(outputs.cls_token, axes))
        return jnp.concatenate(tokens)


class TrainState(NamedTuple):
    """Everything that changes from step to step, as one pytree; a checkpoint holds exactly this."""

    step: Int[Array, ""]
    student: PyTree
    teacher: PyTree
    opt_state: optax.OptState
    center: PyTree
    """A vector "prototypes"; for DINOv2 a `Centers` of two."""


class BatchStatistics(NamedTuple):
    """Numbers of one batch for the center and the monitors."""

    loss: Float[Array, ""]
    teacher_entropy: Float[Array, ""]
    teacher_logits: Float[Array, " prototypes"]
    """The teacher's raw logits, averaged over crops and images."""
    feature_std: Float[Array, ""]
    """`feature_std` of the teacher's class tokens of the first global crop."""


TrainStep = Callable[..., tuple[TrainState, Metrics]]


def init_state(model: DINO, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the teacher starts as a copy of the student."""
    return new_state(model, optimizer, first_center(model.head))


def new_state(model: Module, optimizer: optax.GradientTransformation, center: PyTree) -> TrainState:
    """The state before the first step of any model, with the given center."""
    student = nnx.state(model, nnx.Param)
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        student=student,
        teacher=jax.tree.map(jnp.copy, student),  # donated states must not hold one buffer twice
        opt_state=optimizer.init(student),
        center=center,
    )


def first_center(head: DINOHead) -> Float[Array, " prototypes"]:
    """The center before the first step: a zero for each prototype of the head."""
    weight = head.last_layer.weight_v
    return jnp.zeros(weight.shape[0], weight.dtype)


def make_train_step(
    model: DINO,
    optimizer: optax.GradientTransformation,
    *,
    teacher_temp: Schedule,
    teacher_momentum: Schedule,
    student_temp: float = 0.1,
    center_momentum: float = 0.9,
    clip_norm: float | None = None,
    compute_dtype: DTypeLike | None = None,
    accumulation_steps: int = 1,
    remat: bool = False,
    prototype_chunk: int | None = None,
) -> TrainStep:
    """Returns `train_step(state, crops, key) -> (state, metrics)`, pure, to be jitted by the caller.

    Args:
        model: gives only the architecture; the parameters are in the state.
        optimizer: see `dinojax.pretraining.optim.dino_optimizer`.
        teacher_temp: step → temperature of the teacher.
        teacher_momentum: step → weight of the old teacher in its moving average.
        student_temp: divides the student's logits.
        center_momentum: weight of the old center in its moving average.
        clip_norm: the optimizer's bound, which the metric clipped_share uses.
        compute_dtype: dtype in which the networks compute, such as bfloat16 on a GPU; parameters, loss and center keep
            theirs.
        accumulation_steps: number of equal parts into which the batch is split. They are computed one after the other,
            and their gradients averaged: the same step with less memory.
        remat: keep only the input of each block, and compute its activations again for the gradient.
        prototype_chunk: number of prototypes whose logits are computed together, see `dino_loss_in_chunks`; None
            computes all at once.

    The step takes groups of crops, the global crops first, and a key for drop path (None leaves it out). Its metrics
    are scalars: loss, teacher_entropy and kl in nats (the loss is the sum of the other two), center_norm, feature_std,
    gradient_norm before clipping, and clipped_share, the share of tensors that are clipped.

    Raises:
        ValueError: when the step is traced, if `accumulation_steps` does not divide the batch, or `prototype_chunk` the
            number of prototypes.
    """
    gradients_of = _make_gradients(
        model,
        teacher_temp=teacher_temp,
        student_temp=student_temp,
        compute_dtype=compute_dtype,
        remat=remat,
        prototype_chunk=prototype_chunk,
    )

    def train_step(
        state: TrainState, crops: Sequence[Crops], key: Key[Array, ""] | None = None
    ) -> tuple[TrainState, Metrics]:
        if accumulation_steps == 1:
            gradients, outcome = gradients_of(state, crops, key)
        else:

            def share_of(part: Sequence[Crops], key: Array | None) -> PyTree:
                return jax.tree.map(lambda x: x / accumulation_steps, gradients_of(state, part, key))

            gradients, outcome = sum_over_parts(share_of, split_batch(crops, accumulation_steps), key)
        center = updated_center(state.center, outcome.teacher_logits[None, None], center_momentum)
        state = updated_state(state, gradients, optimizer, teacher_momentum, center)
        gradient_norm, clipped_share = gradient_norms(gradients, clip_norm)
        metrics = {
            "loss": outcome.loss,
            "teacher_entropy": outcome.teacher_entropy,
            "kl": outcome.loss - outcome.teacher_entropy,
            "center_norm": jnp.linalg.norm(center),
            "feature_std": outcome.feature_std,
            "gradient_norm": gradient_norm,
            "clipped_share": clipped_share,
        }
        return state, metrics

    return train_step


def updated_state(
    state: TrainState,
    gradients: PyTree,
    optimizer: optax.GradientTransformation,
    teacher_momentum: Schedule,
    center: PyTree,
) -> TrainState:
    """The state after a step: the optimizer moves the student, then the teacher follows it."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.student)
    student = optax.apply_updates(state.student, updates)
    teacher = moving_average(student, state.teacher, 1 - teacher_momentum(state.step))
    return divide_parameters(TrainState(state.step + 1, student, teacher, opt_state, center))


def make_network(model: Network, compute_dtype: DTypeLike | None) -> Callable[[PyTree], Network]:
    """Returns `network(parameters)`: the model with these parameters, cast to `compute_dtype` if that is given.

    On a mesh the parameters are gathered after the cast; gradients are summed over the devices in that dtype too.
    """
    graphdef, _ = nnx.split(model, nnx.Param)

    def network(parameters: PyTree) -> Network:
        if compute_dtype is not None:
            parameters = jax.tree.map(lambda x: x.astype(compute_dtype), parameters)
        return nnx.merge(graphdef, gather(parameters))

    return network


def _make_gradients(
    model: DINO,
    *,
    teacher_temp: Schedule,
    student_temp: float,
    compute_dtype: DTypeLike | None,
    remat: bool,
    prototype_chunk: int | None,
) -> Callable[[TrainState, Sequence[Crops], Array | None], tuple[PyTree, BatchStatistics]]:
    """Returns `gradients_of(state, crops, key)`: the gradients of the loss by the student's parameters."""
    network = make_network(model, compute_dtype)

    def gradients_of(state: TrainState, crops: Sequence[Crops], key: Array | None) -> tuple[PyTree, BatchStatistics]:
        teacher = network(state.teacher)
        temperature = jnp.asarray(teacher_temp(state.step), at_least_float32(state.center.dtype))
        features = teacher.features(crops[:1])

        def whole(student: PyTree) -> tuple[Array, tuple[Array, Array]]:
            logits = by_rows(teacher.head, features)
            targets = teacher_probs(logits, state.center, temperature)
            loss = dino_loss(network(student)(crops, key=key, remat=remat), targets, student_temp)
            return loss, (entropy(targets), jnp.mean(logits, axis=(0, 1), dtype=state.center.dtype))

        def in_chunks(student: PyTree) -> tuple[Array, tuple[Array, Array]]:
            net = network(student)
            ours = by_rows(net.head.embed, net.features(crops, key=key, remat=remat))
            theirs = by_rows(teacher.head.embed, features)
            prototypes, their_prototypes = net.head.last_layer.weight(), teacher.head.last_layer.weight()
            temperatures = (temperature, student_temp)
            loss, entropy = dino_loss_in_chunks(
                ours,
                prototypes,
                theirs,
                their_prototypes,
                state.center,
                *temperatures,
                chunk=prototype_chunk or len(prototypes),
            )
            mean = jnp.mean(theirs, axis=(0, 1), dtype=state.center.dtype)
            return loss, (entropy, their_prototypes.astype(mean.dtype) @ mean)

        loss_of = whole if prototype_chunk is None else in_chunks
        (loss, (teacher_entropy, logits)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.student)
        return gradients, BatchStatistics(loss, teacher_entropy, logits, feature_std(features[0]))

    return gradients_of


def split_batch(crops: Sequence[Shaped[Array, "_crops batch *_rest"]], parts: int) -> list[Array]:
    """Each array as "parts crops images …"; the images of a part are neighbours in the batch."""
    images = part_size(crops[0].shape[1], parts)
    return [divide(jnp.moveaxis(x.reshape(len(x), parts, images, *x.shape[2:]), 1, 0), axis=2) for x in crops]


class Batches(NamedTuple):
    """The images of the next steps."""

    rows: Int[Array, "steps batch"]
    """Their rows in the given images."""
    ids: Int[Array, "steps batch"]
    """Their numbers in the whole data set, so that the views of an image do not depend on its row."""
    epochs: Int[Array, " steps"]
    """The epoch of each step; an image gets new views in every epoch."""


def make_pretrain_steps(
    train_step: TrainStep, crops: MultiCropConfig, key: Key[Array, ""], *, drop_path: bool
) -> Callable[[TrainState, UInt8[Array, "images height width 3"], Batches, Int[Array, ""] | int], tuple]:
    """Returns `steps(state, images, batches, count) -> (state, metrics)`: `count` times augmentation and training step.

    Args:
        train_step: from `make_train_step`.
        crops: see `multi_crop`.
        key: the key of the whole run; a step draws from it, the epoch and the step number only.
        drop_path: whether the student drops paths.

    `batches` may hold more than `count` steps; the metrics of the others are zero. This way one compiled program also
    serves the last, shorter part of an epoch.
    """
    crop_key, drop_key = jax.random.split(key)

    def one(state: TrainState, images: Array, batch: Batches) -> tuple[TrainState, Metrics]:
        chosen = divide(images[batch.rows])
        views = multi_crop(jax.random.fold_in(crop_key, batch.epochs), chosen, crops, batch.ids)
        groups = [divide(group, axis=1) for group in (views if crops.local_crops else views[:1])]
        return train_step(state, groups, jax.random.fold_in(drop_key, state.step) if drop_path else None)

    def steps(
        state: TrainState, images: Array, batches: Batches, count: Int[Array, ""] | int
    ) -> tuple[TrainState, Metrics]:
        most = len(batches.epochs)
        if most == 1:  # a loop over one step would only keep XLA from fusing across its border
            state, metrics = one(state, images, jax.tree.map(lambda x: x[0], batches))
            return state, jax.tree.map(lambda x: x[None], metrics)

        def body(index: Array, carried: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, metrics = carried
            state, new = one(state, images, jax.tree.map(lambda x: x[index], batches))
            return state, jax.tree.map(lambda all_, value: all_.at[index].set(value), metrics, new)

        shapes = jax.eval_shape(one, state, images, jax.tree.map(lambda x: x[0], batches))[1]
        metrics = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, metrics))

    return steps
