"""Single tensors of a checkpoint: which are read, and their values as numpy arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dinojax.errors import UserError

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_LONGEST_NAME = 512


def raise_unless_named(tensors: Mapping[Any, Any]) -> None:
    """Refuses names that are not text, or longer than those of any model."""
    for name in tensors:
        if not isinstance(name, str):
            raise UserError(f"the checkpoint names a tensor {name!r:.60} but text was expected")
        if len(name) > _LONGEST_NAME:
            raise UserError(f"a tensor's name of {len(name):,} characters is not one of a model: {name[:40]}…")


def raise_unless_readable(tensors: Mapping[str, Any]) -> None:
    """Looks at kinds and sizes; copies nothing.

    Raises:
        UserError: a value that is not a dense tensor of floating-point numbers
            with all its values in the file; or tensors that claim far more numbers than are stored.
    """
    claimed, stored = 0, {}
    for name, tensor in tensors.items():
        if _is_torch(tensor):
            _raise_unless_dense(name, tensor)
        elif not isinstance(tensor, np.ndarray):
            raise UserError(f"{name} is of type {type(tensor).__name__} but a tensor was expected")
        dtype = tensor.dtype.name if isinstance(tensor, np.ndarray) else str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise UserError(f"{name} holds {dtype} but floating-point numbers were expected ({', '.join(_DTYPES)})")
        if _is_torch(tensor):
            storage, needed = tensor.untyped_storage(), tensor.numel() * tensor.element_size()
            if needed > storage.nbytes():
                raise UserError(
                    f"{name} claims {needed:,} bytes {tuple(tensor.shape)} of which {storage.nbytes():,} are stored; "
                    "save a contiguous copy"
                )
            claimed += needed
            stored[storage.data_ptr()] = storage.nbytes()
    if claimed > 2 * sum(stored.values()):
        raise UserError(f"the tensors claim {claimed:,} bytes of which {sum(stored.values()):,} are stored")


def to_numpy(name: str, tensor: Any) -> np.ndarray:
    """A float32 or float64 array of what `raise_unless_readable` admits; half precision is widened."""
    if _is_torch(tensor):  # bfloat16 has no numpy counterpart
        try:
            tensor = tensor.detach().cpu()
            tensor = (tensor.float() if tensor.element_size() < 4 else tensor).numpy()
        except (RuntimeError, TypeError) as error:
            raise UserError(f"{name} cannot be read as an array ({str(error).splitlines()[0]})") from error
    return tensor if tensor.dtype == np.float64 else tensor.astype(np.float32, copy=False)


def _is_torch(tensor: Any) -> bool:
    return hasattr(tensor, "detach") and hasattr(tensor, "untyped_storage")


def _raise_unless_dense(name: str, tensor: Any) -> None:
    kinds = {
        "quantised": tensor.is_quantized,
        "nested": tensor.is_nested,
        "sparse": str(tensor.layout) != "torch.strided",
        "a meta tensor, without values": tensor.is_meta,
    }
    found = next((kind for kind, holds in kinds.items() if holds), None)
    if found:
        raise UserError(f"{name} is {found}; save it as a dense floating-point tensor")
