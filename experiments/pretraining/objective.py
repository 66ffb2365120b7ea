"""The settings of a pretraining that say what is learnt, and where the training starts."""

import dataclasses
from typing import Annotated, Literal

from experiments.runs.settings import INNER_FRACTION, NOT_NEGATIVE, POSITIVE, PROBABILITY, UNIMPORTANT, Bound

_FACTOR = Bound(lambda value: 0 < value <= 1, "above 0 and up to 1")


@dataclasses.dataclass(frozen=True)
class MethodSettings:
    """The method. Settings that begin with DINOv2 have no effect with --method dino."""

    method: Literal["dino", "dinov2"] = "dino"
    """Method of the training. dino compares the class tokens of crops; dinov2 predicts masked patches too (iBOT), and
    spreads the features (KoLeo)."""
    centering: Literal["centering", "sinkhorn_knopp"] = "sinkhorn_knopp"
    """DINOv2: how the teacher's outputs are spread over the prototypes, by a running mean or by Sinkhorn-Knopp."""
    mask_probability: Annotated[float, PROBABILITY] = 0.5
    """DINOv2: share of the global crops that are masked."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """DINOv2: smallest and largest share of a masked crop's patches that are hidden from the student."""
    ibot_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """DINOv2: weight of the loss of masked patches."""
    koleo_weight: Annotated[float, NOT_NEGATIVE] = 0.1
    """DINOv2: weight of KoLeo."""
    patch_prototypes: Annotated[int | None, POSITIVE] = None
    """DINOv2: number of prototypes of a head of its own for masked patches. None shares the head of the class token."""
    layer_decay: Annotated[float, _FACTOR] = 0.9
    """DINOv2: factor of the learning rate from each block to the one before it."""
    patch_embed_factor: Annotated[float, _FACTOR] = 0.2
    """DINOv2: factor of the learning rate of the patch embedding, on top of the layer-wise decay."""


@dataclasses.dataclass(frozen=True)
class StartSettings:
    """The weights that the training starts from, to continue their pretraining on other images."""

    init: str | None = None
    """Weights to start from: a published checkpoint by its torch.hub name, a file, a folder, or the run folder of a
    training. Architecture, mean and standard deviation are theirs. None starts from random weights."""
    stage: Annotated[int | None, POSITIVE] = None
    """Side in pixels of the global crops in a final stage of high resolution, such as 518. The position table of --init
    is resized to it once. None keeps the table, which is resized in every step."""
    heads_warmup: Annotated[int, NOT_NEGATIVE] = 0
    """Epochs at the start during which only the heads learn, because heads are not published and start at random.
    Afterwards the backbone's learning rate rises linearly over --warmup-epochs."""
    backbone_rate: Annotated[float, _FACTOR] = 1.0
    """Factor of the backbone's learning rate: below 1, the backbone changes more slowly than the heads."""
    most_lost: Annotated[float, INNER_FRACTION, UNIMPORTANT] = 0.1
    """Share of the k-NN accuracy at the start, or of the feature rank where there are no labels, whose loss is reported
    at once."""
