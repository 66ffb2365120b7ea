"""`load_classifier(path)`: a model of `transformers` for image classification, as a backbone and a head."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.huggingface.positions import Positions
from converters.huggingface.settings import read_settings
from converters.layouts import classifier_of_checkpoint
from converters.pretrained import read_file
from converters.torch_to_flax import fill
from dinojax.errors import UserError
from dinojax.heads.classifier import Classifier, ClassifierConfig, ClassifierHead
from dinojax.heads.files import abstract_head


def load_classifier(
    path: str | Path, *, num_heads: int | None = None, positions: Positions | None = None
) -> Classifier:
    """Reads Dinov2ForImageClassification, its sibling with registers, or ViTForImageClassification.

        classifier = load_classifier("folder")
        logits = classifier(dinojax.preprocess(photos, classifier))

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


def _head(path: Path, found: Mapping[str, np.ndarray], dim: int, family: str | None) -> ClassifierHead:
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
    head = abstract_head(ClassifierConfig(dim, names, mean_patch=family != "dino"))
    assert isinstance(head, ClassifierHead)
    return fill(head, {"weight": weight, "bias": bias})


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
