"""What a model sees in images: its attention, masks from it, its patches as colours, and what is alike.

    python -m experiments.visualize dinov2_vits14_reg photo.jpg path/to/images --image-size 518
    python -m experiments.visualize runs/dino_cifar100/20250101-120000 cat.png --network student
    python -m experiments.visualize dino_vits8 cat.png --image-size 480 --mass 0.6 --point 240 180

The output folder gets, for each image: NAME_attention.png (how much the class token attends to each patch in the last
block, in every head), NAME_mask.png (the patches above --threshold, and those that hold the share --mass of the
attention) and NAME_similarity.png (how alike every patch is to the one at --point); for all images together pca.png
(the main components of their patches as colours, on one basis: the same colour is the same content); and config.json.
Images of any size and shape are taken as they are, or resized with --image-size; what the patch size does not divide
is cut off on the right and below. In a folder, which is searched at any depth, files that are no readable images are
named and left out.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Float, UInt8

from dinojax import maps
from dinojax.checkpoint import CONFIG_FILE, is_model_folder
from dinojax.errors import UserError, exit_on_user_error
from experiments.harness.backbones import is_random, load_backbone

if TYPE_CHECKING:
    from dinojax.vit import VisionTransformer

_NETWORKS = ("teacher", "student")
_KINDS = ("attention", "mask", "similarity")
_PER_PAGE = 24  # images of one pca.png
_PRINTED = 40  # images
_MOST_MEMORY = 0.8  # of what there is


@dataclasses.dataclass(frozen=True)
class Config:
    """Attention, masks, patch PCA and patch similarity of images; see the top of this file."""

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_WEIGHTS")]
    """A published checkpoint by its torch.hub name (dino_vits16 … dinov2_vitg14_reg), a .pth or .safetensors file, a
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


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image file and how it is shown: resized to `resized` (height, width), then cut to `size`.

    `name` is what the names of its output files start with.
    """

    name: str
    file: Path
    resized: tuple[int, int]
    size: tuple[int, int]

    def read(self) -> UInt8[np.ndarray, "height width 3"]:
        """Its pixels as they are shown."""
        from PIL import Image

        from experiments.harness.datasets import decode_rgb

        pixels = decode_rgb(self.file, str(self.file))
        if pixels.shape[:2] != self.resized:
            pixels = np.asarray(Image.fromarray(pixels).resize(self.resized[::-1], Image.Resampling.BICUBIC))
        return pixels[: self.size[0], : self.size[1]]


class PatchMaps(NamedTuple):
    """What the last block makes of an image's patches.

    `attention` is the class token's: the mean of the heads, then each head. `features` are after the final norm.
    """

    attention: Float[np.ndarray, "maps rows columns"]
    features: Float[np.ndarray, "rows columns dim"]


class Mapper:
    """A model as a function of pictures of any size; compiled once for each size.

    Args:
        model: of any patch size.
        normalisation: mean and deviation of the pixels (0–1) that the weights expect.
        dtype: what the model computes in.
    """

    def __init__(self, model: "VisionTransformer", normalisation: tuple[Sequence[float], Sequence[float]], dtype: str):
        on_cpu = jax.default_backend() == "cpu"
        self.dtype = jnp.dtype(("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype)
        self.config = model.config
        graphdef, state = nnx.split(model)
        self._state = jax.tree.map(lambda x: x.astype(self.dtype), state)
        self._compiled = {}
        mean, std = (jnp.asarray(numbers, jnp.float32) for numbers in normalisation)
        # Float32 means float32: accelerators would otherwise multiply in lower precision.
        precision = "highest" if self.dtype == jnp.float32 else "default"

        def forward(state, pixels):
            images = ((pixels.astype(jnp.float32) / 255 - mean) / std).astype(self.dtype)[None]
            grid = [side // self.config.patch_size for side in pixels.shape[:2]]
            with jax.default_matmul_precision(precision):
                model = nnx.merge(graphdef, state)
                # XLA finds that both pass through the same blocks.
                attention, features = model.get_last_selfattention(images), model(images).patch_tokens
            registers = self.config.num_register_tokens
            attention = maps.cls_attention(attention, *grid, num_register_tokens=registers)[0].astype(jnp.float32)
            attention = jnp.concatenate([attention.mean(axis=0, keepdims=True), attention])
            return attention, features.reshape(*grid, -1).astype(jnp.float32)

        self._forward = jax.jit(forward)

    def __call__(self, picture: Picture) -> PatchMaps:
        """The maps of a picture.

        Raises:
            UserError: they are not finite, or `prepare` refuses the picture.
        """
        found = PatchMaps(*map(np.asarray, self.prepare(picture)(self._state, picture.read())))
        if not all(np.isfinite(array).all() for array in found):
            raise UserError(
                f"the features of {picture.file} are not finite: the weights are damaged, or overflow in this "
                "precision (try --dtype float32)"
            )
        return found

    def prepare(self, picture: Picture) -> jax.stages.Compiled:
        """The model compiled for the picture's size.

        Raises:
            UserError: the attention would not fit into the memory.
        """
        if picture.size not in self._compiled:
            pixels = jax.ShapeDtypeStruct((*picture.size, 3), jnp.uint8)
            compiled = self._forward.lower(self._state, pixels).compile()
            device = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
            there = device or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            needed = compiled.memory_analysis().temp_size_in_bytes
            if needed > _MOST_MEMORY * there:
                (height, width), patch = picture.size, self.config.patch_size
                # The attention of n patches is n × n numbers, and n grows with the square of the side.
                fitting = int(min(height, width) * (0.5 * there / needed) ** 0.25) // patch * patch
                raise UserError(
                    f"{picture.file} at {width}×{height} px has {height * width // patch**2:,} patches, whose "
                    f"attention takes {needed / 1e9:.0f} GB of the {there / 1e9:.0f} GB of memory here; pass "
                    f"--image-size {fitting} or less"
                )
            self._compiled[picture.size] = compiled
        return self._compiled[picture.size]


def run(config: Config) -> list[Path]:
    """Draws everything; returns the files.

    Raises:
        UserError: images, weights or settings that cannot be used.
    """
    _check(config)
    from tqdm import tqdm

    from experiments.harness import records

    shapes = _readable(config.images)
    out = config.out or records.default_run_folder("visualize")
    with records.run_folder(out) as folder:
        weights = find_network(config.weights, config.network)
        model = load_backbone(weights, seed=config.seed, cache_dir=config.cache_dir.expanduser())
        pictures = _pictures(shapes, config, model.config.patch_size)
        mapper = Mapper(model, find_normalisation(weights), config.dtype)
        mapper.prepare(max(pictures, key=lambda picture: picture.size[0] * picture.size[1]))
        about = "/".join(Path(weights).parts[-3:]) + (" (UNTRAINED)" if is_random(weights) else "")
        bar = {"unit": "img", "dynamic_ncols": True}
        found = [mapper(picture) for picture in tqdm(pictures, desc="model", **bar)]
        features = [one.features for one in found]
        colours = maps.pca_maps(features, threshold=config.foreground, flip=config.flip_foreground)
        for picture, one, pca in zip(tqdm(pictures, desc="figures", **bar), found, colours):
            _draw(folder, picture, one, pca, config, about)
        _draw_pca(folder, pictures, colours, config, about)
        records.write_json(folder / records.CONFIG_FILE, dataclasses.asdict(config))
        files = sorted(file.name for file in folder.iterdir())
    _print(out, pictures, files)
    return [out / name for name in files]


def find_network(weights: str, network: str) -> str:
    """The model folder in a training's run folder; anything else is returned as it is.

    Raises:
        UserError: the run folder does not hold that network, or there is nothing to choose from.
    """
    held = [name for name in _NETWORKS if is_model_folder(Path(weights).expanduser() / name)]
    if network in held:
        return str(Path(weights).expanduser() / network)
    if held:
        raise UserError(f"--network {network}: {weights} holds no model of that name, only {held[0]}")
    if network != _NETWORKS[0]:
        raise UserError(f"--network {network}: {weights} is no run folder of a training with several networks")
    return weights


def find_normalisation(weights: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the pixels (0–1) a model was trained with: its own where they are kept, else ImageNet's."""
    from experiments.harness.features import IMAGENET_MEAN, IMAGENET_STD

    folder = Path(weights).expanduser()
    source = json.loads((folder / CONFIG_FILE).read_text()).get("source", {}) if is_model_folder(folder) else {}
    return (source["mean"], source["std"]) if "mean" in source else (IMAGENET_MEAN, IMAGENET_STD)


def _check(config: Config) -> None:
    if not config.images:
        raise UserError("no images were given; name image files or folders behind the weights")
    if config.image_size is not None and config.image_size < 1:
        raise UserError(f"--image-size {config.image_size} is not a positive number")
    if not 0 <= config.threshold <= 1:
        raise UserError(f"--threshold {config.threshold} is not between 0 and 1")
    if not 0 < config.mass <= 1:
        raise UserError(f"--mass {config.mass} is no share above 0 and up to 1")
    if config.foreground is not None and not 0 <= config.foreground < 1:
        raise UserError(f"--foreground {config.foreground} is not between 0 and 1 (1 itself would leave no patch)")


def _readable(paths: Sequence[Path]) -> list[tuple[Path, tuple[int, int]]]:
    """Image files and their (height, width); of folders the readable ones, what is left out is named."""
    from experiments.harness.datasets import SUFFIXES, decode_rgb, image_files

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


def _draw(folder: Path, picture: Picture, found: PatchMaps, pca: maps.PcaMap, config: Config, about: str) -> None:
    """The three figures of an image, and its arrays where they are asked for."""
    from experiments.harness import map_figures

    height, width = picture.size
    rows, columns = found.features.shape[:2]
    x, y = config.point or (width // 2, height // 2)
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
    from experiments.harness.map_figures import save_pca

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
