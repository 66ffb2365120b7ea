"""Reads weight files into state dicts, without running code that a file may hold."""

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors

from dinojax.errors import UserError

_SAFETENSORS = "model.safetensors"
_SHARD_INDEX = "model.safetensors.index.json"
_TORCH = "pytorch_model.bin"
# Errors of torch's reader on damaged files, besides those that it raises on purpose.
_UNREADABLE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
)


def read_state_dict(path: str | Path) -> Mapping[str, Any]:
    """Reads the tensors in a file, or in a folder as Hugging Face lays them out.

    Args:
        path: `.safetensors`; any other file is read by `torch.load(weights_only=True)`, which also admits the
            `argparse.Namespace` in DINO's training checkpoints; a folder with `model.safetensors` (or its shards) or
            `pytorch_model.bin`.

    Returns:
        Name → array (safetensors) or torch tensor, nested as in the file.

    Raises:
        UserError: there is no such file; it is damaged, holds code or has no named tensors; or torch is missing.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a .pth or .safetensors file, or a folder with one")
    _raise_if_text(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def num_heads_beside(path: str | Path) -> int | None:
    """The number of attention heads in the Hugging Face `config.json` in or next to `path`, or None."""
    path = Path(path).expanduser()
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        document = json.loads(config.read_text())
    except (OSError, ValueError):
        return None
    num_heads = document.get("num_attention_heads") if isinstance(document, dict) else None
    return num_heads if isinstance(num_heads, int) and num_heads > 0 else None


def _read_folder(folder: Path) -> Mapping[str, Any]:
    if (folder / _SAFETENSORS).is_file():
        return read_state_dict(folder / _SAFETENSORS)
    if (folder / _SHARD_INDEX).is_file():
        try:
            shards = sorted(set(json.loads((folder / _SHARD_INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{folder / _SHARD_INDEX} is not an index of shards ({error})") from error
        # Only file names, so that an index cannot lead outside its folder.
        return {k: v for shard in shards for k, v in read_state_dict(folder / Path(shard).name).items()}
    if (folder / _TORCH).is_file():
        return read_state_dict(folder / _TORCH)
    raise UserError(f"{folder} holds no weights: {_SAFETENSORS} or {_TORCH} was expected in it")


def _raise_if_text(path: Path) -> None:
    """Refuses files that are often saved by mistake instead of weights."""
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if not start:
        raise UserError(f"{path} is empty; download it again")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path} is a web page, not weights; download the file itself")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not weights; run `git lfs pull` in its repository")


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        # numpy has no bfloat16; the flax reader has it, and needs no torch.
        with safetensors.safe_open(path, "flax") as file:
            return {name: file.get_tensor(name).__array__() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}); download it again") from error


def _read_torch(path: Path) -> Mapping[str, Any]:
    torch = import_torch()
    is_zip = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            for notice in (
                "'torch.load' received a zip file that looks like a TorchScript",
                "Detected pickle protocol",
            ):
                warnings.filterwarnings("ignore", notice)  # the error that follows is clearer
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if named := re.search(r"(?:GLOBAL|global) `?([\w.]+)", str(error)):
            raise UserError(
                f"{path} holds code ({named[1]}) and is refused; only tensors are read, so save its state dict alone"
            ) from None
        raise UserError(f"{path} is not a PyTorch weight file; download it again") from None
    except _UNREADABLE as error:
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript program and is refused; save its state dict alone") from None
        raise UserError(f"{path} is damaged or cut off; download it again") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__} but a dictionary of named tensors was expected")
    return content


def import_torch() -> Any:
    """The torch module, or a `UserError` that says how to get it."""
    try:
        import torch
    except ImportError as error:
        raise UserError("PyTorch's weight files need torch: pip install 'dinojax[torch]'") from error
    return torch
