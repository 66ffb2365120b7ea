"""Outputs of the official code, as stored in `tests/reference` (provenance in its README) or another folder."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dinojax import ViTConfig
from tests.support.dinov3_settings import dinov3_config

BUNDLED = Path(__file__).parents[1] / "reference"
FOLDER = Path(os.environ.get("DINOJAX_REFERENCE_DIR", BUNDLED))


@dataclasses.dataclass(frozen=True)
class Reference:
    """One file: its settings, and its arrays under slash-separated names."""

    name: str
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays under `prefix/`, with the prefix removed."""
        return {k.removeprefix(f"{prefix}/"): v for k, v in self.arrays.items() if k.startswith(f"{prefix}/")}

    def images(self, input_name: str) -> np.ndarray:
        """The images of an input in float64, NHWC."""
        return self.arrays[f"in/{input_name}_int8"].transpose(0, 2, 3, 1) / 32.0

    def vit_config(self) -> ViTConfig:
        """The backbone's settings as ours."""
        settings = dict(self.config["model"])
        if "pos_embed" not in self.group("state"):
            return dinov3_config(settings, self.arrays.get("state/rope_embed.periods"))
        settings.pop("block_chunks", None)  # a matter of names alone
        if isinstance(settings["img_size"], list):  # DINO takes a list and reads its first entry
            settings["img_size"] = settings["img_size"][0]
        return ViTConfig(**settings)


def read(name: str, folder: Path = FOLDER) -> Reference:
    """Reads one file of the folder by its stem."""
    with np.load(folder / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return Reference(name, json.loads(str(arrays.pop("meta/config_json"))), arrays)


def names(pattern: str) -> list[str]:
    """The stems of the files that match, in order."""
    return sorted(path.stem for path in FOLDER.glob(f"{pattern}.npz"))


def inputs(name: str) -> Iterator[str]:
    """The outputs' groups of a backbone file: every input, masked ones as `<input>_masked`."""
    with np.load(FOLDER / f"{name}.npz") as file:
        yield from sorted({key.split("/")[1] for key in file.files if key.startswith("out/")})
