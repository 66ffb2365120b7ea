"""How good are frozen features? Every classifier on CIFAR-10, or on any images with labels, in one table.

    python -m experiments.cifar10_probe --data cifar10 --weights dinov2_vits14 --classifiers all
    python -m experiments.cifar10_probe --data path/to/folder --weights path/to/weights.pth
    python -m experiments.cifar10_probe --data digits --weights random        (an untrained baseline)

The backbone is not trained. Its features are computed once and cached; classifiers learn from them. What has to be
chosen (an epoch, a learning rate, a penalty) is chosen on training images held out for that; the test images are
classified once, at the end. The run folder gets config.json, metrics.json, the prediction of every image, figures, and
the classifiers themselves, with which `python -m experiments.predict` classifies other images.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from experiments.features.backbones import is_random, load_backbone
from experiments.runs.settings import require, require_positive

if TYPE_CHECKING:
    from experiments.data.splits import Dataset
    from experiments.features.backbones import Backbone
    from experiments.features.extractor import FeatureExtractor

NAMES = ("knn", "knn5", "linear", "sweep", "logistic", "mlp", "mlp_shuffled", "svc", "few_shot")
_LONG_SVC = 10_000  # training images


@dataclasses.dataclass(frozen=True)
class Config:
    """Probes of a frozen backbone; see the top of this file."""

    data: str = "cifar10"
    """"digits" (1,797 scans inside scikit-learn, no download), a folder with train/<class>/… and test/<class>/…
    (also training, val, validation), tiny_imagenet (extracted, zipped or downloaded) or its extracted folder, or a
    TensorFlow Datasets name such as cifar10, cifar100, stl10."""
    weights: str = "dinov2_vits14"
    """A published checkpoint by its torch.hub name (dino_vits16 … dinov2_vitg14_reg), dinojax_vitt (a small one trained
    on CIFAR-10, inside the package: no download), a .pth or .safetensors file, a
    folder made by `python -m converters`, the run folder RUN of a training (its teacher; RUN/student is the student),
    "random" (ViT-S/14 that was never trained) or "random:NAME"."""
    classifiers: str = "knn,linear"
    """"all", or some of: knn (DINO's weighted cosine votes, k = 20), knn5 (Euclidean majority, k = 5), linear, sweep
    (DINOv2's 52 linear heads, the best refitted), logistic (45 penalties), mlp (384→256→classes, batch 64 in file
    order), mlp_shuffled (batch 32), svc (scikit-learn, RBF; minutes from 10,000 images on), few_shot."""
    protocol: Literal["heldout", "seed"] = "heldout"
    """heldout chooses epochs and heads on held-out training images; seed on the test set, as the notebooks this
    repeats: its numbers are optimistic and marked "selected on the test set"."""
    image_size: int = 224
    """Pixels. The shorter side is resized to it (bicubic, antialiased), the rest is cut off around the centre."""
    augment: int = 0
    """Random views (crop of 60–100 %, flip) of every training image that linear, sweep and both MLPs learn from as
    well. Each takes as long to compute as the training images, and is cached as they are."""
    max_train: int | None = None
    """Use only this many training images, drawn from every class in proportion. The time grows with it."""
    max_test: int | None = None
    """Likewise for test images."""
    batch_size: int | None = None
    """Images per forward pass. Default: what the cache of a CPU holds, 256 on a GPU or TPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the backbone computes in; auto is float32 on a CPU and bfloat16 elsewhere."""
    epochs: int = 5
    """Epochs of the linear probe."""
    learning_rate: float = 1e-2
    """Peak learning rate of the linear probe (Adam, cosine schedule, standardised features)."""
    probe_batch_size: int = 64
    """Features per step of the linear probe."""
    mlp_epochs: int = 25
    """Epochs of both MLPs (Adam, 1e-3)."""
    sweep_steps: int = 12_500
    """Steps of the sweep, 128 features each."""
    svc_standardise: bool = False
    """Standardise the features for the SVC; the notebook takes them raw."""
    shots: int = 5
    """Training images per class of few_shot, drawn anew five times."""
    heldout_fraction: float = 0.1
    """Share of the training images that is held out to choose on."""
    map: Literal["pca", "tsne"] = "pca"
    """How the features of the test images are drawn in the plane. t-SNE takes up to a minute."""
    figures: bool = True
    """Draw figures; some seconds per classifier."""
    seed: int = 0
    """Of the random weights, of the images drawn and held out, of the order of minibatches and of the intervals."""
    out: Path | None = None
    """The run folder. Default: runs/cifar10_probe/<date-time>."""
    cache_dir: Path = Path("~/.cache/dinojax")
    """Where features and downloaded weights are kept."""
    data_dir: Path | None = None
    """Where TensorFlow Datasets keeps its files (default: its own, ~/tensorflow_datasets), and where
    tiny-imagenet-200 was extracted or lies as a zip (default: the working folder)."""


@dataclasses.dataclass(frozen=True)
class Result:
    """`metrics` is what metrics.json holds; accuracies are fractions."""

    metrics: Mapping[str, Any]
    folder: Path


def run(config: Config) -> Result:
    """Runs the whole experiment.

    Raises:
        UserError: data, weights or settings that cannot be used; within seconds where that can be known beforehand.
    """
    names = _check(config)
    from experiments.data.load import load_dataset
    from experiments.features.extractor import FeatureExtractor
    from experiments.probing import report
    from experiments.probing.fitting import check_labels
    from experiments.runs import records

    cache_dir, out = config.cache_dir.expanduser(), config.out or records.default_run_folder("cifar10_probe")
    with records.run_folder(out) as folder:
        limits = {"max_train": config.max_train, "max_test": config.max_test, "seed": config.seed}
        dataset = load_dataset(config.data, data_dir=config.data_dir, **limits)
        check_labels(names, dataset, config.shots)
        backbone = load_backbone(config.weights, seed=config.seed, cache_dir=cache_dir)
        extractor = FeatureExtractor(
            backbone.model,
            normalisation=backbone.normalisation,
            image_size=config.image_size,
            cache_dir=cache_dir,
            dtype=config.dtype,
            batch_size=config.batch_size,
        )
        _introduce(config, names, dataset, extractor)
        metrics, shown = _probe(config, names, dataset, backbone, extractor, folder)
        records.write_json(folder / records.METRICS_FILE, {**metrics, "environment": records.environment()})
        records.write_json(folder / records.CONFIG_FILE, dataclasses.asdict(config))
        files = sorted(file.name for file in folder.iterdir())
    print(f"{shown}\n\n{report.listing(out, files)}")
    return Result(metrics, out)


def _check(config: Config) -> list[str]:
    """The classifiers asked for, in their usual order."""
    positive = ("image_size", "max_train", "max_test", "batch_size", "epochs", "probe_batch_size", "mlp_epochs",
                "sweep_steps", "shots", "learning_rate")  # fmt: skip
    require_positive(config, positive)
    if config.augment < 0:
        raise UserError(f"--augment {config.augment} is negative; 0 is without augmented views")
    require(0 < config.heldout_fraction < 1, "heldout_fraction", config.heldout_fraction, "between 0 and 1")
    asked = [name.strip() for name in config.classifiers.split(",")]
    if asked == ["all"]:
        return list(NAMES)
    for name in asked:
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"take all, or some of {','.join(NAMES)}"
            raise UserError(f"--classifiers {config.classifiers}: {name!r} is none; {hint}")
    return [name for name in NAMES if name in asked]


def _probe(
    config: Config,
    names: Sequence[str],
    dataset: "Dataset",
    backbone: "Backbone",
    extractor: "FeatureExtractor",
    folder: Path,
) -> tuple[dict[str, Any], str]:
    """Metrics and the table to print; writes classifiers, predictions and figures."""
    from experiments.data.views import augmented
    from experiments.probing import report
    from experiments.probing.classifiers import save_classifiers
    from experiments.probing.fitting import Settings
    from experiments.probing.judging import SealedTest, judge
    from experiments.runs.measure import PEAK_MEMORY, measured

    with measured() as features_cost:
        splits = [augmented(dataset.train, view, config.image_size) for view in range(config.augment)]
        train, test, *views = extractor.extract([dataset.train, dataset.test, *splits])
    shared = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(**{name: getattr(config, name) for name in shared})
    judged, few_shot = judge(names, dataset, train, views, SealedTest(test, dataset.test.labels), settings, folder)
    subject = f"{dataset.name}, {config.weights}{_untrained(config)}, {config.image_size} px"
    if config.figures:
        print("drawing the figures", flush=True)
        report.draw(folder, dataset, judged, subject=subject, seed=config.seed)
        report.draw_map(folder, dataset, test, method=config.map, subject=subject, seed=config.seed)
    description = _description(config, dataset, backbone, extractor)
    save_classifiers(folder, [one.fit.classifier for one in judged.values()], description)
    metrics = {
        "dataset": _describe(dataset),
        "untrained_baseline": is_random(config.weights),
        "protocol": config.protocol,
        "classifiers": {name: one.as_json() for name, one in judged.items()},
        **({"few_shot": {"shots": config.shots, "test_accuracy": few_shot}} if few_shot else {}),
        "cost": {name: one.cost_as_json() for name, one in judged.items()},
        "peak_memory": PEAK_MEMORY,
        "features_seconds": round(features_cost.seconds, 3),
        "feature_dtype": extractor.dtype.name,
    }
    shown = f"\n{subject}\n{report.table(judged, few_shot, config.shots)}\n"
    return metrics, f"{shown}{'features':23}{features_cost.seconds:53.1f}"


def _description(
    config: Config, dataset: "Dataset", backbone: "Backbone", extractor: "FeatureExtractor"
) -> dict[str, Any]:
    """What the classifiers expect; with it `predict` makes the same features of other images."""
    path = Path(backbone.weights).expanduser()
    return {
        "weights": str(path.resolve()) if path.exists() else config.weights,
        "weights_fingerprint": extractor.fingerprint,
        "normalisation": backbone.normalisation,
        "seed": config.seed,
        "image_size": config.image_size,
        "dtype": extractor.dtype.name,
        "class_names": list(dataset.class_names),
        "protocol": config.protocol,
    }


def _describe(dataset: "Dataset") -> dict[str, Any]:
    return {
        "name": dataset.name,
        "classes": len(dataset.class_names),
        **{f"{s.name}_images": len(s) for s in (dataset.train, dataset.test)},
        **{f"{s.name}_fingerprint": s.fingerprint for s in (dataset.train, dataset.test)},
    }


def _untrained(config: Config) -> str:
    return " (UNTRAINED BASELINE)" if is_random(config.weights) else ""


def _introduce(config: Config, names: Sequence[str], dataset: "Dataset", extractor: "FeatureExtractor") -> None:
    """What will be done, before anything slow; flushed, because logs may be files."""
    import jax

    for note in dataset.notes:
        print(f"note: {note}")
    print(
        f"{dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} test images, "
        f"{len(dataset.class_names)} classes\n"
        f"{config.weights}: {extractor.parameters / 1e6:.1f} M parameters, {config.image_size} px, "
        f"{extractor.dtype.name} on {jax.devices()[0].device_kind}"
    )
    if is_random(config.weights):
        print("UNTRAINED BASELINE: these weights are random, the numbers below show what architecture alone gives")
    if config.protocol == "seed":
        print("PROTOCOL seed: what is chosen is chosen on the test set; such numbers are optimistic and marked below")
    if "svc" in names and len(dataset.train) > _LONG_SVC:
        print(f"svc: scikit-learn takes minutes for {len(dataset.train):,} training images, on one core")
    print(flush=True)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(tyro.cli(Config, args=args, description=__doc__))


if __name__ == "__main__":
    main()
