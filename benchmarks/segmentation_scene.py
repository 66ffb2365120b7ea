"""Segmentation of real photos with known masks: a linear head on patch features beside one on colour histograms.

    python -m benchmarks.segmentation_scene --photos path/to/photos --textures path/to/other/photos

The set is made of your photos. Each image is the central square of one, with three to five objects at random places:
ellipses, rectangles, triangles, and handwritten digits (those inside scikit-learn). An object is filled with a piece of
a photo of the other folder, so that its class is its shape, and no class has a colour of its own. The masks are exact.

Both heads are trained by the same code (`experiments.dense`) on the same windows. The baseline has, for each patch,
the histogram of 64 colours of the patch alone, or of the 3 × 3 patches around it: the better one on the validation
images is reported. Intervals are 95 % bootstrap intervals over the test images.

Last, a photo of 12 megapixels is put together from the test images, and `dinojax predict` segments it at its full size
in a process of its own, whose time and largest memory are reported beside those of one small photo.
"""

import dataclasses
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.work.paired import finish

CLASSES = ("background", "ellipse", "rectangle", "triangle", "digit")
_BINS = 4  # of each channel
# Linux alone tells a process its largest memory; that of `os.wait4` would include what this process holds.
_WITH_PEAK = """
import pathlib, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    status = pathlib.Path("/proc/self/status").read_text()
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""
_PHOTOS = {"one small photo": (128, 128), "a photo of 12 megapixels": (3000, 4000)}  # height and width


@dataclasses.dataclass(frozen=True)
class Config:
    """Segmentation of drawn objects on real photos; ends in one line of JSON."""

    photos: Path
    """Folder of the photos that objects are drawn on."""
    textures: Path
    """Folder of the photos that fill the objects."""
    weights: str = "dinojax_vitt"
    """Backbone; see `python -m experiments.dense --help`."""
    image_size: int = 128
    """Side of the images in pixels."""
    blocks: int = 4
    """Number of last blocks whose patch features are joined."""
    train: int = 400
    """Number of training images."""
    val: int = 100
    """Number of validation images."""
    test: int = 200
    """Number of test images."""
    epochs: int = 50
    """Number of passes through the training images."""
    seed: int = 0
    """Random seed of the set and of the heads."""
    keep: Path | None = None
    """Folder that the set and the run are kept in; a set that is there already is used. None removes them."""
    out: Path | None = None
    """File that the JSON is also written to."""


def main() -> None:
    """Parses the command line, makes the set, trains both heads, prints a line of JSON."""
    import tyro

    config = tyro.cli(Config, prog="python -m benchmarks.segmentation_scene", description=__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        place = config.keep or Path(temporary)
        if not (place / "set").exists():
            make_set(config, place / "set")
        rows = _measure(config, place)
        large = {name: _predict(config, place, size) for name, size in _PHOTOS.items()}
    for name, row in rows.items():
        low, high = (100 * end for end in row["mean_iou_interval"])
        print(f"{name:40} mean IoU {100 * row['mean_iou']:.1f} % ({low:.1f} – {high:.1f})")
    for name, row in large.items():
        print(f"{name}: {row['windows']:,} windows, {row['seconds']:.1f} s, peak {row['peak_mib']:,} MiB, mean IoU "
              f"{100 * row['mean_iou']:.1f} %")  # fmt: skip
    settings = {name: value for name, value in dataclasses.asdict(config).items() if not isinstance(value, Path)}
    names = {"photos": config.photos.resolve().name, "textures": config.textures.resolve().name}
    finish({"benchmark": "segmentation_scene", "settings": settings | names, "rows": rows, "photos": large}, config.out)


def make_set(config: Config, folder: Path) -> None:
    """Writes images/ and masks/ of every split, and classes.csv."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    from experiments.data.files import find_images

    rng = np.random.default_rng(config.seed)
    photos, textures = (find_images(path).files for path in (config.photos, config.textures))
    counts = {"train": config.train, "val": config.val, "test": config.test}
    if sum(counts.values()) > len(photos):
        raise SystemExit(f"{config.photos} holds {len(photos)} photos; {sum(counts.values())} are needed")
    order = iter(rng.permutation(len(photos)))
    digits = load_digits().images
    for split, count in counts.items():
        for part in ("images", "masks"):
            (folder / split / part).mkdir(parents=True, exist_ok=True)
        own = np.flatnonzero(np.arange(len(digits)) % 3 == list(counts).index(split))  # no digit is in two splits
        for number in range(count):
            image, mask = _scene(config.image_size, photos[next(order)], textures, digits[own], rng)
            Image.fromarray(image).save(folder / split / "images" / f"{number:04}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{number:04}.png")
    (folder / "classes.csv").write_text("".join(f"{name}\n" for name in CLASSES))


def _scene(side: int, photo: Path, textures: list[Path], digits: Any, rng: Any) -> tuple[Any, Any]:
    """An image with its mask; later objects cover earlier ones."""
    import numpy as np

    from dinojax.images.decode import decode_rgb
    from dinojax.images.resize import resize_centre_crop

    image = resize_centre_crop(decode_rgb(photo, str(photo)), side, side).copy()
    mask = np.zeros((side, side), np.uint8)
    for _ in range(rng.integers(3, 6)):
        label = int(rng.integers(1, len(CLASSES)))
        inside = _digit(side, digits, rng) if CLASSES[label] == "digit" else _shape(side, CLASSES[label], rng)
        file = textures[rng.integers(len(textures))]
        fill = resize_centre_crop(decode_rgb(file, str(file)), side, side)
        image[inside], mask[inside] = fill[inside], label
    return image, mask


def _shape(side: int, name: str, rng: Any) -> Any:
    """The pixels of a turned ellipse, rectangle or triangle."""
    import numpy as np

    centre, turn = rng.uniform(0.15, 0.85, 2) * side, rng.uniform(0, 2 * math.pi)
    half = rng.uniform(0.1, 0.22, 2) * side
    y, x = np.mgrid[:side, :side] + 0.5
    a = ((x - centre[0]) * math.cos(turn) + (y - centre[1]) * math.sin(turn)) / half[0]
    b = ((y - centre[1]) * math.cos(turn) - (x - centre[0]) * math.sin(turn)) / half[1]
    if name == "ellipse":
        return a**2 + b**2 <= 1
    if name == "rectangle":
        return (abs(a) <= 1) & (abs(b) <= 1)
    return (b >= -1) & (b <= 1 - 2 * abs(a))


def _digit(side: int, digits: Any, rng: Any) -> Any:
    """The strokes of a handwritten digit, 0.3 to 0.5 of the image high."""
    import numpy as np
    from PIL import Image

    size = int(rng.uniform(0.3, 0.5) * side)
    strokes = Image.fromarray(np.uint8(digits[rng.integers(len(digits))] * 15))
    inside = np.zeros((side, side), bool)
    top, left = rng.integers(0, side - size, 2)
    inside[top : top + size, left : left + size] = (
        np.asarray(strokes.resize((size, size), Image.Resampling.BICUBIC)) > 110
    )
    return inside


def _measure(config: Config, place: Path) -> dict[str, Any]:
    """The scores of the head on patch features, of the one on colours, and of calling everything background."""
    from experiments.dense_tasks.config import DenseConfig
    from experiments.dense_tasks.run import train_dense
    from experiments.dense_tasks.task import make_task, window_data
    from experiments.dense_tasks.training import evaluate, train_head
    from experiments.runs.settings import create

    settings = {"folder": place / "set", "classes": place / "set" / "classes.csv", "weights": config.weights,
                "image_size": config.image_size, "blocks": config.blocks, "epochs": config.epochs,
                "seed": config.seed, "out": place / "run", "cache_dir": place / "cache"}  # fmt: skip
    dense = create(DenseConfig, **settings)
    ours = train_dense(dense)
    task = make_task(dense)
    data = window_data(task)
    found = {}
    for around in (1, 3):
        colours = {
            name: dataclasses.replace(one, features=_colours(task, name, one, around)) for name, one in data.items()
        }
        trained = train_head(task, colours["train"], colours["validation"])
        validation, test = (
            evaluate(task, trained.head, name, colours[name], examples=1).metrics for name in ("validation", "test")
        )
        print(
            f"colours of {around}×{around} patches: validation mean IoU {validation['mean_iou']:.3f}", file=sys.stderr
        )
        found[around] = validation["mean_iou"], test
    best = max(found, key=lambda around: found[around][0])
    pixels = task.surveys["test"].pixels[: len(CLASSES)]
    return {
        f"patch features of {config.weights}": dict(ours.metrics["test"]),
        "colour histograms": {**found[best][1], "patches_around": best},
        "all background": {"mean_iou": float(pixels[0] / pixels.sum() / len(CLASSES)),
                           "mean_iou_interval": [float(pixels[0] / pixels.sum() / len(CLASSES))] * 2},
    }  # fmt: skip


def _predict(config: Config, place: Path, size: tuple[int, int]) -> dict[str, Any]:
    """`dinojax predict` on test images side by side, in a process of its own: time, memory, windows and mean IoU."""
    import subprocess
    import time

    import numpy as np
    from PIL import Image

    from dinojax.dense import class_counts, segmentation_scores, tile_starts
    from experiments.dense_tasks.head_file import load_head

    head, whole = load_head(place / "run"), {}
    for part in ("images", "masks"):
        files = sorted((place / "set" / "test" / part).iterdir())
        rows, columns = (-(-side // config.image_size) for side in size)
        tiles = [np.asarray(Image.open(files[i % len(files)])) for i in range(rows * columns)]
        lines = [np.concatenate(tiles[i * columns : (i + 1) * columns], axis=1) for i in range(rows)]
        whole[part] = np.concatenate(lines)[: size[0], : size[1]]
    photo, out = place / f"{size[0]}.png", place / f"predicted-{size[0]}"
    Image.fromarray(whole["images"]).save(photo)
    words = ["experiments.predict", photo, "--run", place / "run", "--image-size", min(size), "--out", out]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _WITH_PEAK, *map(str, words)], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - start
    found = np.asarray(Image.open(out / f"{size[0]}_mask.png"))
    tile, patch = head.geometry.tile(), head.geometry.patch
    starts = [len(tile_starts(round(side / patch), tile, head.geometry.overlap)) for side in size]
    return {
        "pixels": size[0] * size[1],
        "windows": starts[0] * starts[1],
        "seconds": round(seconds, 1),
        "peak_mib": round(int(done.stdout.split()[-1]) / 1024),
        "mean_iou": segmentation_scores(class_counts(found, whole["masks"], len(CLASSES))).mean_iou,
    }


def _colours(task: Any, name: str, data: Any, around: int) -> Any:
    """Root of the histogram of 64 colours of every patch, over `around` × `around` patches."""
    import numpy as np
    from scipy.ndimage import uniform_filter

    from experiments.dense_tasks.windows import window_split

    patch, tile = task.geometry.patch, task.geometry.tile()
    split = window_split(task.folder.splits[name].photos, data.windows, task.geometry)
    features = np.empty((len(data.windows), tile, tile, _BINS**3), np.float16)
    for index in range(len(split)):
        red, green, blue = np.moveaxis(split.read(index).astype(int) * _BINS // 256, -1, 0)
        codes = (red * _BINS + green) * _BINS + blue
        counts = np.eye(_BINS**3, dtype=np.float32)[codes]
        counts = counts.reshape(tile, patch, tile, patch, -1).mean(axis=(1, 3))
        features[index] = np.sqrt(uniform_filter(counts, (around, around, 1), mode="nearest").clip(0))
    return features


if __name__ == "__main__":
    main()
