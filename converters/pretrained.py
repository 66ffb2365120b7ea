"""`load_pretrained(name)`: a Flax model from the cache, from the official download or from a local file."""

import dataclasses
import difflib
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import numpy as np
from jaxtyping import DTypeLike

from converters.cache import cache_folder
from converters.dinov3.hugging_face import stated_fields
from converters.dinov3.official import LICENSE, TERMS, where_to_get
from converters.download import raise_unless_room
from converters.exports.outputs import described_preprocessing
from converters.heads import DepthHead, ImagenetHead, load_published_head, raise_unless_published, split_name
from converters.huggingface.positions import Positions, difference_from_transformers, with_positions
from converters.huggingface.settings import (
    num_heads_beside,
    preprocessing_beside,
    raise_unless_computed,
    read_settings,
)
from converters.layouts import classifier_of_checkpoint, has_hugging_face_names, left_out, with_mask_token
from converters.published import fetch_source
from converters.sources import SOURCES
from converters.torch_to_flax import from_torch
from converters.weight_files.optional import import_torch
from converters.weight_files.state_dicts import read_state_dict
from dinojax.documents import sha256_of_file
from dinojax.errors import UserError, require
from dinojax.heads.classifier import Classifier, ClassifierHead
from dinojax.heads.depth import DepthEstimator
from dinojax.models.config import ViTConfig
from dinojax.models.files import is_model_folder, load, named_parameters, save, shipped_folder
from dinojax.models.variants import SATELLITE_MEAN, SATELLITE_STD, VARIANTS, is_satellite
from dinojax.models.vit import VisionTransformer

_SHOWN_DIFFERENCES = 4


class _Options(TypedDict, total=False):
    """What `load_pretrained` takes with and without a head."""

    weights: str | Path | None
    head_weights: str | Path | None
    max_depth: float | None
    cache_dir: str | Path | None
    dtype: DTypeLike | None
    positions: Positions | None


@overload
def load_pretrained(name: str, *, head: None = None, **options: Unpack[_Options]) -> VisionTransformer: ...


@overload
def load_pretrained(name: str, *, head: ImagenetHead, **options: Unpack[_Options]) -> Classifier: ...


@overload
def load_pretrained(name: str, *, head: DepthHead, **options: Unpack[_Options]) -> DepthEstimator: ...


def load_pretrained(
    name: str,
    *,
    head: str | None = None,
    weights: str | Path | None = None,
    head_weights: str | Path | None = None,
    max_depth: float | None = None,
    cache_dir: str | Path | None = None,
    dtype: DTypeLike | None = None,
    positions: Positions | None = None,
) -> VisionTransformer | Classifier | DepthEstimator:
    """A published model by its torch.hub name, such as "dinov2_vits14", or "dinojax_vitt", which is in the package.

    The first call downloads the official file, converts it and stores the result. Later calls read the result, without
    torch and without the network. The same holds for the head, if there is one.

    Args:
        name: a key of `dinojax.VARIANTS`; or a classifier of torch.hub, such as "dinov2_vits14_lc", which stands for
            the head "imagenet-linear4".
        head: a published head to put on the model: "imagenet-linear" and "imagenet-linear4" classify; "nyu-linear",
            "nyu-linear4", "nyu-dpt" and the same with "kitti" estimate depth. The 4 stands for tokens of four blocks.
        weights: a local file instead of the download and the cache: `.pth`, `.safetensors`, `.onnx`, a Hugging Face
            folder, or a folder written by `dinojax.save`. It must have the architecture of `name`.
        head_weights: the same for the head, `.pth` or `.safetensors` under upstream's names; for DPT also a Hugging
            Face folder with DPTForDepthEstimation.
        max_depth: largest depth in metres of a depth head. None is that of the training: 10 for NYU, 80 for KITTI.
            torch.hub spreads the bins of the linear NYU heads up to 80 m, a mistake that `max_depth=80` repeats.
        cache_dir: folder of downloads and converted models; None takes `$DINOJAX_CACHE`, or else `~/.cache/dinojax`.
            `$DINOJAX_WEIGHTS_URL` names a mirror of https://dl.fbaipublicfiles.com.
        dtype: of the parameters and of the computation, such as jnp.bfloat16; None is float32.
        positions: how the position table is resized to images of another size, see `converters.huggingface.positions`:
            "hub" as in upstream's code, "huggingface" as in `transformers`. None is "hub", except that a folder written
            by `dinojax.save` states its own.

    Returns:
        The model; with a head, a `dinojax.heads.Classifier` or `DepthEstimator`. It carries its preprocessing, see
        `dinojax.preprocess`.

    Raises:
        UserError: the name is unknown, or no such head was published for it; the download fails; the file is damaged,
            holds code, has another architecture or values that are not finite; or torch is needed and missing.
    """
    name, chosen = split_name(name, head)
    variant(name)
    if chosen is None:
        given = {"head_weights": head_weights, "max_depth": max_depth}
        for setting, value in given.items():
            require(value is None, setting, value, "of any use without head=")
        model: VisionTransformer | Classifier | DepthEstimator = _positioned(_load(name, weights, cache_dir), positions)
        return model if dtype is None else model.astype(dtype)
    raise_unless_published(name, chosen)
    loaded = load_published_head(name, chosen, weights=head_weights, max_depth=max_depth, cache_dir=cache_dir)
    backbone = _positioned(_load(name, weights, cache_dir), positions)
    model = Classifier(backbone, loaded) if isinstance(loaded, ClassifierHead) else DepthEstimator(backbone, loaded)
    return model if dtype is None else model.astype(dtype)


def _load(name: str, weights: str | Path | None, cache_dir: str | Path | None) -> VisionTransformer:
    if weights is not None:
        model = read_model(weights)
        raise_unless_architecture(model, name, str(weights))
        return _normalised_as(name, Path(weights), model)
    folder = shipped_folder(name) or model_folder(name, cache_dir)
    if folder.exists():
        return _load_cached(folder, name)
    file, _, model = fetch_converted(name, cache_dir)
    store(model, folder, describe(file, name))
    file.unlink()  # the folder holds the same numbers
    return model


def _normalised_as(name: str, path: Path, model: VisionTransformer) -> VisionTransformer:
    """The model with the satellites' mean and deviation if `name` is one of theirs and no file states others."""
    if is_satellite(name) and not is_model_folder(path) and "mean" not in preprocessing_beside(path):
        model.preprocessing = dataclasses.replace(model.preprocessing, mean=SATELLITE_MEAN, std=SATELLITE_STD)
    return model


def model_folder(name: str, cache_dir: str | Path | None = None) -> Path:
    """The folder of the converted model in the cache."""
    return cache_folder(cache_dir) / "models" / name


def fetch(name: str, cache_dir: str | Path | None = None) -> Path:
    """Downloads the official file of a model, unless the cache has it.

    Raises:
        UserError: no weights were published under `name`, or the download failed.
    """
    source = SOURCES.get(name)
    if shipped_folder(name):
        raise UserError(f"{name} comes with dinojax, converted: load_pretrained({name!r}), or --weights {name}")
    if VARIANTS[name].family == "dinov3":
        raise UserError(where_to_get(name))
    if source is None:
        raise UserError(f"no weights were published for {name}; published are {', '.join(SOURCES)}")
    import_torch()  # before minutes of download, not after
    return fetch_source(
        name,
        source,
        cache_dir,
        flags="weights=FILE, --weights FILE",
        otherwise="; dinojax_vitt comes with the package and needs no network (--weights dinojax_vitt)",
    )


def fetch_converted(
    name: str, cache_dir: str | Path | None = None
) -> tuple[Path, Mapping[str, Any], VisionTransformer]:
    """The official file of a model, its tensors as stored, and the converted model.

    Raises:
        UserError: the download fails, or the file cannot be used; a bad file is removed.
    """
    file = fetch(name, cache_dir)
    try:
        state_dict = read_state_dict(file)
        model = convert(state_dict, str(file))
        raise_unless_architecture(model, name, str(file))
    except UserError:
        file.unlink()  # or every later call would meet the same bad file
        raise
    return file, state_dict, model


def read_model(
    path: str | Path,
    *,
    num_heads: int | None = None,
    which: str = "teacher",
    positions: Positions | None = None,
    say: Callable[[str], object] | None = None,
) -> VisionTransformer:
    """Reads a model from a PyTorch or ONNX file, a Hugging Face folder, or a folder written by `dinojax.save`.

    Args:
        path: of the file or folder.
        num_heads: number of attention heads; None takes it from the `config.json` beside the weights, or else one head
            per 64 channels.
        which: the network to take from a training checkpoint.
        positions: how the position table is resized to images of another size, as for `load_pretrained`.
        say: gets a sentence for each choice that was made: which of several networks was taken, that a classifier was
            left out, how positions are resized. With None, Python warns of a classifier and is silent on the others.

    Raises:
        UserError: there is no such file, or it cannot be used.
    """
    path = Path(path).expanduser()
    if is_model_folder(path):
        return _positioned(load(path), positions)
    tensors, model = read_file(path, num_heads=num_heads, which=which, positions=positions)
    tell_choices(path, tensors, model, which=which, positions=positions, say=say)
    return model


def read_file(
    path: Path, *, num_heads: int | None = None, which: str = "teacher", positions: Positions | None = None
) -> tuple[Mapping[str, Any], VisionTransformer]:
    """The tensors of a file or a Hugging Face folder as stored, and the converted model; see `read_model`."""
    tensors, heads = _read_tensors(path, num_heads)
    known = stated_fields(path, read_settings(path))
    model = _positioned(convert(tensors, str(path), num_heads=heads, which=which, stated=known), positions)
    raise_unless_computed(path, model)
    if model.config.family == "dinov3":
        model = _normalised_as(path.name, path, model)
    stated = preprocessing_beside(path) | (described_preprocessing(path) if path.suffix == ".onnx" else {})
    model.preprocessing = dataclasses.replace(model.preprocessing, **stated)
    return tensors, model


def tell_choices(
    path: Path,
    tensors: Mapping[str, Any],
    model: VisionTransformer,
    *,
    which: str,
    positions: Positions | None,
    say: Callable[[str], object] | None,
) -> None:
    """Says what `read_model` chose; see there."""
    if classifier_of_checkpoint(tensors):
        note = f"{path}: its classifier is left out; converters.load_classifier returns the model and the classifier"
        say(note) if say else warnings.warn(note, stacklevel=4)
    if say is None:
        return
    if model.config.family == "dinov3":
        say(f"{path}: {TERMS}")
        if is_satellite(path.name) and model.preprocessing.mean == SATELLITE_MEAN:
            say(f"{path}: images are normalised with the satellites' mean {SATELLITE_MEAN} and std {SATELLITE_STD}")
    if network := left_out(tensors, which):
        say(f"{path}: {network}")
    difference = difference_from_transformers(model.config)
    if positions is None and difference and has_hugging_face_names(tensors):
        say(f'{path}: {difference}; --positions huggingface, in Python positions="huggingface", does as transformers')


def _read_tensors(path: Path, num_heads: int | None) -> tuple[Mapping[str, Any], int | None]:
    """The tensors of a file or folder, and the number of attention heads as far as it is known.

    Hugging Face's DINOv2 may come without a mask token, which only masked images need: then it becomes zero.
    """
    heads = num_heads or num_heads_beside(path)
    if path.suffix != ".onnx":
        tensors = read_state_dict(path)
        return (with_mask_token(tensors) if read_settings(path).get("use_mask_token") is False else tensors), heads
    from converters.weight_files.onnx_files import read_onnx

    tensors, in_graph = read_onnx(path)
    if heads and in_graph and heads != in_graph:
        raise UserError(
            f"{path} computes with {in_graph} attention heads, not with {heads} as --num-heads or config.json say"
        )
    return with_mask_token(tensors), in_graph or heads


def _positioned(model: VisionTransformer, positions: Positions | None) -> VisionTransformer:
    if positions is not None:
        model.config = with_positions(model.config, positions)
    return model


def convert(
    state_dict: Mapping[str, Any],
    label: str,
    *,
    num_heads: int | None = None,
    which: str = "teacher",
    stated: Mapping[str, Any] | None = None,
) -> VisionTransformer:
    """`from_torch` with `label` in its errors; it also refuses values that are not finite."""
    try:
        model = from_torch(state_dict, num_heads=num_heads, which=which, stated=stated)
    except (ValueError, MemoryError, OverflowError) as error:  # a UserError, or shapes that do not make a configuration
        raise UserError(f"{label}: {_shortened(str(error))}") from error
    for name, array in named_parameters(model).items():
        if not np.isfinite(array).all():
            raise UserError(f"{label} holds values that are not finite in {name}; the file is damaged or diverged")
    return model


def store(model: VisionTransformer, folder: Path, source: Mapping[str, Any]) -> None:
    """`dinojax.save`, after checking that the disk has room."""
    raise_unless_room(folder, sum(array.nbytes for array in named_parameters(model).values()))
    save(model, folder, source=source)


def describe(file: Path, name: str | None = None, *, of_dinov3: bool = False) -> dict[str, Any]:
    """The origin of converted weights, which is stored with them."""
    source = SOURCES.get(name) if name else None
    description: dict[str, Any] = {"file": file.name}
    if file.is_file():
        description |= {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
    if of_dinov3:
        description |= {"license": LICENSE}
    if source:
        description |= {"name": name, "url": source.url, "license": source.license}
    return description


def variant(name: str) -> ViTConfig:
    """The architecture of the model `name`.

    Raises:
        UserError: an unknown name; the message suggests others.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    if "/" in name or os.sep in name or Path(name).suffix or Path(name).exists():
        raise UserError(
            f"{name} looks like a file: pass it as weights= together with the name of its model, such as dinov2_vits14"
        )
    close = difflib.get_close_matches(name, VARIANTS, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UserError(f"no model is called {name!r}: {hint}There are {', '.join(VARIANTS)}")


def _load_cached(folder: Path, name: str) -> VisionTransformer:
    try:
        model = load(folder)
        raise_unless_architecture(model, name, str(folder))
    except UserError as error:
        raise UserError(f"{error}; delete {folder} and run the same command again") from error
    return model


def raise_unless_architecture(model: VisionTransformer, name: str, label: str) -> None:
    """Refuses a model whose architecture is not that of `name`.

    Drop path belongs to the training, and resizing of positions is a choice, so they may differ; DINOv3 has no size.
    """
    free = ["drop_path_rate", "drop_path_uniform", "interpolate_antialias", "interpolate_offset", "rope_periods"]
    free += ["img_size"] if model.config.family == "dinov3" else []
    given, wanted = (dataclasses.asdict(config) for config in (model.config, VARIANTS[name]))
    differing = [key for key in wanted if key not in free and given[key] != wanted[key]]
    if not differing:
        return
    shown = ", ".join(f"{key} {given[key]} instead of {wanted[key]}" for key in differing[:_SHOWN_DIFFERENCES])
    more = f" and {len(differing) - _SHOWN_DIFFERENCES} more" if len(differing) > _SHOWN_DIFFERENCES else ""
    same = [other for other, config in VARIANTS.items() if all(given[k] == v for k, v in vars(config).items())]
    hint = f"; it has the architecture of {same[0]}" if same else ""
    raise UserError(f"{label} is not a {name}: {shown}{more}{hint}")


def _shortened(message: str) -> str:
    """The message with only the first few of the differences that `from_torch` names."""
    parts = message.split("; ")
    if len(parts) <= _SHOWN_DIFFERENCES:
        return message
    return f"{'; '.join(parts[:_SHOWN_DIFFERENCES])}; and {len(parts) - _SHOWN_DIFFERENCES} more"
