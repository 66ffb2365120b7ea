"""The backbone that a command is given: a published one, a file or folder, a training's run, or random weights.

A backbone comes with the normalisation and the size of the images that it was trained on.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from dinojax import VARIANTS, UserError, VisionTransformer
from dinojax.models.files import is_model_folder, read_source, shipped_folder
from experiments.features.run_folders import TUNED_MODEL, backbone_of_run, check_unchanged
from experiments.features.unfinished import find_in_checkpoints, load_from_checkpoint, place_in_checkpoint
from experiments.runs.kinds import NETWORKS
from experiments.runs.records import TRACES_OF_TRAINING

RANDOM = "random"
DEFAULT_SHAPE = "dinov2_vits14"

Normalisation = Sequence[Sequence[float]]  # mean and standard deviation of red, green and blue (0–1)


class Backbone(NamedTuple):
    """A model, with its preprocessing, and where it comes from.

    Attributes:
        model: of any size.
        weights: what the model was read from; in a run folder, the folder of the network, or its checkpoint and name.
        source: origin of the weights, as recorded in the model folder.
    """

    model: VisionTransformer
    weights: str
    source: Mapping[str, Any]

    @property
    def normalisation(self) -> Normalisation:
        """Mean and standard deviation of the pixels (0–1) that the model was trained with."""
        return self.model.preprocessing.mean, self.model.preprocessing.std

    @property
    def image_size(self) -> int:
        """Side in pixels of the square images that the model is used with unless another size is asked for."""
        return self.model.preprocessing.image_size


def load_backbone(weights: str, *, seed: int, cache_dir: Path | None, network: str = NETWORKS[0]) -> Backbone:
    """The backbone that `weights` names.

    Args:
        weights: a published name, a file, a folder, a training's run folder, "random" or "random:NAME".
        seed: of random weights.
        cache_dir: folder of downloaded weights; None takes `converters.cache.cache_folder`.
        network: name of a network in a run folder.

    Raises:
        UserError: the checkpoint, file, network or architecture does not exist, or cannot be downloaded.
    """
    given, weights = weights, find_network(weights, network)
    if place_in_checkpoint(weights):
        return Backbone(*load_from_checkpoint(weights))
    model, source = _load_model(weights, seed, cache_dir), _source(weights)
    if not _is_within(weights, given):
        check_unchanged(given, weights, model)
        print(f"note: {given} holds a head alone; the backbone below it, {weights}, is used")
    if model.config.in_chans != 3:
        raise UserError(
            f"{weights} takes images of {model.config.in_chans} channels; the commands read red, green, blue"
        )
    return Backbone(model, weights, source)


def find_networks(weights: str) -> dict[str, str]:
    """Network → its model folder in a run folder, the teacher first; empty if `weights` is not a run folder.

    The networks of a training that has not ended are in its newest sound checkpoint.

    Raises:
        UserError: the training of the run folder has not ended, and there is no network in a checkpoint.
    """
    folder = Path(backbone_of_run(weights)).expanduser()
    held = {name: str(folder / name) for name in NETWORKS if is_model_folder(folder / name)}
    if not held and any((folder / trace).exists() for trace in TRACES_OF_TRAINING):
        return find_in_checkpoints(folder)
    return held


def find_network(weights: str, network: str = NETWORKS[0]) -> str:
    """Where a network of a training's run folder is; other `weights` are returned unchanged.

    Raises:
        UserError: the run folder does not hold the network, or the student is asked for and there is no run folder.
    """
    held, weights = find_networks(weights), backbone_of_run(weights)
    if network in held:
        return held[network]
    if held:
        raise UserError(f"--network {network}: {weights} holds no model of that name, only {next(iter(held))}")
    if network != NETWORKS[0]:
        raise UserError(f"--network {network}: {weights} is not the run folder of a training with several networks")
    return weights


def short_name(weights: str) -> str:
    """The end of a path, as titles show it: a folder and what is in it, of a run's network also the run."""
    path = Path(weights)
    parts = [part for part in path.parts if part != path.anchor]
    return "/".join(parts[-3 if path.name in (*NETWORKS, TUNED_MODEL) else -2 :]) or weights


def is_random(weights: str) -> bool:
    """Whether `weights` stands for random weights."""
    return weights == RANDOM or weights.startswith(f"{RANDOM}:")


def _load_model(weights: str, seed: int, cache_dir: Path | None) -> VisionTransformer:
    if is_random(weights):
        name = weights.removeprefix(RANDOM).removeprefix(":") or DEFAULT_SHAPE
        if name not in VARIANTS:
            close = difflib.get_close_matches(name, VARIANTS, n=1)
            hint = f"did you mean {RANDOM}:{close[0]}? " if close else ""
            raise UserError(f"{weights}: {hint}{name!r} is not one of {', '.join(VARIANTS)}")
        return VisionTransformer(VARIANTS[name], rngs=nnx.Rngs(seed))
    # This import is here because it loads torch when a PyTorch file is read.
    from converters.heads import CLASSIFIERS
    from converters.pretrained import load_pretrained, read_model

    path = Path(weights).expanduser()
    if path.exists():
        return read_model(path, say=print)
    if path.name != weights or path.suffix:
        raise UserError(f"{weights}: there is no such file or folder of weights")
    if weights in CLASSIFIERS:
        raise UserError(
            f"{weights} is a classifier, which dinojax predict takes; the model under it is {CLASSIFIERS[weights]}"
        )
    return load_pretrained(weights, cache_dir=cache_dir)


def _is_within(path: str, folder: str) -> bool:
    inner = Path(path).expanduser()
    return Path(folder).expanduser() in (inner, *inner.parents)


def _source(weights: str) -> dict[str, Any]:
    """What `dinojax.save` recorded in a model folder; {} for other weights."""
    folder = shipped_folder(weights) or Path(weights).expanduser()
    return read_source(folder) if is_model_folder(folder) else {}
