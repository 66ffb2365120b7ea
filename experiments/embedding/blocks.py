"""Blocks of images whose embeddings are kept as small tables: what is computed once is read from there."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dinojax.documents import write_whole
from dinojax.errors import UserError
from experiments.data.splits import digest
from experiments.embedding.table import EmbeddingTable, read_table, write_table
from experiments.features.cache import META_FILE

_SKIPPED = "skipped"


class Block(NamedTuple):
    """Consecutive images; `key` stands for their files."""

    rows: range
    key: str


def cut(names: Sequence[str], target: int) -> list[range]:
    """Consecutive images, about `target` of them together, at least half and at most twice as many.

    Whether a block ends behind an image depends on its name and on its distance from the last end. A new image thus
    changes the block that it falls into and perhaps a few after it, and all others keep their key. Blocks of a fixed
    number of images would all change after it.
    """
    least, most = max(1, target // 2), 2 * target
    blocks, start = [], 0
    for i, name in enumerate(names):
        size = i + 1 - start
        if size == most or (size >= least and int(digest(os.fsencode(name))[:8], 16) % least == 0):
            blocks.append(range(start, i + 1))
            start = i + 1
    return blocks + ([range(start, len(names))] if start < len(names) else [])


class BlockStore:
    """A folder with a table for each block, named by the key of the block.

    Args:
        folder: is made when the first block is written.
        description: what the numbers depend on besides the images; kept as `meta.json`.
    """

    def __init__(self, folder: Path, description: Mapping[str, object]):
        self._folder, self._description = folder, description
        # A folder of blocks may hold those of other settings.
        self._settings = digest(json.dumps(description, sort_keys=True))

    def path(self, block: Block) -> Path:
        """The file of a block."""
        return self._folder / f"{digest(self._settings, block.key)[:24]}.safetensors"

    def skipped(self, block: Block) -> dict[int, str] | None:
        """Row → reason of the block's images that cannot be read; None if the block is missing or damaged."""
        try:
            table = read_table(self.path(block))
        except UserError:
            return None
        return {block.rows.start + offset: reason for offset, reason in table.meta[_SKIPPED]}

    def read(self, block: Block, arrays: Sequence[str]) -> EmbeddingTable:
        """The rows of the block's readable images, with these arrays alone.

        Raises:
            UserError: the block is missing or damaged.
        """
        return read_table(self.path(block), arrays=arrays)

    def write(self, block: Block, table: EmbeddingTable, skipped: Mapping[int, str]) -> None:
        """Adds a block: its readable images, and the reasons of the others by row.

        Raises:
            UserError: the folder cannot be written, or the disk is full; no partial file remains.
        """
        remedy = "free some space, or pass another --cache-dir or --out"
        # Other folders that share the block have it at other rows.
        meta = {_SKIPPED: [(row - block.rows.start, reason) for row, reason in skipped.items()]}
        write_table(self.path(block), dataclasses.replace(table, meta=meta), remedy=remedy)
        if not (self._folder / META_FILE).exists():
            write_whole(self._folder / META_FILE, (json.dumps(self._description, indent=2) + "\n").encode())
