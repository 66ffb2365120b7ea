"""Reads weight files into state dicts, without running code that a file may hold."""

import json
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors

from converters.weight_files.harmless import HARMLESS
from converters.weight_files.optional import import_torch
from dinojax.errors import UserError

_SAFETENSORS = "model.safetensors"
_SHARD_INDEX = "model.safetensors.index.json"
_TORCH = "pytorch_model.bin"
# Errors of the readers on damaged files, besides those that they raise on purpose.
_UNREADABLE = (
    safetensors.SafetensorError,
    RuntimeError,
    MemoryError,
    OverflowError,
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
        path: `.safetensors`; any other file is read by `torch.load(weights_only=True)`, which also admits what
            training checkpoints hold besides tensors (`converters.weight_files.harmless`); a folder with
            `model.safetensors` (or its shards) or `pytorch_model.bin`.

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


def _read_folder(folder: Path) -> Mapping[str, Any]:
    if (folder / _SAFETENSORS).is_file():
        return read_state_dict(folder / _SAFETENSORS)
    if (folder / _SHARD_INDEX).is_file():
        try:
            named = json.loads((folder / _SHARD_INDEX).read_bytes())["weight_map"].values()
            # Only file names, so that an index cannot lead outside its folder.
            shards = sorted({Path(shard).name for shard in named})
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{folder / _SHARD_INDEX} is not an index of shards ({error})") from error
        if not all(shards):
            raise UserError(f"{folder / _SHARD_INDEX} names a shard without a name; download it again")
        return {k: v for shard in shards for k, v in _read_shard(folder / shard).items()}
    if (folder / _TORCH).is_file():
        return read_state_dict(folder / _TORCH)
    raise UserError(f"{folder} holds no weights: {_SAFETENSORS} or {_TORCH} was expected in it")


def _read_shard(file: Path) -> Mapping[str, Any]:
    if file.is_dir():
        raise UserError(f"{file} is a folder, but an index of shards names it as a file")
    return read_state_dict(file)


def _raise_if_text(path: Path) -> None:
    """Refuses files that are often saved by mistake instead of weights."""
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
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
    except _UNREADABLE as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}); download it again") from error


def _read_torch(path: Path) -> Mapping[str, Any]:
    torch = import_torch()
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_archive(path)
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
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


def _check_archive(path: Path) -> None:
    """Compares the zip's checksums, which torch does not, once it is clear that no entry unpacks to more than is there.

    Raises:
        UserError: the archive is damaged, or its entries are larger than the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise UserError(
                    f"{path} is an archive that unpacks to more than its size, which torch.save never makes"
                )
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, *_UNREADABLE) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged or cut off; download it again") from error
    if broken is not None:
        raise UserError(f"{path} is damaged (the CRC-32 of {broken} is not the stored one); download it again")
