"""How good are frozen features? k-NN and a linear probe on CIFAR-10, or on any images with labels.

    python -m experiments.cifar10_probe --data cifar10 --weights dinov2_vits14
    python -m experiments.cifar10_probe --data path/to/folder --weights path/to/weights.pth
    python -m experiments.cifar10_probe --data digits --weights random        (an untrained baseline)

The backbone is not trained. Its features are computed once, cached, and classified by DINO's weighted k-NN and by one
linear layer on the CLS token, whose best epoch is chosen on training images held out for that; the test images are
classified once, at the end. The run folder gets config.json, metrics.json, linear_head.safetensors and figures.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tyro

from dinojax.errors import UserError, exit_on_user_error
from experiments.harness.backbones import is_random, load_backbone

if TYPE_CHECKING:
    from dinojax import VisionTransformer
    from experiments.harness.datasets import Dataset

KS = (10, 20, 100, 200)
HEADLINE_K = 20
_EXAMPLES = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Probes of a frozen backbone; see the top of this file."""

    data: str = "cifar10"
    """"digits" (1,797 scans inside scikit-learn, no download), a folder with train/<class>/… and test/<class>/…
    (also training, val, validation), or a TensorFlow Datasets name such as cifar10, cifar100, stl10."""
    weights: str = "dinov2_vits14"
    """A published checkpoint by its torch.hub name (dino_vits16 … dinov2_vitg14_reg), a .pth or .safetensors file, a
    folder made by `python -m converters`, "random" (ViT-S/14 that was never trained) or "random:NAME"."""
    image_size: int = 224
    """Pixels. The shorter side is resized to it (bicubic, antialiased), the rest is cut off around the centre."""
    max_train: int | None = None
    """Use only this many training images, drawn from every class in proportion. The time grows with it."""
    max_test: int | None = None
    """Likewise for test images."""
    batch_size: int | None = None
    """Images per forward pass. Default: 8 on a CPU, 256 on a GPU or TPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the backbone computes in; auto is float32 on a CPU and bfloat16 elsewhere."""
    epochs: int = 5
    """Epochs of the linear probe."""
    learning_rate: float = 1e-2
    """Peak learning rate of the linear probe (Adam, cosine schedule, standardised features)."""
    probe_batch_size: int = 64
    """Features per step of the linear probe."""
    heldout_fraction: float = 0.1
    """Share of the training images that the linear probe does not learn from but chooses its best epoch on."""
    seed: int = 0
    """Of the random weights, of the images drawn and held out, and of the order of minibatches."""
    out: Path | None = None
    """The run folder. Default: runs/cifar10_probe/<date-time>."""
    cache_dir: Path = Path("~/.cache/dinojax")
    """Where features and downloaded weights are kept."""
    data_dir: Path | None = None
    """Where TensorFlow Datasets keeps its files. Default: its own, ~/tensorflow_datasets."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Accuracies are fractions. `knn_accuracy` is by k; `metrics` is what metrics.json holds."""

    knn_accuracy: Mapping[int, float]
    linear_train_accuracy: float
    linear_test_accuracy: float
    metrics: Mapping[str, Any]
    folder: Path


def run(config: Config) -> Result:
    """Runs the whole experiment.

    Raises:
        UserError: data, weights or settings that cannot be used; within seconds where that can be known beforehand.
    """
    from experiments.harness import records
    from experiments.harness.datasets import load_dataset
    from experiments.harness.features import LAST_CLS, FeatureExtractor

    _check(config)
    cache_dir, out = config.cache_dir.expanduser(), config.out or records.default_run_folder("cifar10_probe")
    with records.run_folder(out) as folder:
        seconds: dict[str, float] = {}
        limits = {"max_train": config.max_train, "max_test": config.max_test, "seed": config.seed}
        dataset = load_dataset(config.data, data_dir=config.data_dir, **limits)
        model = load_backbone(config.weights, seed=config.seed, cache_dir=cache_dir)
        extractor = FeatureExtractor(
            model,
            image_size=config.image_size,
            dtype=config.dtype,
            batch_size=config.batch_size,
            cache_dir=cache_dir,
        )
        _introduce(config, dataset, model, extractor.dtype.name)
        with _stopwatch(seconds, "features"):
            features = extractor.extract([dataset.train, dataset.test])
        train, test = (np.ascontiguousarray(array[:, LAST_CLS]) for array in features)
        with _stopwatch(seconds, "knn"):
            knn = _knn(dataset, train, test)
        with _stopwatch(seconds, "linear"):
            linear, logits = _linear(config, dataset, train, test, folder)
        _draw_examples(config, dataset, logits, folder)
        metrics = {
            "dataset": _describe(dataset),
            "untrained_baseline": is_random(config.weights),
            "knn": {"test_accuracy": {str(k): accuracy for k, accuracy in knn.items()}, "temperature": 0.07},
            "linear": linear,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "feature_dtype": extractor.dtype.name,
            "environment": records.environment(),
        }
        records.write_json(folder / records.METRICS_FILE, metrics)
        records.write_json(folder / records.CONFIG_FILE, dataclasses.asdict(config))
        files = sorted(file.name for file in folder.iterdir())
    result = Result(knn, linear["train_accuracy"], linear["test_accuracy"], metrics, out)
    _print_table(config, dataset, result, files)
    return result


def _check(config: Config) -> None:
    for name in ("image_size", "max_train", "max_test", "batch_size", "epochs", "probe_batch_size"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is not a positive number")
    if not 0 < config.heldout_fraction < 1:
        raise UserError(f"--heldout-fraction {config.heldout_fraction} is not between 0 and 1")
    if not config.learning_rate > 0:
        raise UserError(f"--learning-rate {config.learning_rate} is not a positive number")


def _knn(dataset: "Dataset", train: np.ndarray, test: np.ndarray) -> dict[int, float]:
    """Test accuracy for every k that the training set is large enough for."""
    from dinojax.probe import knn_predict

    ks = [k for k in KS if k <= len(train)] or [len(train)]
    predicted = knn_predict(train, dataset.train.labels, test, num_classes=len(dataset.class_names), ks=ks)
    return {k: float(np.mean(classes == dataset.test.labels)) for k, classes in predicted.items()}


def _linear(
    config: Config, dataset: "Dataset", train: np.ndarray, test: np.ndarray, folder: Path
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Metrics, and the logits of all training and test images; writes the head and the curves."""
    import jax
    from safetensors.numpy import save

    from dinojax import probe
    from experiments.harness.figures import save_curves

    labels = dataset.train.labels
    kept, heldout = probe.split_heldout(labels, config.heldout_fraction, config.seed)
    head, history, best = probe.fit_linear(
        train[kept],
        labels[kept],
        train[heldout],
        labels[heldout],
        num_classes=len(dataset.class_names),
        key=jax.random.key(config.seed),
        epochs=config.epochs,
        batch_size=config.probe_batch_size,
        learning_rate=config.learning_rate,
    )
    arrays = {name: np.asarray(array) for name, array in head._asdict().items()}
    names = {f"class_{index}": name for index, name in enumerate(dataset.class_names)}
    content = save(arrays, metadata={"input": "CLS after the final norm", **names})
    (folder / "linear_head.safetensors").write_bytes(content)
    curves = {name: np.asarray(values) for name, values in history._asdict().items()}
    on_train, on_heldout = (
        {name: curves[f"{part}_{name}"] for name in ("loss", "accuracy")} for part in ("train", "heldout")
    )
    save_curves(folder / "curves.png", on_train, on_heldout, best_epoch=best, title=_title(config, dataset))
    logits = [np.asarray(probe.linear_logits(head, features)) for features in (train, test)]
    train_hits, test_hits = (
        scores.argmax(axis=1) == split.labels for scores, split in zip(logits, (dataset.train, dataset.test))
    )
    metrics = {
        "train_accuracy": float(train_hits.mean()),  # of all training images, the held-out ones among them
        "test_accuracy": float(test_hits.mean()),
        "selection": "epoch with the highest accuracy on held-out training images; the test set was read once",
        "best_epoch": best + 1,
        "heldout_accuracy": float(curves["heldout_accuracy"][best]),
        "heldout_images": len(heldout),
        "curves": {name: values.tolist() for name, values in curves.items()},
    }
    return metrics, logits


def _draw_examples(config: Config, dataset: "Dataset", logits: Sequence[np.ndarray], folder: Path) -> None:
    from scipy.special import softmax

    from experiments.harness.figures import save_predictions

    for split, scores in zip((dataset.train, dataset.test), logits):
        hits = scores.argmax(axis=1) == split.labels
        chosen = _examples(hits, config.seed)
        save_predictions(
            folder / f"predictions_{split.name}.png",
            [split.read(int(i)) for i in chosen],
            split.labels[chosen],
            softmax(scores[chosen], axis=1),
            dataset.class_names,
            title=f"{_title(config, dataset)}: {100 * hits.mean():.1f} % of the {split.name} images are right",
        )


def _examples(hits: np.ndarray, seed: int) -> np.ndarray:
    """Up to so many right and so many wrong images, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(hits))
    return np.concatenate([order[hits[order]][:_EXAMPLES], order[~hits[order]][:_EXAMPLES]])


def _describe(dataset: "Dataset") -> dict[str, Any]:
    return {
        "name": dataset.name,
        "classes": len(dataset.class_names),
        **{f"{s.name}_images": len(s) for s in (dataset.train, dataset.test)},
        **{f"{s.name}_fingerprint": s.fingerprint for s in (dataset.train, dataset.test)},
    }


def _title(config: Config, dataset: "Dataset") -> str:
    note = " (untrained baseline)" if is_random(config.weights) else ""
    return f"Linear probe on {dataset.name}, {config.weights}{note}, {config.image_size} px"


def _introduce(config: Config, dataset: "Dataset", model: "VisionTransformer", dtype: str) -> None:
    """What will be done, before anything slow; flushed, because logs may be files."""
    import jax

    from dinojax.checkpoint import named_parameters

    for note in dataset.notes:
        print(f"note: {note}")
    numbers = sum(array.size for array in named_parameters(model).values())
    print(
        f"{dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} test images, "
        f"{len(dataset.class_names)} classes\n"
        f"{config.weights}: {numbers / 1e6:.1f} M parameters, {config.image_size} px, {dtype} on "
        f"{jax.devices()[0].device_kind}"
    )
    if is_random(config.weights):
        print("UNTRAINED BASELINE: these weights are random, the numbers below show what architecture alone gives")
    print(flush=True)


def _print_table(config: Config, dataset: "Dataset", result: Result, files: Sequence[str]) -> None:
    seconds, linear = result.metrics["seconds"], result.metrics["linear"]
    k, others = (HEADLINE_K if HEADLINE_K in result.knn_accuracy else max(result.knn_accuracy)), ""
    if len(result.knn_accuracy) > 1:
        others = ", ".join(f"k={n} {100 * a:.2f}" for n, a in result.knn_accuracy.items() if n != k)
    note = "   UNTRAINED BASELINE" if is_random(config.weights) else ""
    print(f"\n{dataset.name}, {config.weights}, {config.image_size} px{note}")
    print(f"{'':22}{'train %':>9}{'test %':>9}{'seconds':>9}")
    print(f"{f'k-NN (k={k})':22}{'–':>9}{100 * result.knn_accuracy[k]:9.2f}{seconds['knn']:9.1f}   {others}")
    print(
        f"{'linear probe':22}{100 * result.linear_train_accuracy:9.2f}{100 * result.linear_test_accuracy:9.2f}"
        f"{seconds['linear']:9.1f}   epoch {linear['best_epoch']} of {config.epochs}, "
        f"selected on {linear['heldout_images']:,} held-out training images"
    )
    print(f"{'features':22}{'':18}{seconds['features']:9.1f}\n")
    for file in files:
        print(f"  {result.folder / file}")


@contextmanager
def _stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(tyro.cli(Config, args=args, description=__doc__))


if __name__ == "__main__":
    main()
