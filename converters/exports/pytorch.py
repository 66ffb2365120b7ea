"""dinojax models → weight files for PyTorch, under the official names."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save_file

from converters.weight_files.optional import import_torch
from dinojax.errors import UserError

SUFFIXES = (".pth", ".safetensors")


def export(state: Mapping[str, np.ndarray], file: Path) -> None:
    """Writes a state dict, whole or not at all.

    Args:
        state: the result of `to_torch`.
        file: a new file; the suffix .pth gives a file for `torch.load`, .safetensors one for safetensors.

    Raises:
        UserError: another suffix, the file exists or cannot be written, or a .pth file needs torch, which is missing.
    """
    raise_unless_new(file)
    torch = import_torch() if file.suffix == ".pth" else None
    arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
            partial = Path(folder, file.name)
            if torch:
                torch.save({name: torch.tensor(array) for name, array in arrays.items()}, partial)
            else:
                save_file(arrays, partial, metadata={"format": "pt"})
            partial.rename(file)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} could not be written ({error}); make room or name another file") from error


def raise_unless_new(file: Path) -> None:
    """Refuses a file that exists or has another suffix, before anything is read or computed."""
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file} ends in neither {' nor '.join(SUFFIXES)}, which weight files for PyTorch do")
    if file.exists():
        raise UserError(f"{file} exists; remove it or name another file with --out")
