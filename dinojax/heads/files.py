"""Heads on disk: a folder with `model.safetensors` and `config.json`, as models have it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from flax import nnx

from dinojax.errors import UserError
from dinojax.heads.classifier import ClassifierConfig, ClassifierHead
from dinojax.heads.dpt import DPTConfig, DPTHead
from dinojax.heads.linear_depth import LinearDepthConfig, LinearDepthHead
from dinojax.models.files import CONFIG_FILE, WEIGHTS_FILE, read_config, with_stored_parameters, write_folder

HeadConfig = ClassifierConfig | LinearDepthConfig | DPTConfig
Head = ClassifierHead | LinearDepthHead | DPTHead
_KINDS: Mapping[str, tuple[type[HeadConfig], type[Head]]] = {
    "ClassifierHead": (ClassifierConfig, ClassifierHead),
    "LinearDepthHead": (LinearDepthConfig, LinearDepthHead),
    "DPTHead": (DPTConfig, DPTHead),
}


def abstract_head(config: HeadConfig) -> Head:
    """A head of shapes alone; no values are drawn."""
    (kind,) = (head for settings, head in _KINDS.values() if isinstance(config, settings))
    return nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))  # type: ignore[arg-type]


def save_head(head: Head, path: str | Path, *, source: Mapping[str, object] | None = None) -> Path:
    """Writes a head to the folder `path`, whole or not at all; a folder of that name is replaced.

    Args:
        head: of any kind.
        path: the folder.
        source: JSON values that say where the weights come from; stored with the configuration.

    Raises:
        UserError: the folder cannot be written.
    """
    document = {
        "model": type(head).__name__,
        "config": dataclasses.asdict(head.config),
        "source": dict(source or {}),
    }
    return write_folder(head, Path(path), document)


def load_head(path: str | Path) -> Head:
    """Reads a head that `save_head` wrote.

    Raises:
        UserError: there is no such folder, or its files are damaged (the SHA-256 is checked).
    """
    path = Path(path)
    document = read_config(path, files=[WEIGHTS_FILE])
    try:
        settings, _ = _KINDS[document["model"]]
        config = settings(**document["config"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path / CONFIG_FILE} is not the configuration of a head ({error})") from error
    return with_stored_parameters(abstract_head(config), path / WEIGHTS_FILE)
