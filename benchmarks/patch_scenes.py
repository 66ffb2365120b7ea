"""How well patches track and find what was put into real photos: videos and anomalies whose truth is known.

    python -m benchmarks.patch_scenes --quick                               tiles of two photos
    python -m benchmarks.patch_scenes --backgrounds FOLDER --objects FOLDER

Videos: a blob cut out of a photo of --objects moves, turns and grows over a photo of --backgrounds, which moves too.
The command `patches track` gets the first mask; J and F are compared with those of the first mask left where it is. The
path of the blob is about as long as the blob. Anomalies: the command `patches anomaly` learns photos of --backgrounds
and sees others of them, into half of which a blob of a photo of --objects is pasted; AUROC over images and pixels.
Intervals are 95 % bootstrap intervals, over videos or images. Without folders, both are tiles of the two sample photos
of scikit-learn.
"""

import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.work.paired import finish

_SIDE, _FRAMES, _BLOB = 128, 12, 44  # px, frames of a video, px of a blob
_RESAMPLES = 2000
Pixels = np.ndarray


@dataclasses.dataclass(frozen=True)
class Config:
    """Tracking and anomalies on scenes made of real photos; ends in one line of JSON."""

    quick: bool = False
    """Make 3 videos and 16 photos."""
    backgrounds: Path | None = None
    """Folder of photos, searched at any depth."""
    objects: Path | None = None
    """Folder of photos that blobs are cut from, searched at any depth."""
    weights: str = "dinojax_vitt"
    """A published checkpoint by its torch.hub name, dinojax_vitt, or a folder or file of weights."""
    image_size: int = _SIDE
    """Side in pixels of the photos that the model sees."""
    videos: int = 20
    """Number of videos."""
    photos: int = 60
    """Number of photos that are learned, and of those that are looked at."""
    seed: int = 0
    """Seed of everything that is drawn."""
    out: Path | None = None
    """File that the JSON is also written to."""
    keep: Path | None = None
    """Folder to keep scenes and results in. None removes them."""


def main() -> None:
    """Parses the command line, makes the scenes, runs both commands, prints the numbers and a line of JSON."""
    import tyro

    from dinojax.commands import exit_on_user_error

    config = tyro.cli(Config, prog="python -m benchmarks.patch_scenes", description=__doc__)
    if config.quick:
        config = dataclasses.replace(config, videos=3, photos=16)
    with exit_on_user_error(), tempfile.TemporaryDirectory() as temporary:
        folder = config.keep or Path(temporary)
        rng = np.random.default_rng(config.seed)
        backgrounds, objects = (_drawn(path, rng) for path in (config.backgrounds, config.objects))
        track = measure_tracking(folder, config, backgrounds, objects, rng)
        anomaly = measure_anomalies(folder, config, backgrounds, objects, rng)
    for name in ("J", "F"):
        row = track[name]
        print(
            f"{name}: {row['tracked']:.3f}, first mask {row['still']:.3f}, difference {row['difference']:.3f} "
            f"({row['interval'][0]:.3f} – {row['interval'][1]:.3f}) over {track['videos']} videos",
            file=sys.stderr,
        )
    settings = {
        name: str(getattr(config, name)) for name in ("backgrounds", "objects", "weights", "image_size", "seed")
    }
    finish({"benchmark": "patch_scenes", **settings, "tracking": track, "anomalies": anomaly}, config.out)


def _drawn(folder: Path | None, rng: np.random.Generator) -> Callable[[], Pixels]:
    """A function that gives another square photo of `_SIDE` px at each call."""
    from dinojax.errors import UserError
    from dinojax.images.decode import decode_rgb
    from dinojax.images.resize import Resampling, resize_centre_crop
    from experiments.data.files import find_images, no_images

    if folder is None:
        from sklearn.datasets import load_sample_images

        photos = load_sample_images().images

        def tile() -> Pixels:
            photo = photos[int(rng.integers(len(photos)))]
            top, left = (int(rng.integers(side - _SIDE)) for side in photo.shape[:2])
            return photo[top : top + _SIDE, left : left + _SIDE]

        return tile
    found = find_images(folder.expanduser())
    if not found.files:
        raise UserError(no_images(folder, found))
    order = itertools.cycle(rng.permutation(len(found.files)).tolist())

    def photo() -> Pixels:
        file = found.files[next(order)]
        return resize_centre_crop(decode_rgb(file, str(file)), _SIDE, _SIDE, resample=Resampling.BICUBIC)

    return photo


def blob(rng: np.random.Generator, side: int) -> np.ndarray:
    """A random round shape "side side" as a mask: the radius varies smoothly with the angle."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side * 2 - 1
    angle, radius = np.arctan2(y, x), np.full((side, side), 0.72)
    for order in (2, 3, 4):
        radius += rng.uniform(-0.09, 0.09) * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(y, x) < radius


def paste(background: Pixels, cut: Pixels, shape: np.ndarray, row: float, column: float) -> tuple[Pixels, np.ndarray]:
    """The photo with a shape of another one centred at a place, and where it is."""
    side, found = len(shape), np.zeros(background.shape[:2], bool)
    top, left = round(row - side / 2), round(column - side / 2)
    rows = slice(max(0, top), min(len(found), top + side))
    columns = slice(max(0, left), min(found.shape[1], left + side))
    inner = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
    found[rows, columns] = shape[inner]
    photo = background.copy()
    photo[rows, columns][shape[inner]] = cut[inner][shape[inner]]
    return photo, found


def video(background: Pixels, other: Pixels, rng: np.random.Generator) -> tuple[list[Pixels], list[np.ndarray]]:
    """Frames and masks: the shape moves along a line, turns and grows; the background slides the other way."""
    start, towards = rng.uniform(40, 88, 2), rng.uniform(0, 2 * np.pi)
    step = _BLOB / (_FRAMES - 1) * np.array([np.sin(towards), np.cos(towards)])
    end = start + (_FRAMES - 1) * step
    if end.min() < 18 or end.max() > _SIDE - 18:
        step = -step
    turn, growth = rng.uniform(-4, 4), rng.uniform(-0.015, 0.02)
    shape = Image.fromarray(blob(rng, _BLOB))
    cut = Image.fromarray(other).resize((_BLOB, _BLOB), Image.Resampling.BICUBIC)
    wide = np.asarray(Image.fromarray(background).resize((_SIDE + 24, _SIDE + 24), Image.Resampling.BICUBIC))
    frames, masks = [], []
    for number in range(_FRAMES):
        side = round(_BLOB * (1 + growth) ** number)
        turned, at = (
            np.asarray(image.rotate(turn * number, sample).resize((side, side), sample))
            for image, sample in ((cut, Image.Resampling.BILINEAR), (shape, Image.Resampling.NEAREST))
        )
        slid = np.rint(12 - 0.2 * number * step).astype(int).clip(0, 24)
        behind = wide[slid[0] : slid[0] + _SIDE, slid[1] : slid[1] + _SIDE]
        frame, mask = paste(behind, turned, at, *(start + number * step))
        frames.append(frame)
        masks.append(mask)
    return frames, masks


def measure_tracking(
    folder: Path, config: Config, backgrounds: Callable, objects: Callable, rng: np.random.Generator
) -> dict[str, Any]:
    """J and F of `patches track` on videos in DAVIS's layout, and of the first mask."""
    from dinojax.patches import video_scores
    from experiments.patch_tasks.track import TrackConfig, run_track
    from experiments.runs.settings import create

    root, names, still = folder / "davis", [f"video{number:02d}" for number in range(config.videos)], []
    for name in names:
        frames, masks = video(backgrounds(), objects(), rng)
        for number, (frame, mask) in enumerate(zip(frames, masks)):
            _save(root / "JPEGImages" / "480p" / name / f"{number:05d}.png", frame)
            _save(root / "Annotations" / "480p" / name / f"{number:05d}.png", mask.astype(np.uint8))
        truth = np.stack(masks).astype(np.uint8)
        scores = video_scores(np.repeat(truth[:1], len(truth), axis=0), truth)[1]
        still.append({measure: scores[measure].mean for measure in ("J", "F")})
    (root / "ImageSets" / "2017").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("\n".join(names) + "\n")
    settings = create(TrackConfig, weights=config.weights, folder=root, image_size=config.image_size,
                      out=folder / "tracked")  # fmt: skip
    rows = {row["video"]: row for row in run_track(settings)["objects"]}
    found: dict[str, Any] = {"videos": len(names), "frames": _FRAMES}
    for measure in ("J", "F"):
        ours, base = (np.array([one[measure] for one in many]) for many in ([rows[name] for name in names], still))
        found[measure] = {
            "tracked": float(ours.mean()),
            "still": float(base.mean()),
            "difference": float((ours - base).mean()),
            "interval": _interval(ours - base),
            "deviation": float((ours - base).std(ddof=1)),
            "better": int((ours > base).sum()),
        }
    return found


def measure_anomalies(
    folder: Path, config: Config, backgrounds: Callable, objects: Callable, rng: np.random.Generator
) -> dict[str, Any]:
    """AUROC of `patches anomaly` on a category in MVTec's layout."""
    from experiments.patch_tasks.anomaly import AnomalyConfig, run_anomaly
    from experiments.runs.settings import create

    root = folder / "planted"
    for number in range(config.photos):
        _save(root / "train" / "good" / f"{number:03d}.png", backgrounds())
    for number in range(config.photos):
        photo, kind = backgrounds(), ("good", "planted")[number % 2]
        if kind == "planted":
            cut = np.asarray(Image.fromarray(objects()).resize((_BLOB, _BLOB), Image.Resampling.BICUBIC))
            photo, mask = paste(photo, cut, blob(rng, _BLOB), *rng.uniform(30, _SIDE - 30, 2))
            _save(root / "ground_truth" / kind / f"{number:03d}_mask.png", 255 * mask.astype(np.uint8))
        _save(root / "test" / kind / f"{number:03d}.png", photo)
    settings = create(AnomalyConfig, weights=config.weights, folder=root, image_size=config.image_size,
                      seed=config.seed, out=folder / "anomalies")  # fmt: skip
    return run_anomaly(settings)


def _interval(values: Sequence[float]) -> list[float]:
    rng, values = np.random.default_rng(0), np.asarray(values)
    means = values[rng.integers(0, len(values), (_RESAMPLES, len(values)))].mean(axis=1)
    return np.percentile(means, (2.5, 97.5)).tolist()


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


if __name__ == "__main__":
    main()
