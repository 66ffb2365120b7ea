"""The backbone that a command is given: published, from a file or folder, from a training's run, or never trained.

With it come what its weights expect of images: the mean and deviation of the pixels, and the size it was trained at.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from dinojax import VARIANTS, UserError, VisionTransformer
from dinojax.models.files import CONFIG_FILE, is_model_folder, shipped_folder
from experiments.runs.records import TRACES_OF_TRAINING

# Source: facebookresearch/dino 7c446df `eval_knn.py`, facebookresearch/dinov2 b8931f7 `dinov2/data/transforms.py`.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RANDOM = "random"
DEFAULT_SHAPE = "dinov2_vits14"
NETWORKS = ("teacher", "student")
_LARGEST_DEFAULT = 224  # DINOv2's weights are made for 518 px and evaluated at 224

Normalisation = Sequence[Sequence[float]]  # mean and deviation of red, green and blue, on a scale of 0 to 1


class Backbone(NamedTuple):
    """A model and what it expects.

    Attributes:
        model: any size.
        weights: what it was read from; of a run folder, the folder of its network.
        normalisation: mean and deviation of the pixels (0–1) it was trained with.
        image_size: pixels of the images it was trained on; where that is not known, its position embeddings' size,
            and 224 for those that are larger.
        source: where a model folder says its weights come from.
    """

    model: VisionTransformer
    weights: str
    normalisation: Normalisation
    image_size: int
    source: Mapping[str, Any]


def load_backbone(weights: str, *, seed: int, cache_dir: Path, network: str = NETWORKS[0]) -> Backbone:
    """The backbone that `weights` names.

    Args:
        weights: a published name, a file, a folder, a training's run folder, "random" or "random:NAME".
        seed: of random weights.
        cache_dir: of downloaded weights.
        network: which one of a run folder.

    Raises:
        UserError: no such checkpoint, file, network or architecture, or none that can be had here.
    """
    weights = find_network(weights, network)
    model, source = _load_model(weights, seed, cache_dir), _source(weights)
    size = source.get("image_size", min(model.config.img_size, _LARGEST_DEFAULT))
    return Backbone(model, weights, find_normalisation(weights), size, source)


def find_networks(weights: str) -> dict[str, str]:
    """The model folders of a run folder by the names of its networks, teacher first; none where it is no run folder.

    Raises:
        UserError: the run folder is of a training that did not end yet.
    """
    folder = Path(weights).expanduser()
    held = {name: str(folder / name) for name in NETWORKS if is_model_folder(folder / name)}
    if not held and any((folder / trace).exists() for trace in TRACES_OF_TRAINING):
        raise UserError(
            f"{weights} is the run of a training that has not ended: it holds no {NETWORKS[0]} yet; repeat the "
            "training's command, which goes on with it"
        )
    return held


def find_network(weights: str, network: str = NETWORKS[0]) -> str:
    """The model folder in a training's run folder; anything else is returned as it is.

    Raises:
        UserError: the run folder does not hold that network, or there is nothing to choose from.
    """
    held = find_networks(weights)
    if network in held:
        return held[network]
    if held:
        raise UserError(f"--network {network}: {weights} holds no model of that name, only {next(iter(held))}")
    if network != NETWORKS[0]:
        raise UserError(f"--network {network}: {weights} is no run folder of a training with several networks")
    return weights


def find_normalisation(weights: str) -> Normalisation:
    """Mean and deviation of the pixels (0–1) a model was trained with: its own where they are kept, else ImageNet's."""
    source = _source(weights)
    return (source["mean"], source["std"]) if "mean" in source else (IMAGENET_MEAN, IMAGENET_STD)


def is_random(weights: str) -> bool:
    """Whether a model that was never trained is asked for."""
    return weights == RANDOM or weights.startswith(f"{RANDOM}:")


def _load_model(weights: str, seed: int, cache_dir: Path) -> VisionTransformer:
    if is_random(weights):
        name = weights.removeprefix(RANDOM).removeprefix(":") or DEFAULT_SHAPE
        if name not in VARIANTS:
            raise UserError(f"{weights}: {name!r} is none of {', '.join(VARIANTS)}")
        return VisionTransformer(VARIANTS[name], rngs=nnx.Rngs(seed))
    # Torch is only loaded where a PyTorch file is read.
    from converters.pretrained import load_pretrained, read_model

    path = Path(weights).expanduser()
    if path.exists():
        return read_model(path)
    if path.name != weights or path.suffix:
        raise UserError(f"{weights}: there is no such file or folder of weights")
    try:
        return load_pretrained(weights, cache_dir=cache_dir)
    except UserError as error:
        raise UserError(f"{weights}: {error}; `make demo` needs neither weights nor data") from error


def _source(weights: str) -> dict[str, Any]:
    """What is kept beside the weights in a folder that `dinojax.save` wrote."""
    folder = shipped_folder(weights) or Path(weights).expanduser()
    return json.loads((folder / CONFIG_FILE).read_text()).get("source", {}) if is_model_folder(folder) else {}
