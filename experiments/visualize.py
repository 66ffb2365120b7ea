"""What a model sees in images: its attention, masks from its attention, a PCA and the similarity of its patches.

    python -m experiments.visualize dinov2_vits14_reg photo.jpg path/to/images --image-size 518
    python -m experiments.visualize runs/dino_cifar100/20250101-120000 cat.png --network student
    python -m experiments.visualize dino_vits8 cat.png --image-size 480 --mass 0.6 --point 240 180

The output folder gets three figures of each image. NAME_attention.png is the attention of the class token to each patch
in the last block, for every head. NAME_mask.png shows the patches above --threshold, and the patches that hold the
share --mass of the attention. NAME_similarity.png shows the similarity of every patch to the one at --point, or to the
one you --click on. pca.png, for all images together, shows the first three principal components of their patches as
red, green and blue: the same colour is the same content. sheet.png shows all of this for several images, one row each.
config.json holds the settings.

The colours of an attention map range from its 1st to its 99th percentile, which are written above it. An image of which
less than 5 % of the patches are foreground keeps all of them in pca.png.

Images may have any size and shape; --image-size resizes them. Pixels on the right and at the bottom that do not fill a
patch are cut off, with a note. A folder is searched at any depth; its files that are not readable images are named and
left out.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from jaxtyping import Bool, Float

from dinojax import maps
from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from experiments.features.backbones import is_random, load_backbone, short_name
from experiments.features.patch_maps import Mapper, Picture
from experiments.runs.command_line import command_line
from experiments.runs.settings import (
    POSITIVE,
    PROBABILITY,
    Bound,
    Flags,
    ModelSettings,
    RunSettings,
    check_bounds,
    flat,
)

if TYPE_CHECKING:
    from experiments.figures.maps import SheetRow

_KINDS = ("attention", "mask", "similarity")
_PER_PAGE = 24  # images of one pca.png
_PER_SHEET = 12  # images of one sheet.png
_PRINTED = 40  # images
_SHARE = Bound(lambda value: 0 < value <= 1, "above 0 and up to 1")
_BELOW_ONE = Bound(lambda value: 0 <= value < 1, "0 or more and below 1, which would leave no patch")


@dataclasses.dataclass(frozen=True)
class ViewerSettings(ModelSettings):
    """The model, and the size of the images that it sees."""

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_WEIGHTS")] = dataclasses.field()
    image_size: Annotated[int | None, POSITIVE] = None
    """Pixels that the shorter side of each image is resized to (bicubic, antialiased); the aspect is kept. None keeps
    the image's own size."""
    network: Literal["teacher", "student"] = "teacher"
    """Network of a run folder to use."""


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """The images."""

    images: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES…", help_behavior_hint="(one or more)")
    ]
    """Image files (JPEG, PNG, WebP and others), or folders of them."""


@dataclasses.dataclass(frozen=True)
class MapSettings:
    """The maps that are drawn."""

    threshold: Annotated[float, PROBABILITY] = 0.5
    """Least attention of a patch in the first mask, as a share of the largest attention of the head."""
    mass: Annotated[float, _SHARE] = 0.6
    """Share of a head's attention that the patches of the second mask hold."""
    point: tuple[int, int] | None = None
    """X and Y, in pixels of the resized image, of the patch that others are compared with; NAME_similarity.png numbers
    the pixels. None takes the centre."""
    click: bool = False
    """Whether to open each image in a window and take the point that is clicked on, which needs a display."""
    foreground: Annotated[float | None, _BELOW_ONE] = 0.5
    """Threshold of the first principal component, scaled to 0–1 over all images; patches that are not above it are
    black in pca.png. None keeps all patches."""
    flip_foreground: bool = False
    """Whether to take the other side of the first principal component as the foreground. By default it is the side
    that is rare along the borders."""
    save_arrays: bool = False
    """Whether to write NAME.npz for each image as well: attention, score_mask and mass_mask (first the mean of the
    heads), similarity, pca and pca_foreground, on the grid of patches."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Attention, masks, patch PCA and patch similarity of images."""

    model: Flags[ViewerSettings]
    files: Flags[ImageFiles]
    maps: Flags[MapSettings] = MapSettings()
    run: Flags[RunSettings] = RunSettings()


class Seen(NamedTuple):
    """What is drawn of an image.

    Attributes:
        picture: the image.
        point: x and y of a pixel in the patch that others are compared with.
        attention: of the class token to each patch: the mean of the heads, then each head.
        score_mask: the patches above the threshold, in each map.
        mass_mask: the patches that hold the mass, in each map.
        similarity: of the patches to the one at the point.
        pca: colours of the patches.
    """

    picture: Picture
    point: tuple[int, int]
    attention: Float[np.ndarray, "maps rows columns"]
    score_mask: Bool[np.ndarray, "maps rows columns"]
    mass_mask: Bool[np.ndarray, "maps rows columns"]
    similarity: Float[np.ndarray, "rows columns"]
    pca: maps.PcaMap

    def arrays(self) -> dict[str, np.ndarray]:
        """What NAME.npz holds."""
        found = {name: getattr(self, name) for name in ("attention", "score_mask", "mass_mask", "similarity")}
        return {**found, "pca": self.pca.rgb, "pca_foreground": self.pca.foreground}


def run(config: Config) -> list[Path]:
    """Draws everything; returns the files. Arrays are written before figures.

    Raises:
        UserError: images, weights or settings that cannot be used.
    """
    _check(config)
    from experiments.data.files import readable_images
    from experiments.runs import records

    sizes = readable_images(config.files.images)
    out = config.run.out or records.default_run_folder("visualize")
    with records.run_folder(out) as folder:
        seen, about = _look(config, sizes)
        if config.maps.save_arrays:
            for one in seen:
                np.savez_compressed(folder / f"{one.picture.name}.npz", **one.arrays())
        records.write_json(folder / records.CONFIG_FILE, flat(config))
        files = {file.name for file in folder.iterdir()}
    with records.run_folder(out) as folder:
        _draw_all(folder, seen, config.maps, about)
        files |= {file.name for file in folder.iterdir()}
    _print(out, [one.picture for one in seen], sorted(files))
    return [out / name for name in sorted(files)]


def _look(config: Config, sizes: Mapping[Path, tuple[int, int]]) -> tuple[list[Seen], str]:
    """The maps of all images, and what made them."""
    from tqdm import tqdm

    model, settings = config.model, config.maps
    cache_dir = config.run.cache_dir
    backbone = load_backbone(model.weights, network=model.network, seed=config.run.seed, cache_dir=cache_dir)
    pictures = _pictures(sizes, model.image_size, settings.point, backbone.model.config.patch_size)
    _note_cut(pictures, backbone.model.config.patch_size)
    mapper = Mapper(backbone.model, backbone.normalisation, model.dtype)
    points = [_point(picture, settings) for picture in pictures]
    mapper.prepare(max(pictures, key=lambda picture: picture.size[0] * picture.size[1]))
    found = [mapper(picture) for picture in tqdm(pictures, desc="model", unit="img", dynamic_ncols=True)]
    colours = maps.pca_maps(
        [one.features for one in found], threshold=settings.foreground, flip=settings.flip_foreground
    )
    seen = [
        Seen(
            picture,
            point,
            one.attention,
            maps.score_mask(one.attention, settings.threshold),
            maps.mass_mask(one.attention, settings.mass),
            _similarity(picture, point, one.features),
            pca,
        )
        for picture, point, one, pca in zip(pictures, points, found, colours)
    ]
    return seen, short_name(backbone.weights) + (" (UNTRAINED)" if is_random(model.weights) else "")


def _similarity(picture: Picture, point: tuple[int, int], features: np.ndarray) -> np.ndarray:
    """Of each patch to the one at the point."""
    (height, width), (rows, columns), (x, y) = picture.size, features.shape[:2], point
    return maps.patch_similarity(features, features[y * rows // height, x * columns // width])


def _check(config: Config) -> None:
    if not config.files.images:
        raise UserError("no images were given; name image files or folders after the weights")
    check_bounds(config)
    if config.maps.click and config.maps.point:
        x, y = config.maps.point
        raise UserError(f"--click and --point {x} {y} both name a point; give one")


def _pictures(
    sizes: Mapping[Path, tuple[int, int]], image_size: int | None, point: tuple[int, int] | None, patch: int
) -> list[Picture]:
    """Each image as it is shown, under a name of its own."""
    from experiments.data.files import own_names

    pictures = []
    for name, (file, (height, width)) in zip(own_names(sizes), sizes.items()):
        shorter = min(height, width)
        resized = tuple(int((image_size or shorter) * side / shorter) for side in (height, width))
        size = tuple(side // patch * patch for side in resized)
        if not min(size):
            raise UserError(
                f"{file} at {resized[1]}×{resized[0]} px is smaller than one patch of {patch} px; pass --image-size "
                f"{14 * patch} or so"
            )
        x, y = point or (0, 0)
        if not (0 <= x < size[1] and 0 <= y < size[0]):
            raise UserError(f"--point {x} {y} is outside {file}, which is shown at {size[1]}×{size[0]} px")
        pictures.append(Picture(name, file, resized, size))
    return pictures


def _note_cut(pictures: Sequence[Picture], patch: int) -> None:
    """Says of how many images the right and the lower edge are cut off."""
    cut = [picture for picture in pictures if picture.size != picture.resized]
    if cut:
        before, after = (f"{width}×{height}" for height, width in (cut[0].resized, cut[0].size))
        print(
            f"note: {len(cut):,} of {len(pictures):,} images are cut to whole patches of {patch} px, for example "
            f"{cut[0].file} from {before} to {after} px"
        )


def _point(picture: Picture, settings: MapSettings) -> tuple[int, int]:
    """x and y of a pixel in the patch that others are compared with."""
    if settings.click:
        from experiments.data.files import readable_name
        from experiments.figures.clicking import clicked_point

        return clicked_point(picture.read(), f"{readable_name(picture.file.name)}: click on the patch to compare with")
    height, width = picture.size
    return settings.point or (width // 2, height // 2)


def _draw_all(folder: Path, seen: Sequence[Seen], settings: MapSettings, about: str) -> None:
    """Draws three figures of each image, and those of all images together."""
    from tqdm import tqdm

    for one in tqdm(seen, desc="figures", unit="img", dynamic_ncols=True):
        _draw(folder, one, settings, about)
    kept = "all patches"
    if settings.foreground is not None:
        kept = f"black where the first component is not above {settings.foreground:g} (all patches where under 5 % are)"
    _draw_pca(folder, seen, f"{about}, {kept}")
    if len(seen) > 1:
        mask = f"the mask holds {100 * settings.mass:g} % of the attention"
        _draw_sheet(folder, seen, f"{about}; colours from the 1st to the 99th percentile of the attention; {mask}")


def _draw(folder: Path, seen: Seen, settings: MapSettings, about: str) -> None:
    """Draws the three figures of an image."""
    from experiments.data.files import readable_name
    from experiments.figures import maps as map_figures

    picture, (x, y), (rows, columns) = seen.picture, seen.point, seen.similarity.shape
    name, (height, width) = readable_name(picture.file.name), picture.size
    pixels, note = picture.read(), f"{about}, {width}×{height} px, {columns}×{rows} patches"
    map_figures.save_attention(
        folder / f"{picture.name}_attention.png", pixels, seen.attention,
        title=f"Attention of the class token in the last block: {name}", note=note,
    )  # fmt: skip
    headings = {
        f"attention of at least {settings.threshold:g} × the map's maximum": seen.score_mask,
        f"the patches that hold {100 * settings.mass:g} % of the map's attention": seen.mass_mask,
    }
    map_figures.save_masks(
        folder / f"{picture.name}_mask.png", pixels, headings, title=f"Attention masks: {name}", note=note
    )
    map_figures.save_similarity(
        folder / f"{picture.name}_similarity.png", pixels, seen.similarity, seen.point,
        title=f"Similarity to the patch at {x} {y}: {name}", note=note,
    )  # fmt: skip


def _pages(folder: Path, name: str, seen: Sequence[Seen], size: int, note: str) -> Iterator[tuple[Path, Any, str]]:
    """File, images and note of each page: NAME.png, NAME_2.png and so on."""
    pages = -(-len(seen) // size)
    for page in range(pages):
        file = folder / (f"{name}.png" if page == 0 else f"{name}_{page + 1}.png")
        yield file, seen[page * size : (page + 1) * size], note + (f", page {page + 1} of {pages}" * (pages > 1))


def _draw_pca(folder: Path, seen: Sequence[Seen], note: str) -> None:
    """Draws pca.png, and pca_2.png and so on if there are many images."""
    from experiments.figures.maps import save_pca

    for file, shown, words in _pages(folder, "pca", seen, _PER_PAGE, note):
        save_pca(
            file,
            [one.picture.read() for one in shown],
            [one.pca for one in shown],
            [one.picture.name for one in shown],
            title="PCA of patch features as red, green, blue; one basis for all images",
            note=words,
        )


def _draw_sheet(folder: Path, seen: Sequence[Seen], note: str) -> None:
    """Draws sheet.png, and sheet_2.png and so on if there are many images."""
    from experiments.figures.maps import save_contact_sheet

    for file, shown, words in _pages(folder, "sheet", seen, _PER_SHEET, note):
        title = f"{len(seen):,} images: attention, mask, similarity and PCA of their patches"
        save_contact_sheet(file, [_row(one) for one in shown], title=title, note=words)


def _row(seen: Seen) -> "SheetRow":
    from experiments.figures.maps import SheetRow

    picture = seen.picture
    return SheetRow(picture.read(), picture.name, seen.attention[0], seen.mass_mask[0], seen.similarity, seen.pca)


def _print(out: Path, pictures: Sequence[Picture], files: Sequence[str]) -> None:
    """Prints a line for the figures of each image, then the other files."""
    print()
    for picture in pictures[:_PRINTED]:
        print(f"  {out / picture.name}_{{{','.join(_KINDS)}}}.png   {picture.file}")
    if len(pictures) > _PRINTED:
        print(f"  … and those of {len(pictures) - _PRINTED:,} more images")
    figures = {f"{picture.name}_{kind}.png" for picture in pictures for kind in _KINDS}
    for name in files:
        if name not in figures:
            print(f"  {out / name}")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(command_line(Config, "experiments.visualize", __doc__, args))


if __name__ == "__main__":
    main()
