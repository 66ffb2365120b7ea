"""How well a threshold on the similarity of features tells edited copies of an image from other images.

    python -m benchmarks.duplicates --quick                       tiles of two photos, seconds on 2 cores
    python -m benchmarks.duplicates --data FOLDER [FOLDER …]      up to 1,000 images of each folder

Every image is copied with one edit at a time: recompressed, halved, cropped, mirrored, made brighter or darker. Recall
is the share of copies whose similarity to their own image reaches the threshold. The false share is that of images with
a similarity of the threshold or more to another image of the folder; real duplicates in the folder count as false, so
it is an upper bound. "found" is the share of copies that are most similar to their own image. Features are compared as
they are, and whitened as by `dinojax duplicates --whiten`, where there are enough images: the whitening is learned on
the images and one copy of each. Without --data, the images are tiles of the two sample photos of scikit-learn.
"""

import dataclasses
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from benchmarks.work.paired import finish

PLAIN, WHITENED = "plain", "whitened"
THRESHOLDS = {PLAIN: (0.9, 0.95, 0.97, 0.98, 0.99, 0.995), WHITENED: (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)}
FALSE_SHARES = (0.05, 0.01, 0.001)
_QUICK = 150  # images
_TILE = 64  # px
Pixels = np.ndarray


@dataclasses.dataclass(frozen=True)
class Config:
    """Recall and false positives of near-duplicates; ends in one line of JSON."""

    quick: bool = False
    """Take 150 images of each folder."""
    data: tuple[Path, ...] = ()
    """Folders of images, searched at any depth."""
    weights: str = "dinojax_vitt"
    """A published checkpoint by its torch.hub name, dinojax_vitt, or a folder or file of weights."""
    image_size: int | None = None
    """Side in pixels of the images that the model sees. None takes the model's own."""
    feature: str = "cls"
    """Feature that images are compared by: cls or mean_patch."""
    images: int = 1000
    """Most images of each folder."""
    seed: int = 0
    """Seed of the images that are drawn, and of the places of crops."""
    out: Path | None = None
    """File that the JSON is also written to."""


def main() -> None:
    """Parses the command line, measures every folder, prints a table and a line of JSON."""
    import tyro

    from dinojax.commands import exit_on_user_error
    from experiments.features.backbones import load_backbone

    config = tyro.cli(Config, prog="python -m benchmarks.duplicates", description=__doc__)
    with exit_on_user_error():
        backbone = load_backbone(config.weights, seed=0, cache_dir=None)
        sets = {_short(path): _images(path, config) for path in config.data} or {"tiles of two photos": _tiles()}
        rows = {}
        for name, images in sets.items():
            rows[name] = _measure(images, _embedder(backbone.model, config), config.seed)
            for variant, row in rows[name].items():
                print(_table(f"{name}, {variant}", row), flush=True)
    result = {"benchmark": "duplicates", "weights": config.weights, "feature": config.feature,
              "image_size": config.image_size or backbone.image_size, "seed": config.seed, "rows": rows}  # fmt: skip
    finish(result, config.out)


def _short(path: Path) -> str:
    return "/".join(path.resolve().parts[-2:])


def _images(folder: Path, config: Config) -> list[Pixels]:
    """Images of a folder, drawn with the seed."""
    from dinojax.errors import UserError
    from dinojax.images.decode import decode_rgb
    from experiments.data.files import find_images, no_images

    found = find_images(folder.expanduser())
    if len(found.files) < 2:
        raise UserError(no_images(folder, found))
    count = min(len(found.files), _QUICK if config.quick else config.images)
    chosen = np.sort(np.random.default_rng(config.seed).choice(len(found.files), count, replace=False))
    return [decode_rgb(found.files[i], str(found.files[i])) for i in chosen]


def _tiles() -> list[Pixels]:
    """Tiles of the two sample photos that come with scikit-learn."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    return [
        photo[top : top + _TILE, left : left + _TILE]
        for photo in photos
        for top in range(0, photo.shape[0] - _TILE + 1, _TILE)
        for left in range(0, photo.shape[1] - _TILE + 1, _TILE)
    ]


def recompressed(pixels: Pixels, quality: int) -> Pixels:
    """The image through a JPEG file."""
    from dinojax.images.decode import decode_rgb

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return decode_rgb(io.BytesIO(file.getvalue()), "copy")


def cropped(pixels: Pixels, share: float, rng: np.random.Generator) -> Pixels:
    """A part of the image whose sides are `share` of its own, at a random place."""
    sides = [max(1, round(share * side)) for side in pixels.shape[:2]]
    top, left = (int(rng.integers(0, side - kept + 1)) for side, kept in zip(pixels.shape[:2], sides))
    return pixels[top : top + sides[0], left : left + sides[1]]


def _halved(pixels: Pixels) -> Pixels:
    height, width = (max(1, side // 2) for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _brightness(pixels: Pixels, factor: float) -> Pixels:
    return np.asarray(ImageEnhance.Brightness(Image.fromarray(pixels)).enhance(factor))


EDITS: dict[str, Callable[[Pixels, np.random.Generator], Pixels]] = {
    "JPEG, quality 75": lambda pixels, rng: recompressed(pixels, 75),
    "JPEG, quality 30": lambda pixels, rng: recompressed(pixels, 30),
    "half the size": lambda pixels, rng: _halved(pixels),
    "crop, 90 % of each side": lambda pixels, rng: cropped(pixels, 0.9, rng),
    "crop, 75 % of each side": lambda pixels, rng: cropped(pixels, 0.75, rng),
    "mirrored": lambda pixels, rng: pixels[:, ::-1],
    "brightness × 1.25": lambda pixels, rng: _brightness(pixels, 1.25),
    "brightness × 0.75": lambda pixels, rng: _brightness(pixels, 0.75),
}


def _embedder(model: Any, config: Config) -> Callable[[Sequence[Pixels]], np.ndarray]:
    import dinojax

    def embed(images: Sequence[Pixels]) -> np.ndarray:
        prepared = dinojax.preprocess([np.ascontiguousarray(x) for x in images], model, size=config.image_size)
        return _unit(dinojax.embed(model, prepared)._asdict()[config.feature].astype(np.float64))

    return embed


def _measure(images: Sequence[Pixels], embed: Callable[[Sequence[Pixels]], np.ndarray], seed: int) -> dict[str, Any]:
    """The numbers of one folder: plain, and whitened if there are enough images."""
    from dinojax.retrieval import fit_whitening, whiten
    from experiments.duplicates import IMAGES_PER_NUMBER

    originals, copies = embed(images), {}
    for name, edit in EDITS.items():
        print(f"{len(images)} copies: {name}", file=sys.stderr)
        rng = np.random.default_rng(seed)
        copies[name] = embed([edit(pixels, rng) for pixels in images])
    rows = {PLAIN: summary(originals, copies, THRESHOLDS[PLAIN])}
    each = np.stack([list(copies.values())[i % len(copies)][i] for i in range(len(images))])
    bank = np.concatenate([originals, each])
    if len(bank) >= IMAGES_PER_NUMBER * bank.shape[1]:
        whitening = fit_whitening(bank)
        originals, *changed = (_unit(whiten(features, whitening)) for features in (originals, *copies.values()))
        rows[WHITENED] = summary(originals, dict(zip(copies, changed)), THRESHOLDS[WHITENED])
    return rows


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def summary(originals: np.ndarray, copies: dict[str, np.ndarray], thresholds: Sequence[float]) -> dict[str, Any]:
    """Recall and false positives from features of length 1 "images dim", by threshold and by edit.

    `thresholds` holds fixed ones, and `at_false_share` the lowest ones at which no more than that share of the images
    reach the similarity to another.
    """
    between = originals @ originals.T
    np.fill_diagonal(between, -np.inf)
    largest = between.max(axis=1)
    own = {name: np.einsum("id,id->i", originals, features) for name, features in copies.items()}
    found = {name: (features @ originals.T).argmax(axis=1) for name, features in copies.items()}
    places = {share: float(np.sort(largest)[::-1][int(share * len(largest))]) + 1e-6 for share in FALSE_SHARES}
    return {
        "images": len(originals),
        "found": {name: round(float((one == np.arange(len(one))).mean()), 4) for name, one in found.items()},
        "thresholds": {f"{value:g}": _at(value, largest, own) for value in thresholds},
        "at_false_share": {f"{share:g}": {"threshold": round(value, 4)} | _at(value, largest, own)
                           for share, value in places.items()},
    }  # fmt: skip


def _at(threshold: float, largest: np.ndarray, own: dict[str, np.ndarray]) -> dict[str, Any]:
    recall = {name: round(float((values >= threshold).mean()), 4) for name, values in own.items()}
    return {
        "false_share": round(float((largest >= threshold).mean()), 4),
        "mean_recall": round(sum(recall.values()) / len(recall), 4),
        "recall": recall,
    }


def _table(name: str, row: dict[str, Any]) -> str:
    columns = [
        *row["thresholds"].items(),
        *((f"{one['threshold']:.4f}", one) for one in row["at_false_share"].values()),
    ]
    lines = [
        f"\n{name}: {row['images']:,} images; recall in % by threshold (the last {len(FALSE_SHARES)}: at most "
        f"{', '.join(f'{100 * share:g}' for share in FALSE_SHARES)} % of the images with a false match)",
        f"  {'copy':26}{'found':>8}" + "".join(f"{label:>9}" for label, _ in columns),
    ]
    for edit, found in row["found"].items():
        lines.append(
            f"  {edit:26}{100 * found:8.1f}" + "".join(f"{100 * one['recall'][edit]:9.1f}" for _, one in columns)
        )
    lines.append(f"  {'mean recall':34}" + "".join(f"{100 * one['mean_recall']:9.1f}" for _, one in columns))
    lines.append(
        f"  {'images with a false match':34}" + "".join(f"{100 * one['false_share']:9.1f}" for _, one in columns)
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
