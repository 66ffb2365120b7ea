"""`load_classifier(path)`: a model of `transformers` for image classification, as a backbone and a head."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from converters.huggingface.positions import Positions
from converters.huggingface.settings import read_settings
from converters.layouts import classifier_of_checkpoint
from converters.pretrained import read_file
from dinojax.errors import UserError
from dinojax.models.vit import Features, VisionTransformer


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear classifier on the features of a backbone.

    Attributes:
        kernel: weights.
        bias: of each class.
        class_names: in the order of the logits.
        features: what it takes: "cls", the class token; or "cls+mean_patch", the class token and the mean of the patch
            tokens, one after the other. All are those after the final LayerNorm; registers take no part.
    """

    kernel: Float[Array | np.ndarray, "inputs classes"]
    bias: Float[Array | np.ndarray, " classes"]
    class_names: tuple[str, ...]
    features: Literal["cls", "cls+mean_patch"]

    def __call__(self, features: Features) -> Float[Array, "batch classes"]:
        """Logits from the output of the backbone; `jax.nn.softmax` makes probabilities of them."""
        inputs = features.cls_token
        if self.features == "cls+mean_patch":
            inputs = jnp.concatenate([inputs, features.patch_tokens.mean(axis=1)], axis=1)
        return inputs @ jnp.asarray(self.kernel) + jnp.asarray(self.bias)[None]


class Classifier(NamedTuple):
    """A backbone and the head on it."""

    model: VisionTransformer
    head: Head


def load_classifier(
    path: str | Path, *, num_heads: int | None = None, positions: Positions | None = None
) -> Classifier:
    """Reads Dinov2ForImageClassification, its sibling with registers, or ViTForImageClassification.

        model, head = load_classifier("folder")
        logits = head(model(dinojax.preprocess(photos, model)))

    Args:
        path: a Hugging Face folder, or a file with its weights (`.safetensors`, `.bin`, `.onnx`).
        num_heads: number of attention heads of a file without a `config.json` beside it.
        positions: how the position table is resized to images of another size, as for `load_pretrained`; "huggingface"
            for the logits of `transformers` at every size.

    Raises:
        UserError: there is no such file, it cannot be used, or it holds no classifier.
    """
    path = Path(path).expanduser()
    tensors, model = read_file(path, num_heads=num_heads, positions=positions)
    found = classifier_of_checkpoint(tensors)
    if not found:
        raise UserError(f"{path} holds no classifier; converters.load_pretrained and read_model read backbones alone")
    return Classifier(model, _head(path, found, model.config.embed_dim, model.config.family))


def _head(path: Path, found: Mapping[str, np.ndarray], dim: int, family: str | None) -> Head:
    inputs = dim if family == "dino" else 2 * dim
    weight, bias = found.get("weight"), found.get("bias")
    if weight is None or bias is None or len(found) != 2:
        raise UserError(f"{path}: a classifier has a weight and a bias, and this one has {', '.join(sorted(found))}")
    if weight.ndim != 2 or weight.shape[1] != inputs or bias.shape != weight.shape[:1] or not len(bias):
        raise UserError(
            f"{path}: classifier.weight {weight.shape} and classifier.bias {bias.shape} do not fit a backbone of {dim} "
            f"channels; expected are (classes, {inputs}) and (classes,)"
        )
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise UserError(f"{path} holds values that are not finite in its classifier; the file is damaged or diverged")
    names = _class_names(path, read_settings(path), len(bias))
    kind: Literal["cls", "cls+mean_patch"] = "cls" if family == "dino" else "cls+mean_patch"
    return Head(jax.device_put(weight.T), jax.device_put(bias), names, kind)


def _class_names(path: Path, settings: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The names in `id2label`; "LABEL_0" and so on, as in `transformers`, without it."""
    labels = settings.get("id2label")
    if labels is None:
        return tuple(f"LABEL_{index}" for index in range(count))
    names = [labels.get(str(index)) for index in range(count)] if isinstance(labels, dict) else []
    known = tuple(name for name in names if isinstance(name, str))
    if len(known) != count or len(labels) != count:
        raise UserError(f"{path}: id2label in config.json does not name the {count} classes of the classifier")
    return known
