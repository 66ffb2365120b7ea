"""What training checkpoints hold besides tensors and runs no code: settings, paths, numpy numbers.

Paths and numbers are built by the classes below, not by those that the file names.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np


class Dtype:
    """Stands for `numpy.dtype` of a number: its code, such as "f8", and its byte order."""

    def __init__(self, code: str, *_: object):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = "=" if state[1] == "|" else state[1]


def number(dtype: Dtype, data: bytes) -> np.generic:
    """Stands for numpy's constructor of scalars; its own reads objects too."""
    kind = np.dtype(f"{dtype.order}{dtype.code}")
    if kind.kind not in "biufc":
        raise ValueError(f"a numpy scalar of {dtype.code}")
    return np.frombuffer(data, kind, count=1)[0]


HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    Dtype,  # lets torch set its state
    (Dtype, "numpy.dtype"),
    *[(number, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")],
    *[
        (getattr(pathlib, f"Pure{kind}Path"), f"{module}.{pure}{kind}Path")
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for kind in ("Posix", "Windows")
    ],
]
"""For `torch.serialization.safe_globals`: classes, or pairs of a class and the name it has in files."""
