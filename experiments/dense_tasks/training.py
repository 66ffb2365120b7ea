"""The training of a dense head on cached features, and its evaluation on whole photos."""

import dataclasses
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dinojax.dense import (
    DenseHead,
    bin_depth,
    class_counts,
    depth_loss,
    depth_scores,
    fold,
    head_optimizer,
    init_head_state,
    make_head_step,
    mean_iou_interval,
    segmentation_loss,
    segmentation_scores,
)
from dinojax.errors import UserError
from experiments.dense_tasks.head_file import HeadFile
from experiments.dense_tasks.photos import blended, predicted
from experiments.dense_tasks.targets import DepthMap, Mask
from experiments.dense_tasks.task import Task, WindowData, scaled_features
from experiments.features.fingerprints import fingerprint

RESAMPLES = 1000
_MOST_KEPT = 200  # photos whose scores are kept for figures
_PERCENT = (2.5, 97.5)


class Trained(NamedTuple):
    """The head of the best epoch, and what every epoch gave.

    Attributes:
        head: with all that prediction needs.
        best_epoch: its number, from 1.
        epochs: loss, validation score and seconds of each epoch.
    """

    head: HeadFile
    best_epoch: int
    epochs: list[dict[str, float]]


def selection(task: Task) -> str:
    """The score on the validation windows that chooses the epoch."""
    return "mean_iou" if task.depth_range is None else "rmse"


def train_head(task: Task, train: WindowData, validation: WindowData) -> Trained:
    """Trains all epochs and keeps the best one: highest mean IoU, or lowest RMSE, on the validation windows.

    Raises:
        UserError: a loss that is not finite.
    """
    config = task.config.head
    batch = min(config.batch_windows, len(train.windows))
    per_epoch = len(train.windows) // batch
    steps = config.epochs * per_epoch
    optimizer = head_optimizer(
        config.learning_rate,
        steps,
        warmup_steps=round(config.warmup * steps),
        weight_decay=config.weight_decay,
    )
    step = make_head_step(_loss(task), optimizer)
    key, rng = jax.random.key(task.config.run.seed), np.random.default_rng(task.config.run.seed)
    state = init_head_state(key, train.features.shape[-1], task.outputs, optimizer)
    template = _without_head(task)
    best, epochs, sign = None, [], 1 if task.depth_range is None else -1
    with tqdm(total=config.epochs, desc="head", unit="epoch", dynamic_ncols=True) as bar:
        for epoch in range(1, config.epochs + 1):
            started, losses = time.perf_counter(), []
            order = rng.permutation(len(train.windows))[: per_epoch * batch].reshape(per_epoch, batch)
            for rows in order:
                state, loss = step(state, jnp.asarray(train.features[rows]), jnp.asarray(train.targets[rows]))
                losses.append(loss)
            mean = float(np.mean(jax.device_get(losses)))
            if not math.isfinite(mean):
                raise UserError(
                    f"the loss of epoch {epoch} is {mean}; pass a lower --learning-rate than {config.learning_rate:g}"
                )
            seconds = time.perf_counter() - started
            folded = DenseHead(*map(np.asarray, fold(state.parameters, state.statistics)))
            head = dataclasses.replace(template, head=folded)
            score = _window_score(task, head, validation)
            epochs.append({"epoch": epoch, "train_loss": mean, selection(task): score, "seconds": round(seconds, 3)})
            if best is None or sign * score > sign * best[0] or math.isnan(best[0]):
                best = score, epoch, head
            bar.update()
            bar.set_postfix({"loss": f"{mean:.3f}", selection(task): f"{score:.3f}"})
    return Trained(best[2], best[1], epochs)


def _without_head(task: Task) -> HeadFile:
    """All that prediction needs besides the head."""
    config, backbone = task.config, task.backbone
    return HeadFile(
        task=config.data.task,
        head=None,
        class_names=task.class_names,
        colours=task.colours,
        depth_range=task.depth_range,
        geometry=task.geometry,
        blocks=config.model.blocks,
        scales=config.head.scales,
        backbone={
            "weights": backbone.weights,
            "fingerprint": fingerprint(backbone.model),
            "normalisation": [list(map(float, numbers)) for numbers in backbone.normalisation],
            "seed": config.run.seed,
            "dtype": config.model.dtype,
        },
    )


def _loss(task: Task) -> Any:
    if task.depth_range is None:
        return segmentation_loss
    return lambda scores, truth: depth_loss(bin_depth(scores, *task.depth_range), truth)


def _window_score(task: Task, head: HeadFile, data: WindowData) -> float:
    """Mean IoU over all pixels of the windows, or the mean RMSE of the windows."""
    parts = range(0, len(data.windows), 64)
    scores = (one for start in parts for one in np.asarray(head.scores(data.features[start : start + 64])))
    size = data.targets.shape[1:]
    if task.depth_range is None:
        classes = len(task.class_names)
        pairs = zip(scores, data.targets)
        return segmentation_scores(sum(class_counts(predicted(head, [s], size), t, classes) for s, t in pairs)).mean_iou
    rmse = [depth_scores(predicted(head, [s], size), t).rmse for s, t in zip(scores, data.targets)]
    return float(np.nanmean(rmse)) if np.isfinite(rmse).any() else math.nan


@dataclasses.dataclass(frozen=True)
class Example:
    """A photo of an evaluated split by its number, its score, its truth and its prediction."""

    photo: int
    score: float
    truth: Mask | DepthMap
    prediction: Mask | DepthMap


class Evaluation(NamedTuple):
    """Scores of a split as JSON, and examples from the worst to the best photo."""

    metrics: dict[str, Any]
    examples: list[Example]


def evaluate(task: Task, head: HeadFile, name: str, data: WindowData, *, examples: int) -> Evaluation:
    """Evaluates a head on the whole photos of a split, at their own size and over all scales.

    Args:
        task: the pairs.
        head: a trained one.
        name: of the split.
        data: its windows at the size of training.
        examples: number of photos to keep.
    """
    pairs, sizes = task.folder.splits[name], task.surveys[name].sizes
    streams = []
    for scale in head.scales:
        windows, features = (
            (data.windows, data.features) if scale == 1 else scaled_features(task, pairs.photos, name, scale)
        )
        streams.append(blended(head, windows, [features], sizes, task.geometry, scale))
    kept, counts, scores, apart = {}, [], [], -(-len(sizes) // _MOST_KEPT)
    for photo, grids in enumerate(tqdm(zip(*streams), f"{name} images", len(sizes), unit="img", dynamic_ncols=True)):
        truth = task.reader.read(pairs.targets.files[photo], sizes[photo])
        found = predicted(head, grids, sizes[photo])
        if task.depth_range is None:
            counts.append(class_counts(found, truth, len(task.class_names)))
            scores.append(segmentation_scores(counts[-1]).pixel_accuracy)
        else:
            counts.append(depth_scores(found, truth))
            scores.append(counts[-1].delta1)
        if photo % apart == 0:
            kept[photo] = grids
    metrics = _segmentation(task, counts) if task.depth_range is None else _depth(counts, task.config.run.seed)
    shown = []
    for photo in _spread([i for i in np.argsort(scores, kind="stable").tolist() if i in kept], scores, examples):
        truth = task.reader.read(pairs.targets.files[photo], sizes[photo])
        shown.append(Example(photo, scores[photo], truth, predicted(head, kept[photo], sizes[photo])))
    return Evaluation({"images": len(sizes), **metrics}, shown)


def _spread(ranked: list[int], scores: list[float], count: int) -> list[int]:
    """Photos from the worst to the best, evenly spread over the ranks; those without a score are left out."""
    ranked = [photo for photo in ranked if not math.isnan(scores[photo])]
    return [ranked[i] for i in np.unique(np.linspace(0, len(ranked) - 1, count).round().astype(int))] if ranked else []


def _segmentation(task: Task, counts: list[np.ndarray]) -> dict[str, Any]:
    every = np.stack(counts)
    scores = segmentation_scores(every.sum(axis=0))
    interval = mean_iou_interval(every, seed=task.config.run.seed, resamples=RESAMPLES)
    return {
        "mean_iou": scores.mean_iou,
        "mean_iou_interval": list(interval),
        "pixel_accuracy": scores.pixel_accuracy,
        "mean_accuracy": scores.mean_accuracy,
        "class_iou": {
            name: None if math.isnan(value) else float(value) for name, value in zip(task.class_names, scores.class_iou)
        },
    }


def _depth(errors: list[Any], seed: int) -> dict[str, Any]:
    """Means over the images, each with its 95 % bootstrap interval."""
    values = np.array(errors)
    values = values[np.isfinite(values).all(axis=1)]
    if not len(values):
        return {"measured_images": 0}
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    intervals = np.percentile(values[drawn].mean(axis=1), _PERCENT, axis=0).T.tolist()
    names = ("rmse", "abs_rel", "delta1")
    means = dict(zip(names, values.mean(axis=0).tolist()))
    return {"measured_images": len(values), **means, "interval": dict(zip(names, intervals))}
