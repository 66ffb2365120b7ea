"""Embeds photos: a table with one row an image, in a file that Python, pandas, Polars and DuckDB read.

    python -m experiments.embed path/to/photos --out features.parquet
    python -m experiments.embed trips/2023 trips/2024 cover.jpg --weights dinov2_vitb14 --out trips.npz
    python -m experiments.embed photos --layers 4 --patches --out features.safetensors
    python -m experiments.embed photos --dense --image-size 448 --out maps.parquet

Folders are searched at any depth; labels are not needed. A row holds the path of the image inside the folder, its
height and width, and the class token (CLS) of the last block after the final norm. Rows are sorted by path. Files that
cannot be read are listed and skipped.

To read a table, with pyarrow or with dinojax:

    table = pyarrow.parquet.read_table("features.parquet")
    paths, cls = table["path"].to_pylist(), numpy.stack(table["cls"].to_numpy())

    from experiments.embedding.table import read_table
    table = read_table("features.parquet")  # table.paths, table.sizes, table.arrays["cls"], table.meta

The suffix of --out names the format: .parquet, .npz or .safetensors. A command that was interrupted resumes when it is
repeated. What is computed is kept in the cache: after photos are added to a folder, only their part is computed.
"""

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from experiments.features.backbones import is_random, load_backbone
from experiments.runs.command_line import command_line
from experiments.runs.settings import (
    POSITIVE,
    UNIMPORTANT,
    BackboneSettings,
    Flags,
    RunSettings,
    check_bounds,
)

if TYPE_CHECKING:
    from experiments.embedding.images import Images
    from experiments.embedding.pipeline import Plan

_PRINTED = 20  # unreadable files


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """The images."""

    images: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER…", help_behavior_hint="(one or more)")
    ]
    """Folders of images, or image files (JPEG, PNG, WebP and others)."""


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """What a row holds besides path, size and the CLS of the last block."""

    layers: Annotated[int, POSITIVE] = 1
    """Number of last blocks whose CLS is written: cls is that of the last block, cls_2 of the one before, and so on."""
    patches: bool = False
    """Whether to write the mean of the patch tokens of the last block, as mean_patch."""
    dense: bool = False
    """Whether to write all patch tokens of the last block in float16, as dense. ViT-S/14 at 224 px gives 16×16×384
    numbers, 0.2 MB an image."""
    strict: bool = False
    """Whether to stop at the first file that cannot be read."""


@dataclasses.dataclass(frozen=True)
class EmbeddingModel(BackboneSettings):
    """The model, and how it computes features."""

    batch_size: Annotated[int | None, POSITIVE] = None
    """Images per forward pass. None takes as many as fit the cache of a CPU, or 128 on a GPU or TPU; fewer where
    --dense makes large maps."""


@dataclasses.dataclass(frozen=True)
class TableFile(RunSettings):
    """The files that are written to, and the random seed."""

    seed: int = 0
    """Random seed of random weights."""

    out: Annotated[Path, UNIMPORTANT, tyro.conf.arg(metavar="FILE")] = dataclasses.field()
    """File of the table, which ends with .parquet, .npz or .safetensors; .parquet is added to a name without a suffix.
    A table of that name is replaced."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A table of embeddings."""

    files: Flags[ImageFiles]
    run: Flags[TableFile]
    rows: Flags[RowSettings] = RowSettings()
    model: Flags[EmbeddingModel] = EmbeddingModel()


@dataclasses.dataclass(frozen=True)
class Result:
    """What was written.

    Attributes:
        file: of the table.
        rows: number of images in it.
        dim: width of the CLS.
        skipped: path and reason of each file that could not be read.
    """

    file: Path
    rows: int
    dim: int
    skipped: dict[str, str]


def run(config: Config) -> Result:
    """Writes the table.

    Raises:
        UserError: images, weights, settings or a file that cannot be used.
    """
    out, start = _check(config), time.perf_counter()
    from experiments.embedding import images as image_files
    from experiments.embedding import pipeline

    images = image_files.find(config.files.images)
    for note in images.notes:
        print(note)
    plan, patch_size = _plan(config)
    with pipeline.work_folder(out) as work:
        if plan.dense:
            _check_room(images, plan, work)
        folder = work if plan.dense else pipeline.cache_of(plan)
        print(f"{_images(len(images))} in {images.root}", flush=True)
        embedding = pipeline.Embedding(images, plan, folder, strict=config.rows.strict)
        embedding.compute()
        meta = {"weights": config.model.weights, "patch_size": patch_size}
        layout = embedding.write(work / f"table{out.suffix}", meta)
        pipeline.move_into_place(work / f"table{out.suffix}", out)
    skipped = {images.name(row): reason for row, reason in embedding.skipped.items()}
    result = Result(out, layout.rows, plan.extractor.shape[1], skipped)
    _print(result, list(plan.written), time.perf_counter() - start)
    return result


def _check(config: Config) -> Path:
    """The file of the table."""
    from experiments.embedding.table import read_layout, table_path

    check_bounds(config)
    if not config.files.images:
        raise UserError("no images were given; name folders or image files")
    given, out = config.run.out.expanduser(), table_path(config.run.out)
    for path in (given, out):
        if path.is_dir():
            raise UserError(f"--out {path} is a folder; name a file in it, such as {path / 'features.parquet'}")
    if out.exists():
        try:
            read_layout(out)
        except UserError as error:
            raise UserError(f"--out {out} exists and is not an embedding file; name another file") from error
    return out


def _plan(config: Config) -> tuple["Plan", int]:
    """What is computed, and the patch size of the model."""
    from dinojax.parallel import make_mesh
    from experiments.embedding import pipeline
    from experiments.features.extractor import FeatureExtractor, check_image_size, seen_size

    settings, rows = config.model, config.rows
    backbone = load_backbone(settings.weights, seed=config.run.seed, cache_dir=config.run.cache_dir)
    model, size = backbone.model, settings.image_size or backbone.image_size
    check_image_size(model, size)
    if cut := seen_size(model, size):
        print(f"note: {cut}")
    if is_random(settings.weights):
        print("UNTRAINED: these weights are random; the features show what the architecture alone gives", flush=True)
    if rows.layers > model.config.depth:
        raise UserError(f"--layers {rows.layers} is more than the {model.config.depth} blocks of {settings.weights}")
    grid = (size // model.config.patch_size,) * 2
    block = pipeline.block_images(grid, model.config.embed_dim, dense=rows.dense)
    extractor = FeatureExtractor(
        model,
        normalisation=backbone.normalisation,
        image_size=size,
        dtype=settings.dtype,
        batch_size=settings.batch_size or pipeline.batch_of_blocks(model, size, block),
        cache_dir=config.run.cache_dir,
        blocks=rows.layers,
        maps=int(rows.dense),
        mesh=make_mesh(settings.mesh),
    )
    return pipeline.Plan(extractor, rows.layers, rows.patches, rows.dense, grid), model.config.patch_size


def _check_room(images: "Images", plan: "Plan", work: Path) -> None:
    """Patch maps need room for the file, and as much for the blocks until it is written."""
    needed = 2 * len(images) * sum(column.row_bytes for column in plan.computed.values())
    needed -= sum(file.stat().st_size for file in work.iterdir())
    free = shutil.disk_usage(work).free
    if needed > free:
        raise UserError(
            f"--dense needs {needed / 1e9:,.1f} GB of disk for {_images(len(images))}, and {free / 1e9:,.1f} GB are "
            "free; embed fewer images in one file, or pass a smaller --image-size"
        )


def _print(result: Result, arrays: Sequence[str], seconds: float) -> None:
    for reason in list(result.skipped.values())[:_PRINTED]:
        print(f"skipped: {reason}")
    if len(result.skipped) > _PRINTED:
        print(f"… and {len(result.skipped) - _PRINTED:,} more, which the table lists in meta['skipped']")
    size = result.file.stat().st_size
    skipped = f", {len(result.skipped):,} skipped" if result.skipped else ""
    print(
        f"{result.file}: {_images(result.rows)}{skipped}, {', '.join(arrays)} of {result.dim} numbers, "
        f"{size / 1e6:,.1f} MB, {seconds:,.1f} s"
    )


def _images(count: int) -> str:
    return f"{count:,} image{'s' if count != 1 else ''}"


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(command_line(Config, "experiments.embed", __doc__, args))


if __name__ == "__main__":
    main()
