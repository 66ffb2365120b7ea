"""The published heads: which there are, what their files hold, and their import.

Source: facebookresearch/dinov2 b8931f7 `dinov2/hub/classifiers.py`, `dinov2/hub/depthers.py`; facebookresearch/dino
7c446df `eval_linear.py`, `utils.load_pretrained_linear_weights`.
"""

import difflib
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from converters.cache import cache_folder
from converters.huggingface.names import dpt_from_hugging_face
from converters.layouts import unwrapped
from converters.published import fetch_source
from converters.sources import DEPTH_HEADS, HEAD_SOURCES, IMAGENET_HEADS
from converters.torch_to_flax import fill, official_shapes
from converters.weight_files.optional import import_torch
from converters.weight_files.state_dicts import read_state_dict
from converters.weight_files.tensors import raise_unless_named, raise_unless_readable, to_numpy
from dinojax.documents import sha256_of_file
from dinojax.errors import UserError, require
from dinojax.heads.classifier import ClassifierConfig
from dinojax.heads.dpt import DPTConfig
from dinojax.heads.files import Head, HeadConfig, abstract_head, load_head, save_head
from dinojax.heads.imagenet import imagenet_classes
from dinojax.heads.linear_depth import LinearDepthConfig
from dinojax.models.files import named_parameters
from dinojax.models.variants import VARIANTS

ImagenetHead = Literal["imagenet-linear", "imagenet-linear4"]
DepthHead = Literal["nyu-linear", "nyu-linear4", "nyu-dpt", "kitti-linear", "kitti-linear4", "kitti-dpt"]
CLASSIFIERS: Mapping[str, str] = MappingProxyType(
    {f"{name}_lc": name for name, head in HEAD_SOURCES if head == "imagenet-linear4"}
)
"""torch.hub's names of whole classifiers → their backbones; torch.hub takes the head on four blocks."""

# Blocks whose tokens the dense heads take, by the depth of the backbone.
_DENSE_BLOCKS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}
# Of DINO's classifiers: number of blocks whose class tokens are joined, and whether the mean patch is.
_DINO_TOKENS = {"dino_vits16": (4, False), "dino_vits8": (4, False), "dino_vitb16": (1, True), "dino_vitb8": (1, True)}
_MOST_METRES = {"nyu": 10.0, "kitti": 80.0}
_PREFIX = "decode_head."
_DINO_PREFIXES = ("module.", "linear.")


def split_name(name: str, head: str | None) -> tuple[str, str | None]:
    """The names of backbone and head; torch.hub's `dinov2_vits14_lc` stands for both.

    Raises:
        UserError: `name` stands for another head.
    """
    if name in CLASSIFIERS:
        if head not in (None, *IMAGENET_HEADS):
            raise UserError(f"{name} is a classifier; head={head!r} goes with its backbone, {CLASSIFIERS[name]!r}")
        return CLASSIFIERS[name], head or "imagenet-linear4"
    return name, head


def raise_unless_published(name: str, head: str) -> None:
    """Refuses a head that was not published, or not for this backbone.

    Raises:
        UserError: says which heads there are.
    """
    known = (*IMAGENET_HEADS, *DEPTH_HEADS)
    if head not in known:
        close = difflib.get_close_matches(head, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"no head is called {head!r}: {hint}There are {', '.join(known)}")
    if (name, head) in HEAD_SOURCES:
        return
    there = [other for backbone, other in HEAD_SOURCES if backbone == name]
    if head in DEPTH_HEADS and name.endswith("_reg"):
        plain = name.removesuffix("_reg")
        raise UserError(f"no depth heads were published for models with registers; {head} is for {plain}, not {name}")
    raise UserError(f"no head {head!r} was published for {name}; published are {', '.join(there) or 'none'}")


def head_config(name: str, head: str, *, max_depth: float | None = None) -> HeadConfig:
    """The configuration of a published head.

    Args:
        name: of the backbone.
        head: of the head.
        max_depth: largest depth in metres, for depth heads; None is that of the data it was trained on.

    Raises:
        UserError: a depth that is not positive, or one for a classifier.
    """
    backbone = VARIANTS[name]
    dim, (data, kind) = backbone.embed_dim, head.split("-")
    if data == "imagenet":
        require(max_depth is None, "max_depth", max_depth, f"for {head}, which gives no depth")
        blocks, mean_patch = _DINO_TOKENS.get(name, (4 if kind == "linear4" else 1, True))
        return ClassifierConfig(dim, imagenet_classes(), blocks=blocks, mean_patch=mean_patch)
    metres = _MOST_METRES[data] if max_depth is None else float(max_depth)
    dense = _DENSE_BLOCKS[backbone.depth]
    if kind == "dpt":
        return DPTConfig(dim, dense, max_depth=metres)
    return LinearDepthConfig(dim, dense if kind == "linear4" else (backbone.depth - 1,), max_depth=metres)


def file_layout(name: str, head: str) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors in the published file of a head, without the dictionaries around them."""
    prefix = _PREFIX if head in DEPTH_HEADS else "".join(_DINO_PREFIXES) if name.startswith("dino_") else ""
    shapes = official_shapes(abstract_head(head_config(name, head)))
    return {f"{prefix}{tensor}": shape for tensor, shape in shapes.items()}


def load_published_head(
    name: str,
    head: str,
    *,
    weights: str | Path | None = None,
    max_depth: float | None = None,
    cache_dir: str | Path | None = None,
) -> Head:
    """A published head, from the cache, from the official download or from a local file.

    Args:
        name: of its backbone.
        head: of the head, which was published for it.
        weights: a local file instead of the download and the cache: `.pth` or `.safetensors` under the official names;
            for DPT also a folder with DPTForDepthEstimation of `transformers`.
        max_depth: as for `load_pretrained`.
        cache_dir: as for `load_pretrained`.

    Raises:
        UserError: the download fails, or the file cannot be used.
    """
    config = head_config(name, head, max_depth=max_depth)
    if weights is not None:
        return read_head(Path(weights).expanduser(), config, alternating=name.startswith("dino_vitb"))
    folder = cache_folder(cache_dir) / "heads" / f"{name}-{head}"
    if not folder.exists():
        _fetch_head(name, head, folder, cache_dir)
    try:
        loaded = load_head(folder)
        fits = type(loaded.config) is type(config) and official_shapes(loaded) == official_shapes(abstract_head(config))
        require(fits, "the head", type(loaded).__name__, f"{head} of {name}")
    except UserError as error:
        raise UserError(f"{error}; delete {folder} and run the same command again") from error
    loaded.config = config  # the depths are chosen by each call
    return loaded


def _fetch_head(name: str, head: str, folder: Path, cache_dir: str | Path | None) -> None:
    """Downloads and converts a head, and stores it in `folder`."""
    source = HEAD_SOURCES[name, head]
    import_torch()  # before the download, not after
    file = fetch_source(f"{head} of {name}", source, cache_dir, flags="head_weights=FILE, --head-weights FILE")
    try:
        loaded = read_head(file, head_config(name, head), alternating=name.startswith("dino_vitb"))
        description = {"name": name, "head": head, "url": source.url, "license": source.license, "file": file.name}
        save_head(loaded, folder, source=description | {"sha256": sha256_of_file(file)})
    finally:
        file.unlink()  # converted; or bad, and every later call would meet it


def read_head(path: Path, config: HeadConfig, *, alternating: bool = False) -> Head:
    """A head from a file under the official names, or from one of `transformers`.

    Args:
        path: of the file.
        config: of the head that it must be.
        alternating: whether the inputs of a classifier are one of the class token and one of the mean patch by turns,
            as in DINO's for ViT-B: upstream stacks the two tokens before it flattens them.

    Raises:
        UserError: there is no such file; it is damaged; or tensors are missing, extra, misshapen or not finite.
    """
    state = official_names(read_state_dict(path), str(path))
    try:
        head = fill(abstract_head(config), state)
        if alternating:
            head = fill(head, state | {"weight": _alternating(state["weight"])})
    except UserError as error:
        raise UserError(f"{path} is not this head: {error}") from error
    for name, array in named_parameters(head).items():
        if not np.isfinite(array).all():
            raise UserError(f"{path} holds values that are not finite in {name}; the file is damaged or diverged")
    return head


def official_names(checkpoint: Mapping[str, Any], label: str) -> dict[str, np.ndarray]:
    """The tensors of a head under upstream's names, without the prefixes of the modules around it.

    Args:
        checkpoint: of upstream, or of DPTForDepthEstimation in `transformers`.
        label: of the file, for a warning where it holds a backbone too.
    """
    tensors = dict(unwrapped(checkpoint))
    raise_unless_named(tensors)
    is_whole = any(name.startswith((_PREFIX, "neck.")) for name in tensors)
    inside = {name: tensor for name, tensor in tensors.items() if not (is_whole and name.startswith("backbone."))}
    if len(inside) < len(tensors):
        warnings.warn(f"{label}: the backbone beside the head is left out", stacklevel=2)
    if any(name.startswith("neck.") for name in inside):
        inside = dpt_from_hugging_face(inside)
    for prefix in (_PREFIX, *_DINO_PREFIXES):
        if inside and all(name.startswith(prefix) for name in inside):
            inside = {name.removeprefix(prefix): tensor for name, tensor in inside.items()}
    raise_unless_readable(inside)
    return {name: to_numpy(name, tensor) for name, tensor in inside.items()}


def _alternating(kernel: np.ndarray) -> np.ndarray:
    """Columns of the class token and of the mean patch by turns → first those of the one, then those of the other."""
    return np.concatenate([kernel[:, 0::2], kernel[:, 1::2]], axis=1)
