"""The DINOv2 training step as one pure function: class tokens, masked patches and KoLeo, optimiser, moving averages.

Source: facebookresearch/dinov2 b8931f7 `dinov2/train/ssl_meta_arch.py` and `dinov2/train/train.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, DTypeLike, Float, Key, PyTree

from dinojax.accumulation import sum_over_parts
from dinojax.errors import require
from dinojax.models.chunks import in_chunks
from dinojax.models.head import DINOHead
from dinojax.models.layers import Module
from dinojax.models.vit import VisionTransformer
from dinojax.parallel import by_rows, device_count, merge, merged_order, rounded_up, unmerge
from dinojax.precision import at_least_float32
from dinojax.pretraining.dinov2_chunks import (
    PrototypeTargets,
    RowTargets,
    class_token_losses_in_chunks,
    ibot_loss_in_chunks,
    targets_in_chunks,
)
from dinojax.pretraining.dinov2_losses import (
    class_token_losses,
    ibot_loss,
    koleo_loss_in_groups,
    sinkhorn_knopp,
    updated_patch_center,
)
from dinojax.pretraining.dinov2_optim import submodule_norms
from dinojax.pretraining.losses import teacher_probs, updated_center
from dinojax.pretraining.masking import BlockMasking, MaskedPatches, block_masks, gather_patches, masked_patches
from dinojax.pretraining.monitors import feature_std
from dinojax.pretraining.schedules import Schedule
from dinojax.pretraining.step import (
    Crops,
    Metrics,
    TrainState,
    TrainStep,
    first_center,
    make_network,
    new_state,
    split_batch,
    updated_state,
)

Masks = Bool[Array, "_crops batch _patches"]
Prototypes = tuple[PrototypeTargets, PrototypeTargets]  # of class tokens and of masked patches


class DINOv2(Module):
    """A backbone, a head for class tokens, and a head for masked patches.

    Args:
        backbone: of the family "dinov2", which has a mask token.
        dino_head: computes logits from class tokens.
        ibot_head: computes logits from patch tokens; None shares `dino_head`.
    """

    def __init__(self, backbone: VisionTransformer, dino_head: DINOHead, ibot_head: DINOHead | None = None):
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head

    def tokens(
        self, crops: Crops, masks: Masks | None = None, *, key: Key[Array, ""] | None = None, remat: bool = False
    ) -> tuple[Float[Array, "crops batch dim"], Float[Array, "crops batch patches dim"]]:
        """Class tokens and patch tokens of crops of one size; the key draws drop path by subsets of the crops."""
        axes, order = crops.shape[:2], merged_order(crops.shape[:2])
        images, flat_masks = merge(crops, keep=3), None if masks is None else merge(masks, keep=1)

        def of_images(images: Array, masks: Array | None) -> tuple[Array, Array]:
            features = self.backbone(images, masks, key=key, drop_subsets=True, drop_order=order, remat=remat)
            return features.cls_token, features.patch_tokens

        if key is None and not remat:
            cls_token, patches = in_chunks(of_images, self.backbone.config, images, flat_masks)
        else:
            cls_token, patches = of_images(images, flat_masks)
        return unmerge(cls_token, axes), unmerge(patches, axes)

    def logits(
        self, class_tokens: Float[Array, "*rows dim"], patch_tokens: Float[Array, "*masked dim"]
    ) -> tuple[Float[Array, "*rows prototypes"], Float[Array, "*masked patch_prototypes"]]:
        """Logits of class tokens and of patch tokens; a shared head takes all together."""
        if self.ibot_head is not None or device_count() > 1:  # on a mesh, together they would have to move
            head, patch_head = self.heads
            return by_rows(head, class_tokens), by_rows(patch_head, patch_tokens)
        flat = [x.reshape(-1, x.shape[-1]) for x in (class_tokens, patch_tokens)]
        of_classes, of_patches = jnp.split(self.dino_head(jnp.concatenate(flat)), [len(flat[0])])
        return of_classes.reshape(*class_tokens.shape[:-1], -1), of_patches.reshape(*patch_tokens.shape[:-1], -1)

    @property
    def heads(self) -> tuple[DINOHead, DINOHead]:
        """The head of class tokens and that of masked patches, which may be the same."""
        return self.dino_head, self.dino_head if self.ibot_head is None else self.ibot_head


@dataclasses.dataclass(frozen=True)
class DINOv2Objective:
    """What is minimised: the losses of class tokens and of masked patches, and KoLeo, each with its weight.

    Attributes:
        centering: how the teacher's logits become probabilities, "centering" or "sinkhorn_knopp".
        dino_loss_weight: weight of the cross-entropies of class tokens.
        koleo_loss_weight: weight of KoLeo, which is summed over the two global crops.
        ibot_loss_weight: weight of the cross-entropies of masked patches.
        koleo_group: number of images among which KoLeo looks for neighbours, such as the images of one GPU upstream; it
            divides the images of a part. None takes the whole part.
        student_temp: divides the student's logits.
        center_momentum: weight of the old centers in their moving averages.

    Raises:
        UserError: an unknown `centering`, or a group of fewer than two images.
    """

    centering: str = "centering"
    dino_loss_weight: float = 1.0
    koleo_loss_weight: float = 0.1
    ibot_loss_weight: float = 1.0
    koleo_group: int | None = None
    student_temp: float = 0.1
    center_momentum: float = 0.9

    def __post_init__(self):
        ways = ("centering", "sinkhorn_knopp")
        require(self.centering in ways, "centering", self.centering, "'centering' or 'sinkhorn_knopp'")
        enough = self.koleo_group is None or self.koleo_group >= 2
        require(enough, "koleo_group", self.koleo_group, "two images or more, of which one is another's neighbour")


class Centers(NamedTuple):
    """The centers of the teacher's logits, which also a shared head has two of."""

    classes: Float[Array, " prototypes"]
    patches: Float[Array, " patch_prototypes"]


class Teacher(NamedTuple):
    """What the teacher says about a batch; every array may have an axis "parts" in front."""

    class_tokens: Float[Array, "2 batch dim"]
    class_targets: PyTree
    """An array "2 batch prototypes"; `RowTargets` where prototypes are computed in chunks."""
    patch_targets: PyTree
    """An array "masked prototypes"; `RowTargets` where prototypes are computed in chunks."""
    masked: MaskedPatches


def init_dinov2_state(model: DINOv2, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the teacher starts as a copy of the student."""
    return new_state(model, optimizer, Centers(*(first_center(head) for head in model.heads)))


def make_dinov2_train_step(
    model: DINOv2,
    optimizer: optax.GradientTransformation,
    *,
    teacher_temp: Schedule,
    teacher_momentum: Schedule,
    most_masked: int,
    objective: DINOv2Objective = DINOv2Objective(),
    compute_dtype: DTypeLike | None = None,
    accumulation_steps: int = 1,
    remat: bool = False,
    prototype_chunk: int | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `train_step(state, crops, masks, key) -> (state, metrics)`, pure, to be jitted by the caller.

    The step takes the two global crops "2 batch height width channels" and, if there are any, the local crops; the
    masks "2 batch patches" of the global crops, which only the student sees masked; and a key for drop path by subsets
    (None leaves it out).

    With `accumulation_steps` the teacher's targets, and so Sinkhorn-Knopp and the centers, are still those of the whole
    batch; the student's gradients are averaged over parts of neighbouring images. This is the same step with less
    memory, except that KoLeo looks for neighbours inside a part: with a `koleo_group` that divides the part, it is the
    same step altogether.

    A batch without a masked patch has a patch loss of 0 and leaves the center of patches as it is, where upstream's
    becomes NaN. More masked patches than `most_masked` make the loss NaN.

    Args:
        model: gives only the architecture; the parameters are in the state.
        optimizer: see `dinojax.pretraining.dinov2_optim.dinov2_optimizer`.
        teacher_temp: step → temperature of the teacher.
        teacher_momentum: step → weight of the old teacher in its moving average.
        most_masked: the most masked patches in a part of the batch, see `BlockMasking.most_masked`; the patch logits
            of student and teacher have this many rows in each part.
        objective: targets and weights of the losses.
        compute_dtype: dtype in which the networks compute, such as bfloat16 on a GPU; parameters, losses and centers
            keep theirs.
        accumulation_steps: number of equal parts into which the batch is split.
        remat: keep only the input of each block, and compute its activations again for the gradient.
        prototype_chunk: number of prototypes whose logits are computed together, in each head; None computes all at
            once. In chunks they are computed again for the gradient, and in each iteration of Sinkhorn-Knopp.

    The metrics are scalars. loss is what is minimised; class_loss_local, class_loss_global, koleo_loss and patch_loss
    are its terms before their weights, in nats. class_cross_entropy and patch_cross_entropy are means over pairs of
    crops and over masked images; class_entropy and patch_entropy are those of the teacher's probabilities.
    masked_share is the share of the patches of global crops that are masked; feature_std is that of the teacher's class
    tokens of the first global crop. gradient_norm_NAME is that of each sub-module before clipping.

    Raises:
        ValueError: when the step is traced, if `accumulation_steps` does not divide the batch, `koleo_group` a part, or
            `prototype_chunk` the prototypes of a head.
    """
    network = make_network(model, compute_dtype)
    student_loss = _make_student_loss(network, objective, remat=remat)

    def train_step(
        state: TrainState, crops: Sequence[Crops], masks: Masks, key: Key[Array, ""] | None = None
    ) -> tuple[TrainState, Metrics]:
        parts = split_batch([*crops, masks], accumulation_steps)
        temperature = jnp.asarray(teacher_temp(state.step), at_least_float32(state.center.classes.dtype))
        question = (network(state.teacher), parts[0], parts[-1], state.center, temperature, most_masked, objective)
        if prototype_chunk is None:
            prototypes, (teacher, centers) = None, _ask_teacher(*question)
        else:
            teacher, centers, prototypes = _ask_teacher_in_chunks(*question, prototype_chunk)

        def share_of(part: tuple[list[Array], Teacher], key: Array | None) -> PyTree:
            gradients_of = jax.value_and_grad(student_loss, has_aux=True)
            (_, terms), gradients = gradients_of(state.student, *part, key, prototypes)
            return jax.tree.map(lambda x: x / accumulation_steps, (gradients, terms))

        if accumulation_steps == 1:
            gradients, terms = share_of(jax.tree.map(lambda x: x[0], (parts, teacher)), key)
        else:
            gradients, terms = sum_over_parts(share_of, (parts, teacher), key)
        norms = {f"gradient_norm_{name}": norm for name, norm in submodule_norms(gradients).items()}
        metrics = _metrics(terms, teacher, masks, local_crops=sum(len(group) for group in crops[1:]))
        return updated_state(state, gradients, optimizer, teacher_momentum, centers), metrics | norms

    return train_step


def with_masks(
    train_step: Callable[..., tuple[TrainState, Metrics]], masking: BlockMasking, key: Key[Array, ""]
) -> TrainStep:
    """A step `(state, crops, key)` that draws its masks itself, such as `make_pretrain_steps` takes.

    The masks of a step depend on the key of the run, given here, and on the step number only.
    """

    def step(
        state: TrainState, crops: Sequence[Crops], drop_key: Key[Array, ""] | None = None
    ) -> tuple[TrainState, Metrics]:
        views, batch = crops[0].shape[:2]
        masks = block_masks(jax.random.fold_in(key, state.step), masking, views * batch)
        return train_step(state, crops, masks.reshape(views, batch, -1), drop_key)

    return step


def _ask_teacher(
    teacher: DINOv2,
    crops: Array,
    masks: Array,
    centers: Centers,
    temperature: Array,
    most_masked: int,
    objective: DINOv2Objective,
) -> tuple[Teacher, Centers]:
    """The teacher's targets for the global crops "parts 2 images …", and the centers for the next step."""
    tokens, patches, masked = _teacher_tokens(teacher, crops, masks, most_masked)
    logits, patch_logits = teacher.logits(tokens, patches)
    if objective.centering == "centering":
        targets = teacher_probs(logits, centers.classes, temperature)
        patch_targets = teacher_probs(patch_logits, centers.patches, temperature)
        rows, patch_rows = merge(logits, keep=1)[None], merge(patch_logits, keep=1)
        centers = Centers(
            updated_center(centers.classes, rows, objective.center_momentum),
            updated_patch_center(centers.patches, patch_rows, merge(masked.valid, keep=0), objective.center_momentum),
        )
    else:  # over both views and all parts together
        targets = _balanced(logits, temperature, None)
        patch_targets = _balanced(patch_logits, temperature, merge(masked.valid, keep=0))
    return Teacher(tokens, targets, patch_targets, masked), centers


def _ask_teacher_in_chunks(
    teacher: DINOv2,
    crops: Array,
    masks: Array,
    centers: Centers,
    temperature: Array,
    most_masked: int,
    objective: DINOv2Objective,
    chunk: int,
) -> tuple[Teacher, Centers, Prototypes]:
    """`_ask_teacher` without an array of all logits."""
    tokens, patches, masked = _teacher_tokens(teacher, crops, masks, most_masked)
    (head, patch_head), everything = teacher.heads, jnp.ones(tokens.shape[:-1], bool)
    ways: dict[str, Any] = {
        "centering": objective.centering,
        "center_momentum": objective.center_momentum,
        "chunk": chunk,
    }
    ask: Callable[..., Any] = functools.partial(targets_in_chunks, temperature=temperature, **ways)
    rows, prototypes, center = ask(head, tokens, everything, centers.classes)
    patch_rows, patch_prototypes, patch_center = ask(patch_head, patches, masked.valid, centers.patches)
    answer = Teacher(tokens, rows, patch_rows, masked)
    return answer, Centers(center, patch_center), (prototypes, patch_prototypes)


def _teacher_tokens(
    teacher: DINOv2, crops: Array, masks: Array, most_masked: int
) -> tuple[Array, Array, MaskedPatches]:
    """The teacher's class tokens and masked patches, part by part."""

    def of_part(part: tuple[Array, Array]) -> tuple[Array, Array, MaskedPatches]:
        class_tokens, patch_tokens = teacher.tokens(part[0])
        masked = masked_patches(merge(part[1], keep=1), rounded_up(most_masked))
        return class_tokens, gather_patches(merge(patch_tokens, keep=2), masked), masked

    if len(crops) == 1:
        return jax.tree.map(lambda x: x[None], of_part((crops[0], masks[0])))
    return jax.lax.map(of_part, (crops, masks))


def _balanced(logits: Array, temperature: Array, valid: Array | None) -> Array:
    return unmerge(sinkhorn_knopp(merge(logits, keep=1), temperature, valid), logits.shape[:-1])


def _make_student_loss(
    network: Callable[[PyTree], DINOv2], objective: DINOv2Objective, *, remat: bool
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """Returns `student_loss(student, crops and masks, teacher, key)`: the loss of a part, and its terms."""

    def student_loss(
        student: PyTree, part: list[Array], teacher: Teacher, key: Array | None, prototypes: Prototypes | None = None
    ) -> tuple[Array, dict[str, Array]]:
        (global_crops, *local_crops, masks), net = part, network(student)
        keys = [None] * len(part) if key is None else list(jax.random.split(key, len(part)))
        tokens, patches = net.tokens(global_crops, masks, key=keys[0], remat=remat)
        others = [net.tokens(crops, key=own, remat=remat)[0] for crops, own in zip(local_crops, keys[1:])]
        images, temperature = masks.shape[0] * masks.shape[1], objective.student_temp
        outputs = jnp.concatenate([tokens, *others]), gather_patches(merge(patches, keep=2), teacher.masked)
        local_loss, global_loss, patch_loss = _cross_entropies(net, *outputs, teacher, images, temperature, prototypes)
        koleo = koleo_loss_in_groups(tokens, objective.koleo_group) if objective.koleo_loss_weight else jnp.zeros([])
        loss = objective.dino_loss_weight * (local_loss + global_loss)
        loss = loss + objective.koleo_loss_weight * koleo + objective.ibot_loss_weight * patch_loss
        return loss, {
            "loss": loss,
            "class_loss_local": local_loss,
            "class_loss_global": global_loss,
            "koleo_loss": koleo,
            "patch_loss": patch_loss,
        }

    return student_loss


def _cross_entropies(
    student: DINOv2,
    class_tokens: Array,
    patches: Array,
    teacher: Teacher,
    images: int,
    temperature: float,
    prototypes: Prototypes | None,
) -> tuple[Array, Array, Array]:
    """The losses of local crops, of global crops and of masked patches; with the teacher's prototypes, in chunks."""
    weight = teacher.masked.weight
    if prototypes is not None:
        (head, patch_head), (of_classes, of_patches) = student.heads, prototypes
        losses = class_token_losses_in_chunks(head, class_tokens, teacher.class_targets, of_classes, temperature)
        theirs = teacher.patch_targets, of_patches
        return *losses, ibot_loss_in_chunks(patch_head, patches, *theirs, weight, images, temperature)
    logits, patch_logits = student.logits(class_tokens, patches)
    losses = class_token_losses(logits[2:], logits[:2], teacher.class_targets, temperature)
    return *losses, ibot_loss(patch_logits, teacher.patch_targets, weight, images, temperature)


def _metrics(terms: dict[str, Array], teacher: Teacher, masks: Array, *, local_crops: int) -> Metrics:
    """The losses and what monitors need; `teacher` has an axis "parts" in front."""
    pairs, divisor = 2 * local_crops + 2, max(2 * local_crops, 1) + 2
    masked_images = jnp.maximum(jnp.sum(jnp.any(masks, axis=-1)), 1)
    entropies = [
        targets.entropy if isinstance(targets, RowTargets) else jnp.sum(jax.scipy.special.entr(targets), axis=-1)
        for targets in (teacher.class_targets, teacher.patch_targets)
    ]
    valid = teacher.masked.valid
    return terms | {
        "class_cross_entropy": (terms["class_loss_local"] + terms["class_loss_global"]) * divisor / pairs,
        "patch_cross_entropy": terms["patch_loss"] * (masks.shape[0] * masks.shape[1]) / masked_images,
        "class_entropy": jnp.mean(entropies[0]),
        "patch_entropy": jnp.sum(jnp.where(valid, entropies[1], 0)) / jnp.maximum(jnp.sum(valid), 1),
        "masked_share": jnp.mean(masks, dtype=terms["loss"].dtype),
        "feature_std": feature_std(merge(teacher.class_tokens[:, 0], keep=1)),
    }
