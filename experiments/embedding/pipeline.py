"""From images to the file of a table, block by block: what was computed before an interruption is not computed again.

First every block that is not kept yet is computed and kept as a small table. Then the blocks are copied into the file,
so that two or three blocks are in memory, however many images there are. Class tokens are kept in the cache. Patch maps
are large: their blocks are kept beside the file, until it is written.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import dinojax
from dinojax.documents import flush_folder
from dinojax.embedding import default_batch
from dinojax.errors import UserError
from dinojax.models.vit import VisionTransformer
from experiments.data.splits import digest
from experiments.embedding.blocks import Block, BlockStore, cut
from experiments.embedding.images import Images, Reading, Stamps
from experiments.embedding.layout import PATHS, SIZES, Chunk, Column, Layout
from experiments.embedding.table import CLS, DENSE, MEAN_PATCH, EmbeddingTable, write_chunks
from experiments.features.extractor import FeatureExtractor, Forecast, Job
from experiments.runs.lock import RunLock

_BLOCK_IMAGES, _BLOCK_BYTES = 512, 2**26


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is computed and written.

    Attributes:
        extractor: with as many blocks as `layers`, and with maps if `dense`.
        layers: number of the last blocks whose CLS is written.
        patches: whether the mean patch is written.
        dense: whether the patch maps are written.
        grid: rows and columns of patches.
    """

    extractor: FeatureExtractor
    layers: int
    patches: bool
    dense: bool
    grid: tuple[int, int]

    @property
    def computed(self) -> dict[str, Column]:
        """The arrays of a block: the mean patch costs little, and is always kept."""
        dim = self.extractor.shape[1]
        names = [CLS, *(f"{CLS}_{number}" for number in range(2, self.layers + 1)), MEAN_PATCH]
        maps = {DENSE: Column("float16", (*self.grid, dim))} if self.dense else {}
        return {**dict.fromkeys(names, Column("float32", (dim,))), **maps}

    @property
    def written(self) -> dict[str, Column]:
        """The arrays of the file."""
        return {name: column for name, column in self.computed.items() if name != MEAN_PATCH or self.patches}


@dataclasses.dataclass(frozen=True)
class _BlockJob(Job):
    """A block that is not kept yet."""

    block: Block


def block_images(grid: tuple[int, int], dim: int, *, dense: bool) -> int:
    """About how many images make a block: a share of an hour's work that may be lost, and 64 MiB of patch maps."""
    return max(1, min(_BLOCK_IMAGES, _BLOCK_BYTES // (2 * grid[0] * grid[1] * dim))) if dense else _BLOCK_IMAGES


def batch_of_blocks(model: VisionTransformer, image_size: int, block: int) -> int:
    """Images per pass: at most a quarter of a block, whose last pass is filled up with black images."""
    return min(default_batch(model, (1, image_size, image_size, 3)), max(1, block // 4))


class Embedding:
    """The embeddings of images, computed into a folder of blocks and written from there.

    Args:
        images: one or more.
        plan: what is computed.
        folder: of the blocks.
        strict: refuse an image that cannot be read.
    """

    def __init__(self, images: Images, plan: Plan, folder: Path, *, strict: bool):
        self._images, self._plan, self._strict = images, plan, strict
        description = {**plan.extractor.description, "arrays": list(plan.computed)}
        self._store = BlockStore(folder, description)
        self._stamps = Stamps(images)
        target = block_images(plan.grid, plan.extractor.shape[1], dense=plan.dense)
        ranges = cut(images.inside, target)
        self._blocks = [Block(rows, self._stamps.fingerprint(rows)) for rows in ranges]
        # Row → reason of the files that cannot be read, in their order; filled by `compute`.
        self.skipped: dict[int, str] = {}

    def compute(self) -> None:
        """Computes the blocks that are not kept yet.

        Raises:
            UserError: no image can be read, one cannot and `strict` is set, or the features are not finite.
        """
        bar = tqdm(self._blocks, desc="looking for what is kept", leave=False, delay=1, dynamic_ncols=True)
        skipped = {block: self._store.skipped(block) for block in bar}
        missing = [block for block in self._blocks if skipped[block] is None]
        if self._strict:
            for reason in (reason for found in skipped.values() for reason in (found or {}).values()):
                raise UserError(reason)
        todo, total = sum(len(block.rows) for block in missing), len(self._images)
        if not missing:
            print(f"features: all {total:,} images from the cache", flush=True)
        else:
            with tqdm(total=total, initial=total - todo, unit="img", desc="features", dynamic_ncols=True) as bar:
                self._compute(missing, Forecast(bar, todo, "fewer images"), skipped)
        self.skipped = {row: reason for found in skipped.values() for row, reason in (found or {}).items()}
        if len(self.skipped) == total:
            raise UserError(next(iter(self.skipped.values())))

    def _compute(
        self, missing: Sequence[Block], forecast: Forecast, skipped: dict[Block, dict[int, str] | None]
    ) -> None:
        reading = Reading(self._images, strict=self._strict)
        split, extractor, columns = reading.split(), self._plan.extractor, self._plan.computed

        def job(block: Block) -> _BlockJob:
            shapes = [(extractor.shape, np.float32)]
            shapes += [(columns[DENSE].shape, np.float16)] if DENSE in columns else []
            outs = tuple(np.empty((len(block.rows), *shape), dtype) for shape, dtype in shapes)
            return _BlockJob(split, block.rows.start, block.rows.stop, outs, block)

        for done in extractor.finished(map(job, missing), forecast):
            skipped[done.block] = self._keep(done, reading)

    def _keep(self, done: _BlockJob, reading: Reading) -> dict[int, str]:
        """Writes a block without its unreadable images, whose rows are returned with the reasons."""
        rows = np.array([i for i in done.block.rows if i not in reading.errors], np.int64)
        tokens, *maps = (out[rows - done.start] for out in done.outs)
        names = list(self._plan.computed)
        # The last block's CLS is the first of the table; the extractor has it at the end.
        arrays = {name: np.ascontiguousarray(tokens[:, -2 - i]) for i, name in enumerate(names[: self._plan.layers])}
        arrays |= {MEAN_PATCH: np.ascontiguousarray(tokens[:, -1]), **dict(zip([DENSE], maps))}
        table = EmbeddingTable("", tuple(self._images.name(int(i)) for i in rows), reading.sizes[rows], arrays, {})
        skipped = {i: reading.errors[i] for i in done.block.rows if i in reading.errors}
        self._store.write(done.block, table, skipped)
        return skipped

    def write(self, path: Path, meta: Mapping[str, Any]) -> Layout:
        """Writes the table, whole or not at all; `meta` is completed by what the images and the plan tell.

        Raises:
            UserError: the file cannot be written.
        """
        extractor = self._plan.extractor
        readable = [i for i in range(len(self._images)) if i not in self.skipped]
        meta = {
            **meta,
            "weights_fingerprint": extractor.fingerprint,
            "image_size": extractor.image_size,
            "normalisation": extractor.description["mean_and_deviation"],
            "dtype": extractor.dtype.name,
            "resize": extractor.description["resize"],
            "grid": list(self._plan.grid),
            "dinojax": dinojax.__version__,
            "images": self._stamps.identity(readable),
            "skipped": [self._images.name(i) for i in self.skipped],
        }
        layout = Layout(
            str(self._images.root), len(readable), {SIZES: Column("int32", (2,)), **self._plan.written}, meta
        )
        write_chunks(path, layout, self._chunks)
        return layout

    def _chunks(self, names: Sequence[str]) -> Iterator[Chunk]:
        """The rows of all blocks; see `layout.Chunks`."""
        arrays = [name for name in names if name not in (PATHS, SIZES)]
        for block in tqdm(self._blocks, desc="writing", unit="block", leave=False, delay=1, dynamic_ncols=True):
            table = self._store.read(block, arrays)
            columns = {PATHS: table.paths, SIZES: table.sizes, **table.arrays}
            yield {name: columns[name] for name in names}


def cache_of(plan: Plan) -> Path:
    """The folder of blocks in the cache."""
    return plan.extractor.root / digest(f"{plan.extractor.description} {list(plan.computed)}")[:20]


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """A locked, hidden folder beside `out`; it is removed at the end, or, after an error, if it holds no blocks.

    Raises:
        UserError: it cannot be made, or another process writes to the same file.
    """
    folder = out.with_name(f".{out.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); name another file") from error
    try:
        with RunLock(folder):
            yield folder
            shutil.rmtree(folder)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def move_into_place(written: Path, out: Path) -> None:
    """Gives a complete file its final name.

    Raises:
        UserError: that is not possible.
    """
    try:
        written.replace(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); name another file") from error
    flush_folder(out.parent)
