"""The networks that are evaluated: where their weights come from, and how they were trained."""

from pathlib import Path
from typing import Any

from flax import nnx

from dinojax.errors import UserError
from dinojax.models.vit import VisionTransformer
from dinojax.parallel import make_mesh
from experiments.features.backbones import NETWORKS, Backbone, find_network, find_networks, load_backbone
from experiments.features.extractor import FeatureExtractor
from experiments.probing.config import EvaluationConfig
from experiments.runs.records import RESULT_FILE, read_json

UNTRAINED, OTHER = "untrained", "model"
_PREPROCESSING = ("mean", "std")  # among the origin before releases of 0.2


def load_networks(config: EvaluationConfig) -> dict[str, Backbone]:
    """The networks to evaluate, by name: "teacher", "student", "untrained", or "model" where there is only one.

    Raises:
        UserError: no such weights, or no such network in the run folder.
    """
    weights, chosen = config.model.weights, config.networks.network
    options = {"seed": config.run.seed, "cache_dir": config.run.cache_dir}
    found = find_networks(weights)
    if chosen != "all" and (found or chosen != NETWORKS[0]):
        found = {chosen: find_network(weights, chosen)}
    if not found:
        name = Path(weights).name
        found = {name if name in NETWORKS else OTHER: weights}
    backbones = {name: load_backbone(path, **options) for name, path in found.items()}
    if config.networks.untrained:
        first = next(iter(backbones.values()))
        drawn = VisionTransformer(
            first.model.config, rngs=nnx.Rngs(config.run.seed), preprocessing=first.model.preprocessing
        )
        backbones[UNTRAINED] = first._replace(model=drawn, weights=UNTRAINED)
    return backbones


def make_extractor(config: EvaluationConfig, backbone: Backbone) -> FeatureExtractor:
    """The backbone as a source of cached features, at the image size of the settings or at its own.

    Raises:
        UserError: a size that the model does not take.
    """
    extractor = FeatureExtractor(
        backbone.model,
        normalisation=backbone.normalisation,
        image_size=config.model.image_size or backbone.image_size,
        cache_dir=config.run.cache_dir,
        dtype=config.model.dtype,
        batch_size=config.model.batch_size,
        mesh=make_mesh(config.model.mesh),
    )
    resize = config.networks.resize
    if resize is not None and resize < extractor.image_size:
        raise UserError(f"--resize {resize} is less than the {extractor.image_size} px that are cropped from it")
    return extractor


def known_training(backbone: Backbone) -> dict[str, Any]:
    """What is known of how the weights were trained: what is kept beside them, and the result of their training."""
    known = {name: value for name, value in backbone.source.items() if name not in _PREPROCESSING}
    folder = Path(backbone.weights).expanduser().parent
    if Path(backbone.weights).name in NETWORKS and (folder / RESULT_FILE).is_file():
        result = read_json(folder / RESULT_FILE)
        known |= {name: result.get(name) for name in ("train_seconds", "config")}
        known |= {name: result.get("environment", {}).get(name) for name in ("device", "backend", "git_commit")}
    return known
