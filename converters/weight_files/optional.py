"""Packages that only some files need, or a sentence that says how to get them."""

from typing import Any

from dinojax.errors import UserError


def import_torch() -> Any:
    """The torch module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError("PyTorch's weight files need torch: pip install 'dinojax[torch]'") from error
    return torch


def import_onnx() -> Any:
    """The onnx module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError("ONNX files need the package onnx: pip install 'dinojax[onnx]'") from error
    return onnx
