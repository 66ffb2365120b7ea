"""Arrays on disk in numbered shards, which are written whole or not at all, and checked when they are read."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
from numpy.typing import DTypeLike
from safetensors.numpy import save

from dinojax.documents import sha256_of_array, write_whole
from dinojax.errors import UserError

_NAME = "features"
META_FILE = "meta.json"


@dataclasses.dataclass(frozen=True)
class ShardCache:
    """A folder with the shards of one array; `meta.json` beside them holds the `description`."""

    folder: Path
    description: Mapping[str, object]
    dtype: DTypeLike = np.float32

    def read(self, shard: int, shape: tuple[int, ...]) -> np.ndarray | None:
        """The shard, or None if it is missing, damaged, or of another type or shape."""
        path = self._path(shard)
        try:
            with safetensors.safe_open(path, "numpy") as file:
                array, sha256 = file.get_tensor(_NAME), file.metadata()["sha256"]
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None
        if array.dtype != self.dtype or array.shape != shape:
            return None
        # Releases before 0.2 left type and shape out of the hash; both are checked above.
        return array if sha256 in (sha256_of_array(array), hashlib.sha256(array.data).hexdigest()) else None

    def write(self, shard: int, array: np.ndarray) -> None:
        """Adds or replaces a shard.

        Raises:
            UserError: the folder cannot be written, or the disk is full; no partial file remains.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / META_FILE).exists():
                write_whole(self.folder / META_FILE, (json.dumps(self.description, indent=2) + "\n").encode())
            write_whole(self._path(shard), save({_NAME: array}, metadata={"sha256": sha256_of_array(array)}))
        except OSError as error:
            raise UserError(
                f"cannot cache features in {self.folder} ({error.strerror}); free some space, or pass --cache-dir"
            ) from error

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05}.safetensors"
