"""The classes of ImageNet that a published classifier sees in photos."""

import csv
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from dinojax.embedding import default_batch
from dinojax.heads import Classifier
from dinojax.images import normalize
from experiments.data.splits import Split
from experiments.data.squares import centre_cropped
from experiments.probing.classifiers import Prediction

TOP = 5
_LARGER = 256 / 224  # the shorter side before the crop, as in the official evaluation


def classify(classifier: Classifier, split: Split, *, size: int, batch_size: int | None = None) -> Prediction:
    """Probabilities of all classes for every image of a split.

    Args:
        classifier: with its preprocessing.
        split: images of any sizes.
        size: side in pixels of the centre crop; before it, the shorter side is resized to 256/224 of that.
        batch_size: images per pass; None takes what a CPU's cache holds.
    """
    squares = centre_cropped(split, round(_LARGER * size), size, interpolation=classifier.preprocessing.interpolation)
    batch = min(len(split), batch_size or default_batch(classifier.backbone, (1, size, size, 3)))
    graphdef, state = nnx.split(classifier)

    @jax.jit
    def probabilities(state: Any, pixels: jax.Array) -> jax.Array:
        return jax.nn.softmax(nnx.merge(graphdef, state)(normalize(pixels, classifier.preprocessing)), axis=-1)

    found = []
    for start in tqdm(range(0, len(split), batch), desc="model", unit="batch", dynamic_ncols=True):
        rows = [min(row, len(split) - 1) for row in range(start, start + batch)]  # the last batch is filled up
        pixels = np.stack([squares.read(row) for row in rows])
        found.append(np.asarray(probabilities(state, pixels), np.float32)[: len(split) - start])
    scores = np.concatenate(found)
    return Prediction(scores.argmax(axis=1), scores)


def best(scores: np.ndarray) -> list[int]:
    """The classes of the highest scores of one image, at most five, the highest first."""
    return [int(index) for index in np.argsort(-scores, kind="stable")[:TOP]]


def write_csv(path: Path, split: Split, found: Prediction, class_names: tuple[str, ...]) -> None:
    """Writes the five likeliest classes of each image, one a row."""
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "rank", "class", "probability"))
        for name, scores in zip(split.ids, found.scores):
            for rank, index in enumerate(best(scores), start=1):
                writer.writerow((name, rank, class_names[index], f"{scores[index]:.6f}"))


def lines(split: Split, found: Prediction, class_names: tuple[str, ...], most: int) -> list[str]:
    """The five likeliest classes of the first images, one line an image, by their first names."""
    shown = range(min(most, len(split)))
    width = min(40, max(len(split.ids[row]) for row in shown))
    told = []
    for row in shown:
        name = split.ids[row] if len(split.ids[row]) <= width else f"…{split.ids[row][1 - width :]}"
        scores = found.scores[row]
        words = (f"{first_name(class_names[index])} {100 * scores[index]:.0f} %" for index in best(scores))
        told.append(f"{name.ljust(width)}  {', '.join(words)}")
    return told


def first_name(names: str) -> str:
    """The first of the names of a class."""
    return names.split(",")[0]
