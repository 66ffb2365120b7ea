"""Finished models on disk: a folder with `model.safetensors` (every parameter by its dotted path) and `config.json`."""

import contextlib
import dataclasses
import difflib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import safetensors
from flax import nnx
from jaxtyping import DTypeLike
from safetensors.numpy import save_file

from dinojax.documents import flush_folder, read_document, sha256_of_file, write_document
from dinojax.errors import UserError
from dinojax.models.config import ViTConfig
from dinojax.models.preprocessing import Preprocessing
from dinojax.models.variants import VARIANTS
from dinojax.models.vit import VisionTransformer, default_preprocessing

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
SHIPPED = ("dinojax_vitt",)
_KIND = "VisionTransformer"
_REMEDY = "convert the weights again"
Network = TypeVar("Network", bound=nnx.Module)


def named_parameters(module: nnx.Module) -> dict[str, jax.Array]:
    """Dotted path → parameter, such as `blocks.0.attn.qkv.kernel`."""
    return {_dotted(path): param[...] for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def with_parameters(module: Network, arrays: Mapping[str, np.ndarray | jax.Array]) -> Network:
    """A copy of `module` (real or abstract) with copies of `arrays` as its parameters.

    Args:
        module: gives the architecture.
        arrays: dotted path → array, exactly one for each parameter.

    Raises:
        UserError: a missing, extra or misshapen array; the message names all of them.
    """
    graphdef, state = nnx.split(module, nnx.Param)
    flat = nnx.to_flat_state(state)
    raise_unless_same(_shapes(module), {name: array.shape for name, array in arrays.items()})
    filled = [(path, param.replace(jax.numpy.array(arrays[_dotted(path)]))) for path, param in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def raise_unless_same(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    """Compares names and shapes.

    Raises:
        UserError: names every missing, extra and misshapen array.
    """
    problems = [f"missing {name} {tuple(expected[name])}" for name in expected if name not in given]
    problems += [f"extra {name} {tuple(given[name])}" for name in given if name not in expected]
    problems += [
        f"misshapen {name} {tuple(given[name])} instead of {tuple(expected[name])}"
        for name in expected
        if name in given and tuple(given[name]) != tuple(expected[name])
    ]
    if problems:
        raise UserError(f"these weights do not fit the model in {len(problems)} places: " + "; ".join(problems))


def save(
    model: VisionTransformer,
    path: str | Path,
    *,
    source: Mapping[str, object] | None = None,
    dtype: DTypeLike | None = None,
) -> Path:
    """Writes a model, with its preprocessing, to the folder `path`, whole or not at all.

    Args:
        model: a model of any size.
        path: a folder that does not exist yet, or one that an earlier `save` wrote, which is replaced.
        source: JSON values that say where the weights come from; stored with the configuration.
        dtype: dtype of the stored parameters; None keeps theirs. float16 halves the file, and `load` widens it to
            float32.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something else or cannot be written, or a parameter overflows `dtype`.
    """
    path = Path(path)
    if path.exists() and not is_model_folder(path):
        raise UserError(f"{path} exists and is not a model of dinojax; name another folder")
    document = {
        "model": _KIND,
        "config": model.config.settings(),
        "preprocessing": dataclasses.asdict(model.preprocessing),
        "source": dict(source or {}),
    }
    return write_folder(model, path, document, dtype=dtype)


def write_folder(
    module: nnx.Module, path: Path, document: Mapping[str, Any], *, dtype: DTypeLike | None = None
) -> Path:
    """Writes the parameters of `module` and a document about it to the folder `path`, which is replaced if it exists.

    Raises:
        UserError: the folder cannot be written, or a parameter overflows `dtype`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        arrays = {name: _stored(name, array, dtype) for name, array in named_parameters(module).items()}
        save_file(arrays, partial / WEIGHTS_FILE)
        with (partial / WEIGHTS_FILE).open("rb") as file:
            os.fsync(file.fileno())
        write_document(partial / CONFIG_FILE, document, files=[WEIGHTS_FILE])
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
        flush_folder(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} could not be written ({error}); make room or name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def is_model_folder(path: str | Path) -> bool:
    """Whether `save` wrote the folder; Hugging Face's folders have files of the same names."""
    try:
        document = json.loads((Path(path) / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("model") == _KIND


def load(path: str | Path) -> VisionTransformer:
    """Reads a model that `save` wrote, with its preprocessing. Needs neither torch nor the network.

    Arrays stored in float16 become float32.

    Raises:
        UserError: there is no such folder, its files are damaged (the SHA-256 is checked), or its arrays do not fit the
            architecture.
    """
    _raise_if_name(str(path))
    path = Path(path)
    document = read_config(path, files=[WEIGHTS_FILE])
    try:
        config = ViTConfig(**document["config"])
        preprocessing = _preprocessing(document, config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path / CONFIG_FILE} is not a model configuration ({error}); {_REMEDY}") from error
    digest = document.get("sha256")  # releases before 0.2: a hash of the weights, none of the configuration
    if digest is not None and sha256_of_file(path / WEIGHTS_FILE) != digest:
        raise UserError(f"{path / WEIGHTS_FILE} is damaged (its SHA-256 is not the stored one); {_REMEDY}")
    model = _filled(config, path / WEIGHTS_FILE)
    model.preprocessing = preprocessing
    return model


def _raise_if_name(path: str) -> None:
    """Refuses the name of a published model, or what is nearly one, where a folder is expected."""
    names = [] if Path(path).exists() else difflib.get_close_matches(path, VARIANTS, n=1)
    if names == [path]:
        raise UserError(f"{path} is a published model, not a folder: converters.load_pretrained({path!r}) loads it")
    if names:
        raise UserError(
            f"{path} is not a folder; did you mean converters.load_pretrained({names[0]!r}), a published model?"
        )


def read_source(path: str | Path) -> dict[str, Any]:
    """The origin of the weights in a model folder, as given to `save`.

    Raises:
        UserError: there is no model, or its configuration is damaged.
    """
    source = read_config(Path(path), files=[]).get("source", {})
    return source if isinstance(source, dict) else {}


def _preprocessing(document: Mapping[str, Any], config: ViTConfig) -> Preprocessing:
    """What is stored; before releases of 0.2, mean, deviation and size were among the words about the origin."""
    kept = document.get("preprocessing")
    if kept is None:
        source = document.get("source") or {}
        kept = {name: source[name] for name in ("mean", "std", "image_size") if name in source}
    return dataclasses.replace(default_preprocessing(config), **kept)


def read_config(path: Path, files: list[str]) -> dict[str, Any]:
    """The document of a model folder, after checking its hash and those of `files`.

    Raises:
        UserError: there is no model, or something is damaged.
    """
    if not ((path / WEIGHTS_FILE).is_file() and (path / CONFIG_FILE).is_file()):
        raise UserError(f"{path} holds no model: {CONFIG_FILE} and {WEIGHTS_FILE} were expected in it")
    return read_document(path / CONFIG_FILE, files=files, remedy=_REMEDY)


def _filled(config: ViTConfig, weights: Path) -> VisionTransformer:
    """The model of `config` with the arrays of a file; the number of blocks is compared before it is built."""
    blocks = {name.split(".")[1] for name in _stored_shapes(weights) if name.startswith("blocks.")}
    if len(blocks) != config.depth:
        raise UserError(f"{weights} holds {len(blocks)} blocks and {CONFIG_FILE} says depth {config.depth}")
    return with_stored_parameters(abstract_model(config), weights)


def with_stored_parameters(module: Network, weights: Path) -> Network:
    """A copy of `module` with the arrays of a file, whose names and shapes are compared before they are read.

    Raises:
        UserError: the file is damaged, or does not fit.
    """
    shapes = _stored_shapes(weights)
    raise_unless_same(_shapes(module), shapes)
    with _opened(weights) as file:
        arrays = {name: file.get_tensor(name) for name in shapes}
    arrays = {name: x.astype(np.float32) if x.dtype == np.float16 else x for name, x in arrays.items()}
    return with_parameters(module, arrays)


def _stored_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    with _opened(weights) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)


@contextlib.contextmanager
def _opened(weights: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(weights, "numpy") as file:
            yield file
    except (safetensors.SafetensorError, TypeError) as error:  # TypeError: a dtype that numpy does not have
        raise UserError(f"{weights} is damaged or not a model's ({error}); {_REMEDY}") from error


def abstract_model(config: ViTConfig) -> VisionTransformer:
    """A model of shapes alone; no values are drawn."""
    return nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0)))


def shipped_folder(name: str) -> Path | None:
    """The folder of a model that the package contains, or None if there is no such model."""
    folder = Path(__file__).parents[1] / "assets" / name
    return folder if name in SHIPPED else None


def _stored(name: str, array: jax.Array, dtype: DTypeLike | None) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = np.asarray(array).astype(dtype or array.dtype)
    if not np.isfinite(stored).all() and np.isfinite(array).all():
        raise UserError(f"{name} holds values that {np.dtype(stored.dtype)} cannot; store the model in float32")
    return stored


def _shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    return {_dotted(path): param.shape for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def _dotted(path: tuple[object, ...]) -> str:
    return ".".join(map(str, path))
