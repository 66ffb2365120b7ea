"""What a model sees in images: its attention, masks from it, its patches as colours, and what is alike.

    python -m experiments.visualize dinov2_vits14_reg photo.jpg path/to/images --image-size 518
    python -m experiments.visualize runs/dino_cifar100/20250101-120000 cat.png --network student
    python -m experiments.visualize dino_vits8 cat.png --image-size 480 --mass 0.6 --point 240 180

The output folder gets, for each image: NAME_attention.png (how much the class token attends to each patch in the last
block, in every head), NAME_mask.png (the patches above --threshold, and those that hold the share --mass of the
attention) and NAME_similarity.png (how alike every patch is to the one at --point, or to the one
you --click on); for all images together pca.png
(the main components of their patches as colours, on one basis: the same colour is the same content); and config.json.
Images of any size and shape are taken as they are, or resized with --image-size; what the patch size does not divide
is cut off on the right and below. In a folder, which is searched at any depth, files that are no readable images are
named and left out.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from dinojax import maps
from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from experiments.features.backbones import is_random, load_backbone
from experiments.features.patch_maps import Mapper, PatchMaps, Picture
from experiments.runs.settings import require, require_positive

_KINDS = ("attention", "mask", "similarity")
_PER_PAGE = 24  # images of one pca.png
_PRINTED = 40  # images


@dataclasses.dataclass(frozen=True)
class Config:
    """Attention, masks, patch PCA and patch similarity of images; see the top of this file."""

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_WEIGHTS")]
    """A published checkpoint by its torch.hub name (dino_vits16 … dinov2_vitg14_reg), dinojax_vitt (a small one trained
    on CIFAR-10, inside the package: no download), a .pth or .safetensors file, a
    folder made by `python -m converters`, the run folder of a training, or "random:NAME" (never trained)."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES…")]
    """JPEG, PNG, WebP … files, or folders of them."""
    network: Literal["teacher", "student"] = "teacher"
    """Which network of a run folder."""
    image_size: int | None = None
    """Pixels of the shorter side (bicubic, antialiased; the aspect is kept). Default: the image's own size."""
    threshold: float = 0.5
    """Of the first mask: a patch's attention over the largest of its head, 0 to 1. Higher keeps fewer patches."""
    mass: float = 0.6
    """Of the second mask: the share of a head's attention that the kept patches hold, above 0 and up to 1."""
    point: tuple[int, int] | None = None
    """X Y in pixels of the image as it is shown (NAME_similarity.png numbers them). Default: the centre."""
    click: bool = False
    """Show each image in a window and take the point that is clicked on; needs a display."""
    foreground: float | None = 0.5
    """In pca.png, patches whose first component, scaled to 0–1 over all images, is not above this are black; None
    keeps all patches."""
    flip_foreground: bool = False
    """Take the other side of the first component for foreground; by default the side that is rare along the borders."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; auto is float32 on a CPU and bfloat16 elsewhere."""
    save_arrays: bool = False
    """Also write NAME.npz for each image: attention, score_mask and mass_mask (the mean of the heads first),
    similarity, pca and pca_foreground, on the grid of patches."""
    seed: int = 0
    """Of random weights."""
    out: Path | None = None
    """The folder to write to. Default: runs/visualize/<date-time>."""
    cache_dir: Path = Path("~/.cache/dinojax")
    """Where downloaded weights are kept."""


def run(config: Config) -> list[Path]:
    """Draws everything; returns the files.

    Raises:
        UserError: images, weights or settings that cannot be used.
    """
    _check(config)
    from tqdm import tqdm

    from experiments.runs import records

    shapes = _readable(config.images)
    out = config.out or records.default_run_folder("visualize")
    with records.run_folder(out) as folder:
        cache_dir = config.cache_dir.expanduser()
        backbone = load_backbone(config.weights, network=config.network, seed=config.seed, cache_dir=cache_dir)
        pictures = _pictures(shapes, config, backbone.model.config.patch_size)
        mapper = Mapper(backbone.model, backbone.normalisation, config.dtype)
        points = [_point(picture, config) for picture in pictures]
        mapper.prepare(max(pictures, key=lambda picture: picture.size[0] * picture.size[1]))
        about = "/".join(Path(backbone.weights).parts[-3:]) + (" (UNTRAINED)" if is_random(config.weights) else "")
        bar = {"unit": "img", "dynamic_ncols": True}
        found = [mapper(picture) for picture in tqdm(pictures, desc="model", **bar)]
        features = [one.features for one in found]
        colours = maps.pca_maps(features, threshold=config.foreground, flip=config.flip_foreground)
        for picture, point, one, pca in zip(tqdm(pictures, desc="figures", **bar), points, found, colours):
            _draw(folder, picture, point, one, pca, config, about)
        _draw_pca(folder, pictures, colours, config, about)
        records.write_json(folder / records.CONFIG_FILE, dataclasses.asdict(config))
        files = sorted(file.name for file in folder.iterdir())
    _print(out, pictures, files)
    return [out / name for name in files]


def _check(config: Config) -> None:
    if not config.images:
        raise UserError("no images were given; name image files or folders behind the weights")
    require_positive(config, ["image_size"])
    require(0 <= config.threshold <= 1, "threshold", config.threshold, "between 0 and 1")
    if not 0 < config.mass <= 1:
        raise UserError(f"--mass {config.mass} is no share above 0 and up to 1")
    if config.click and config.point:
        raise UserError(f"--click and --point {config.point[0]} {config.point[1]} both name a point; give one")
    if config.foreground is not None and not 0 <= config.foreground < 1:
        raise UserError(f"--foreground {config.foreground} is not between 0 and 1 (1 itself would leave no patch)")


def _readable(paths: Sequence[Path]) -> list[tuple[Path, tuple[int, int]]]:
    """Image files and their (height, width); of folders the readable ones, what is left out is named."""
    from experiments.data.splits import SUFFIXES, decode_rgb, image_files

    found = {}
    for path in (path.expanduser() for path in paths):
        if not path.exists():
            raise UserError(f"{path}: there is no such image or folder")
        files, unreadable = image_files(path) if path.is_dir() else [path], []
        if not files:
            raise UserError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
        for file in files:
            try:
                found[file] = decode_rgb(file, str(file)).shape[:2]
            except UserError as error:
                unreadable.append(error)
        if len(unreadable) == len(files):
            raise unreadable[0]
        for error in unreadable:
            print(f"left out: {error}")
    return list(found.items())


def _pictures(shapes: Sequence[tuple[Path, tuple[int, int]]], config: Config, patch: int) -> list[Picture]:
    """How each image is shown, under a name of its own."""
    pictures, taken = [], set()
    for file, (height, width) in shapes:
        shorter = min(height, width)
        resized = tuple(int((config.image_size or shorter) * side / shorter) for side in (height, width))
        size = tuple(side // patch * patch for side in resized)
        if not min(size):
            raise UserError(
                f"{file} at {resized[1]}×{resized[0]} px is smaller than one patch of {patch} px; pass --image-size "
                f"{14 * patch} or so"
            )
        x, y = config.point or (0, 0)
        if not (0 <= x < size[1] and 0 <= y < size[0]):
            raise UserError(f"--point {x} {y} is outside of {file}, which is shown at {size[1]}×{size[0]} px")
        names = (file.stem if count == 1 else f"{file.stem}_{count}" for count in itertools.count(1))
        name = next(name for name in names if name.casefold() not in taken)
        taken.add(name.casefold())
        pictures.append(Picture(name, file, resized, size))
    return pictures


def _point(picture: Picture, config: Config) -> tuple[int, int]:
    """x and y of the patch that others are compared with."""
    if config.click:
        from experiments.figures.clicking import clicked_point

        return clicked_point(picture.read(), f"{picture.file.name}: click on what to compare with")
    height, width = picture.size
    return config.point or (width // 2, height // 2)


def _draw(
    folder: Path,
    picture: Picture,
    point: tuple[int, int],
    found: PatchMaps,
    pca: maps.PcaMap,
    config: Config,
    about: str,
) -> None:
    """The three figures of an image, and its arrays where they are asked for."""
    from experiments.figures import maps as map_figures

    height, width = picture.size
    rows, columns = found.features.shape[:2]
    x, y = point
    similarity = maps.patch_similarity(found.features, found.features[y * rows // height, x * columns // width])
    score, mass = maps.score_mask(found.attention, config.threshold), maps.mass_mask(found.attention, config.mass)
    pixels, note = picture.read(), f"{about}, {width}×{height} px, {columns}×{rows} patches"
    map_figures.save_attention(
        folder / f"{picture.name}_attention.png", pixels, found.attention,
        title=f"Attention of the class token in the last block: {picture.file.name}", note=note,
    )  # fmt: skip
    headings = {
        f"attention of at least {config.threshold:g} × the map's maximum": score,
        f"the patches that hold {100 * config.mass:g} % of the map's attention": mass,
    }
    map_figures.save_masks(
        folder / f"{picture.name}_mask.png", pixels, headings, title=f"Attention masks: {picture.file.name}", note=note
    )
    map_figures.save_similarity(
        folder / f"{picture.name}_similarity.png", pixels, similarity, (x, y),
        title=f"Similarity to the patch at {x} {y}: {picture.file.name}", note=note,
    )  # fmt: skip
    if config.save_arrays:
        arrays = {"attention": found.attention, "score_mask": score, "mass_mask": mass, "similarity": similarity}
        arrays |= {"pca": pca.rgb, "pca_foreground": pca.foreground}
        np.savez_compressed(folder / f"{picture.name}.npz", **arrays)


def _draw_pca(
    folder: Path, pictures: Sequence[Picture], colours: Sequence[maps.PcaMap], config: Config, about: str
) -> None:
    """pca.png, and pca_2.png and so on where there are many images."""
    from experiments.figures.maps import save_pca

    every = "all patches" if config.foreground is None else f"first component above {config.foreground:g}, black below"
    pages = -(-len(pictures) // _PER_PAGE)
    for page in range(pages):
        shown = slice(page * _PER_PAGE, (page + 1) * _PER_PAGE)
        save_pca(
            folder / ("pca.png" if page == 0 else f"pca_{page + 1}.png"),
            [picture.read() for picture in pictures[shown]],
            colours[shown],
            [picture.name for picture in pictures[shown]],
            title="PCA of patch features as red, green, blue; one basis for all images",
            note=f"{about}, {every}" + (f", page {page + 1} of {pages}" if pages > 1 else ""),
        )


def _print(out: Path, pictures: Sequence[Picture], files: Sequence[str]) -> None:
    """A line for each image's figures, then the files of all images."""
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
        run(tyro.cli(Config, args=args, description=__doc__))


if __name__ == "__main__":
    main()
