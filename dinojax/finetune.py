"""Supervised fine-tuning of a backbone with a linear head: trainable parameters, optimisers, training step.

The modes: "linear" trains the head alone; "finetune" trains everything at one learning rate; "llrd" trains everything
at rates that fall with the distance from the head; "lora" trains the head and low-rank factors of the projections in
attention.

Source: `torch.optim.SGD`, `torch.optim.AdamW`, `torch.nn.CrossEntropyLoss`, `torch.nn.utils.clip_grad_norm_`; layers as
facebookresearch/dinov2 05c66df `get_vit_lr_decay_rate` counts them; LoRA (arXiv 2106.09685).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, Key, PyTree

from dinojax.accumulation import moving_average, part_size, sum_over_parts
from dinojax.errors import UserError, require
from dinojax.models.chunks import images_in_cache, in_chunks
from dinojax.models.layers import Linear, Module, torch_default_init
from dinojax.models.vit import VisionTransformer
from dinojax.parallel import divide_parameters, gather
from dinojax.precision import at_least_float32
from dinojax.pretraining.monitors import gradient_norms
from dinojax.pretraining.schedules import Schedule
from dinojax.probes.labelled import check_range

MODES = ("linear", "finetune", "llrd", "lora")

Images = Float[Array | np.ndarray, "batch height width channels"]
Labels = Int[Array | np.ndarray, " batch"]
Logits = Float[Array, "batch classes"]
ClassWeights = Float[Array | np.ndarray, " classes"]
DropPathKey = Key[Array, ""] | None


class ImageClassifier(Module):
    """A backbone and a linear layer on its class token.

    Args:
        backbone: any size.
        classes: number of classes.
        rngs: draws the initial weights of the linear layer.
    """

    def __init__(self, backbone: VisionTransformer, classes: int, *, rngs: nnx.Rngs):
        dim, dtype = backbone.config.embed_dim, backbone.cls_token.dtype
        self.backbone = backbone
        self.head = Linear(dim, classes, rngs=rngs)
        self.head.kernel = nnx.Param(0.01 * jax.random.normal(rngs.params(), (dim, classes), dtype))
        self.head.bias = nnx.Param(jnp.zeros(classes, dtype))

    def __call__(self, images: Images, *, key: DropPathKey = None, remat: bool = False) -> Logits:
        """Class scores before the softmax; `key` draws drop path, None leaves it out."""
        return self.head(self.backbone(images, key=key, remat=remat).cls_token)


def split_parameters(
    model: ImageClassifier, mode: str, *, lora_rank: int = 8, key: Key[Array, ""] | None = None
) -> tuple[PyTree, PyTree]:
    """The trainable and the frozen parameters of a mode.

    In mode "lora", each `attn.qkv` and `attn.proj` gets trainable factors in addition to its frozen kernel: `a` "in
    rank", drawn from `key`, and `b` "rank out", zero, so that training starts from the given model.

    Args:
        model: real; an abstract one is enough to count parameters.
        mode: one of `MODES`.
        lora_rank: rank of the factors.
        key: draws the factors; only mode "lora" needs it.

    Raises:
        UserError: an unknown mode, or `lora_rank` is not positive.
    """
    _check(mode)
    parameters = jax.tree.map(lambda x: x, nnx.state(model, nnx.Param))  # the same arrays in variables of their own
    if mode in ("finetune", "llrd"):
        # They include the mask token, as the official count does, though no image is masked here. torch skips a tensor
        # without gradient; here its gradient is zero and no optimiser decays it, so it does not change either.
        return parameters, nnx.State({})
    head, backbone = nnx.split_state(parameters, lambda path, _: path[0] == "head", ...)
    if mode == "linear":
        return head, backbone
    require(lora_rank >= 1, "lora_rank", lora_rank, "a positive number, such as 8")
    if key is None:
        raise ValueError("mode 'lora' draws its factors: it needs a key")
    kernels = [(path, param) for path, param in nnx.to_flat_state(backbone) if "attn" in path and path[-1] == "kernel"]
    factors = []
    for ((*layer, _), kernel), draw in zip(kernels, jax.random.split(key, len(kernels))):
        rows, columns = kernel.shape
        a = torch_default_init(rows)(draw, (rows, lora_rank), kernel.dtype)
        b = jnp.zeros((lora_rank, columns), kernel.dtype)
        factors += [((*layer, "a"), nnx.Param(a)), ((*layer, "b"), nnx.Param(b))]
    return nnx.merge_state(head, nnx.from_flat_state(factors)), backbone


def merge_parameters(trainable: PyTree, frozen: PyTree, *, lora_alpha: float = 16.0) -> PyTree:
    """All parameters of an `ImageClassifier`; `nnx.update` puts them into a model.

    A kernel with factors becomes kernel + lora_alpha / rank · a @ b.
    """
    merged = dict(nnx.to_flat_state(frozen)) | dict(nnx.to_flat_state(trainable))
    for *layer, _ in [path for path in merged if path[-1] == "a"]:
        a, b = merged.pop((*layer, "a"))[...], merged.pop((*layer, "b"))[...]
        kernel = merged[(*layer, "kernel")]
        change = lora_alpha / a.shape[1] * jnp.matmul(a, b, precision="highest")
        merged[(*layer, "kernel")] = kernel.replace(kernel[...] + change)
    return nnx.from_flat_state(merged)


def count_parameters(parameters: PyTree) -> int:
    """Number of elements in a tree of real or abstract arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))


def finetune_optimizer(
    mode: str,
    depth: int,
    *,
    learning_rate: Schedule,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    layer_decay: float = 0.75,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """SGD with momentum for "linear" and "finetune", AdamW for "llrd" and "lora".

    Args:
        mode: one of `MODES`.
        depth: number of blocks in the backbone.
        learning_rate: step → learning rate of the head, such as `optax.piecewise_constant_schedule`.
        weight_decay: SGD applies it to all parameters; AdamW to all except biases, the vectors of norms, LayerScale
            factors, tokens and the position table, as BEiT and timm do (DINOv2's pretraining decays tokens and table).
        momentum: momentum of SGD.
        layer_decay: in mode "llrd" the rate is multiplied by layer_decay ** (depth + 1 - layer). Patch embedding,
            tokens and position table are layer 0, block i (from 0) is layer i + 1, final norm and head are layer
            depth + 1.
        clip_norm: largest norm of all gradients together; None or 0 leaves clipping out.

    Raises:
        UserError: an unknown mode.
    """
    _check(mode)
    clip = _clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    if mode in ("linear", "finetune"):
        rule = optax.chain(optax.add_decayed_weights(weight_decay, mask=_decayed_by_sgd), optax.trace(momentum))
    else:
        adam, decay = optax.scale_by_adam(), optax.add_decayed_weights(weight_decay, mask=_decayed_by_adamw)
        rule = optax.chain(adam, decay, _scale_by_layer(depth, layer_decay if mode == "llrd" else 1.0))
    return optax.chain(clip, rule, optax.scale_by_learning_rate(learning_rate))


def balanced_class_weights(labels: Int[Array | np.ndarray, " images"], classes: int) -> Float[np.ndarray, " classes"]:
    """The weight images / (classes · images of the class) of each class, as scikit-learn's "balanced".

    Raises:
        UserError: a class has no images, or a label is out of range.
    """
    check_range(labels, classes)
    counts = np.bincount(np.asarray(labels), minlength=classes)
    if not counts.all():
        raise UserError(
            f"class {counts.argmin()} of {classes} has no images, so it has no weight; add some or remove the class"
        )
    return counts.sum() / (classes * counts)


def weighted_cross_entropy(
    logits: Logits,
    labels: Labels,
    class_weights: ClassWeights | None = None,
    label_smoothing: float = 0.0,
    *,
    total: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Softmax cross-entropy in nats, averaged over images with the weight of their class, in float32 at least.

    Args:
        logits: class scores before the softmax.
        labels: class indices; rows with the label -1 fill up a batch and do not count.
        class_weights: weight of each class; None weights all equally.
        label_smoothing: share of each label that is spread over all classes.
        total: sum of the weights of the whole batch, if these images are a part of it.
    """
    logits = logits.astype(at_least_float32(logits.dtype))
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    ones = jnp.ones(logits.shape[-1])
    weights = jnp.asarray(ones if class_weights is None else class_weights, logits.dtype)[None]
    # Smoothing moves a share of each label to every class, with the weight of that class; the divisor keeps the weights
    # of the labels, as torch does.
    targets = jnp.where(labels[:, None] >= 0, optax.smooth_labels(one_hot, label_smoothing) * weights, 0)
    total = jnp.sum(one_hot * weights) if total is None else total.astype(logits.dtype)
    return -jnp.sum(targets * jax.nn.log_softmax(logits)) / total


class FinetuneState(NamedTuple):
    """Everything that changes from step to step, as one pytree; a checkpoint holds exactly this.

    `ema` is the moving average of `trainable`, or None.
    """

    step: Int[Array, ""]
    trainable: PyTree
    opt_state: optax.OptState
    ema: PyTree | None


def init_finetune_state(
    trainable: PyTree, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> FinetuneState:
    """The state before the first step. It holds copies of the parameters, so it may be donated."""
    own, average = (jax.tree.map(jnp.copy, trainable) for _ in range(2))
    return FinetuneState(jnp.zeros([], jnp.int32), own, optimizer.init(own), average if ema else None)


def make_logits(
    model: ImageClassifier,
    *,
    lora_alpha: float = 16.0,
    compute_dtype: DTypeLike | None = None,
    remat: bool = False,
    inference: bool = False,
) -> Callable[..., Logits]:
    """Returns `logits_of(trainable, frozen, images, key=None)`; the key draws drop path.

    Args:
        model: gives only the architecture.
        lora_alpha: as in `merge_parameters`.
        compute_dtype: as in `dinojax.pretraining.make_train_step`.
        remat: keep only the input of each block, and compute its activations again for the gradient.
        inference: for evaluation only: no drop path, and computed by `in_chunks`. A backbone without trainable
            parameters always runs this way.
    """
    graphdef, _ = nnx.split(model, nnx.Param)

    def logits_of(trainable: PyTree, frozen: PyTree, images: Images, key: DropPathKey = None) -> Logits:
        parameters = merge_parameters(trainable, frozen, lora_alpha=lora_alpha)
        if compute_dtype is not None:
            parameters = jax.tree.map(lambda x: x.astype(compute_dtype), parameters)
        network = nnx.merge(graphdef, gather(parameters))
        if "backbone" in trainable and not inference:
            return network(images, key=key, remat=remat)
        return network.head(in_chunks(network.backbone, network.backbone.config, images).cls_token)

    return logits_of


def head_logits(
    trainable: PyTree, frozen: PyTree, features: Float[Array | np.ndarray, "batch dim"], key: DropPathKey = None
) -> Logits:
    """The logits of mode "linear" from class tokens that were computed before; `frozen` and `key` are not used."""
    head = gather(trainable["head"])
    return features @ head["kernel"][...] + head["bias"][...][None]


def make_finetune_step(
    logits_of: Callable[..., Logits],
    optimizer: optax.GradientTransformation,
    *,
    class_weights: ClassWeights | None = None,
    label_smoothing: float = 0.0,
    ema_decay: float | None = None,
    accumulation_steps: int = 1,
) -> Callable[..., tuple[FinetuneState, dict[str, Array]]]:
    """Returns `step(state, frozen, inputs, labels, key) -> (state, metrics)`, pure, to be jitted by the caller.

    Args:
        logits_of: from `make_logits`, for images, or `head_logits`, for features.
        optimizer: see `finetune_optimizer`.
        class_weights: weight of each class, such as `balanced_class_weights`; None weights all equally.
        label_smoothing: share of each label that is spread over all classes.
        ema_decay: weight of the old average, or (1 + step) / (10 + step) if that is less, as in TensorFlow's
            `ExponentialMovingAverage`; None if the state has no average.
        accumulation_steps: number of equal parts into which the batch is split. They are computed one after the other,
            and their gradients added: the same step with less memory, and faster on a CPU whose cache holds the
            activations of a part.

    The key draws drop path; None leaves it out. The metrics are scalars of the batch before the step: loss in nats,
    accuracy as a fraction, and gradient_norm before clipping.

    Raises:
        ValueError: when the step is traced, if the state has an average and `ema_decay` is None or the other way round,
            or if `accumulation_steps` does not divide the batch.
    """

    def gradients_of(
        trainable: PyTree, frozen: PyTree, part: tuple[Array, Labels], key: DropPathKey, total: Array
    ) -> tuple[PyTree, tuple[Array, Array]]:
        inputs, labels = part

        def loss_and_hits(trainable: PyTree) -> tuple[Array, tuple[Array, Array]]:
            logits = logits_of(trainable, frozen, inputs, key)
            loss = weighted_cross_entropy(logits, labels, class_weights, label_smoothing, total=total)
            return loss, (loss, jnp.sum(logits.argmax(axis=-1) == labels))

        return jax.grad(loss_and_hits, has_aux=True)(trainable)

    def step(
        state: FinetuneState, frozen: PyTree, inputs: Array | np.ndarray, labels: Labels, key: DropPathKey = None
    ) -> tuple[FinetuneState, dict[str, Array]]:
        if (state.ema is None) != (ema_decay is None):
            raise ValueError(f"ema_decay={ema_decay}, but the state has {'no' if state.ema is None else 'an'} average")
        inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)
        weight = 1.0 if class_weights is None else jnp.asarray(class_weights)[labels]
        total = jnp.sum(jnp.where(labels >= 0, weight, 0.0))

        def of_part(part: tuple[Array, Labels], key: DropPathKey) -> tuple[PyTree, tuple[Array, Array]]:
            return gradients_of(state.trainable, frozen, part, key, total)

        if accumulation_steps == 1:
            gradients, (loss, hits) = of_part((inputs, labels), key)
        else:
            parts = _split(inputs, accumulation_steps), _split(labels, accumulation_steps)
            gradients, (loss, hits) = sum_over_parts(of_part, parts, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        ema = None
        if state.ema is not None and ema_decay is not None:
            # The average of a short training would otherwise be dominated by its first steps.
            count = state.step.astype(float)
            decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
            ema = moving_average(trainable, state.ema, 1 - decay)
        accuracy = hits / jnp.sum(labels >= 0, dtype=loss.dtype)
        metrics = {"loss": loss, "accuracy": accuracy, "gradient_norm": gradient_norms(gradients, None)[0]}
        return divide_parameters(FinetuneState(state.step + 1, trainable, opt_state, ema)), metrics

    return step


def cached_parts(model: VisionTransformer, batch_size: int, image_size: int) -> int:
    """The number of `accumulation_steps` for which a CPU's cache holds the activations of a part.

    With ViT-S/14 at 224 px, parts of 4 images took 0.8 of the CPU time of 16 images at once, and a fifth of the memory.
    """
    tokens = (image_size // model.config.patch_size) ** 2
    most = images_in_cache(2 * tokens, model.config.embed_dim)  # twice: the gradient needs as much again
    return next(parts for parts in range(1, batch_size + 1) if batch_size % parts == 0 and batch_size // parts <= most)


def _split(x: Array, parts: int) -> Array:
    """The batch as "parts images …". A part takes every `parts`-th image: devices that share a batch share a part."""
    return x.reshape(part_size(len(x), parts), parts, *x.shape[1:]).swapaxes(0, 1)


_NOT_DECAYED = ("cls_token", "pos_embed", "register_tokens", "mask_token")


def _check(mode: str) -> None:
    require(mode in MODES, "mode", mode, f"one of {', '.join(MODES)}")


def _decayed_by_sgd(params: PyTree) -> PyTree:
    return nnx.map_state(lambda path, _: path[-1] != "mask_token", params)


def _decayed_by_adamw(params: PyTree) -> PyTree:
    return nnx.map_state(lambda path, param: param.ndim > 1 and path[-1] not in _NOT_DECAYED, params)


def _scale_by_layer(depth: int, layer_decay: float) -> optax.GradientTransformation:
    def rate(path: tuple[Any, ...]) -> float:
        last = path[0] == "head" or path[1] == "norm"
        layer = depth + 1 if last else path[2] + 1 if path[1] == "blocks" else 0
        return layer_decay ** (depth + 1 - layer)

    return optax.stateless(lambda updates, _: nnx.map_state(lambda path, x: x.replace(x[...] * rate(path)), updates))


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Clips as torch does, which adds 1e-6 to the norm; `optax.clip_by_global_norm` does not."""

    def clip(gradients: PyTree, _: PyTree) -> PyTree:
        factor = jnp.minimum(1, max_norm / (gradient_norms(gradients, None)[0] + 1e-6))
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), gradients)

    return optax.stateless(clip)
