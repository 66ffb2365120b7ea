"""Linear classifiers on the class tokens of the last blocks, and on the mean patch.

Source: facebookresearch/dinov2 b8931f7 `dinov2/hub/classifiers.py`, facebookresearch/dino 7c446df `eval_linear.py`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dinojax.errors import require
from dinojax.models.layers import Linear, Module
from dinojax.models.preprocessing import Preprocessing
from dinojax.models.vit import VisionTransformer
from dinojax.precision import matmul_precision


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """What a `ClassifierHead` is built from.

    Attributes:
        embed_dim: width of the backbone.
        class_names: in the order of the logits.
        blocks: number of last blocks whose class tokens are joined.
        mean_patch: whether the mean patch token of the last block follows them.

    Raises:
        UserError: no class, or a number that is not positive.
    """

    embed_dim: int
    class_names: Sequence[str]
    blocks: int = 1
    mean_patch: bool = True

    def __post_init__(self):
        require(self.embed_dim > 0, "embed_dim", self.embed_dim, "positive")
        require(self.blocks > 0, "blocks", self.blocks, "positive")
        require(len(self.class_names) > 0, "class_names", self.class_names, "one name or more")
        object.__setattr__(self, "class_names", tuple(self.class_names))

    @property
    def in_features(self) -> int:
        """Number of inputs of the linear layer."""
        return (self.blocks + self.mean_patch) * self.embed_dim


class ClassifierHead(Linear):
    """A linear layer on tokens after the final LayerNorm: class tokens of the last blocks, and the mean patch.

    Args:
        config: which tokens, and the classes.
        rngs: draws the initial values.
    """

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        super().__init__(config.in_features, len(config.class_names), rngs=rngs)
        self.config = config

    def inputs(
        self, layers: Sequence[tuple[Float[Array, "batch patches dim"], Float[Array, "batch dim"]]]
    ) -> Float[Array, "batch inputs"]:
        """What the linear layer takes of the patch and class tokens of the last blocks, in their order."""
        tokens = [cls_token for _, cls_token in layers]
        if self.config.mean_patch:
            tokens.append(layers[-1][0].mean(axis=1))
        return jnp.concatenate(tokens, axis=1)


class Classifier(Module):
    """A backbone and a linear classifier on it: images to logits, of which `jax.nn.softmax` makes probabilities.

    Args:
        backbone: a model as wide as the head expects.
        head: the classifier.

    Raises:
        UserError: the head is for a backbone of another width, or of more blocks.
    """

    def __init__(self, backbone: VisionTransformer, head: ClassifierHead):
        width, depth = backbone.config.embed_dim, backbone.config.depth
        require(head.config.embed_dim == width, "embed_dim", head.config.embed_dim, f"the backbone's width, {width}")
        require(head.config.blocks <= depth, "blocks", head.config.blocks, f"up to the backbone's depth, {depth}")
        self.backbone = backbone
        self.head = head

    def __call__(
        self, images: Float[Array | np.ndarray, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Logits of normalised images; see `dinojax.preprocess`.

        Raises:
            ValueError: images that the backbone does not take.
        """
        with jax.default_matmul_precision(matmul_precision(self.head.kernel[...].dtype)):
            layers = self.backbone.get_intermediate_layers(images, n=self.head.config.blocks, return_class_token=True)
            return self.head(self.head.inputs(layers))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(self.head.config.class_names)

    @property
    def preprocessing(self) -> Preprocessing:
        """What the backbone expects of its images, for `dinojax.preprocess`."""
        return self.backbone.preprocessing
