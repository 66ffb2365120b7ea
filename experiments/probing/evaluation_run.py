"""An evaluation from its settings to the files in its folder: config.json, result.json, figures; and the table."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from dinojax.errors import UserError
from dinojax.models.vit import VisionTransformer
from experiments.data.splits import Dataset
from experiments.features.backbones import NETWORKS, Backbone, find_network, find_networks, is_random, load_backbone
from experiments.features.extractor import LAST_BLOCKS, FeatureExtractor
from experiments.features.raw_pixels import RawPixels
from experiments.probing.evaluation import OTHER, PIXELS, UNTRAINED, Fold, Row, extract, judge_network, make_fold
from experiments.probing.evaluation_config import EvaluationConfig
from experiments.probing.evaluation_report import save_accuracies, save_probe_curves, table
from experiments.probing.fitting import check_labels
from experiments.runs import records


def evaluate(config: EvaluationConfig, dataset: Dataset, *, command: str, folds: Sequence[Fold] | None = None) -> Path:
    """Judges all networks and writes the folder; whole or not at all. Features that were computed stay cached.

    Args:
        config: the settings.
        dataset: images and labels.
        command: of which this is a run.
        folds: official ones; None is one fold of all training images.

    Returns:
        The folder.

    Raises:
        UserError: weights, data or settings that cannot be used.
    """
    check_labels(config.names, dataset, config.shots)
    folds = folds or [make_fold(dataset.train.labels, config)]
    out = (config.out or records.default_run_folder(command)).expanduser()
    with records.run_folder(out) as folder:
        backbones = load_networks(config)
        known = pretraining(next(iter(backbones.values())))
        extractors = {name: make_extractor(config, backbone) for name, backbone in backbones.items()}
        _introduce(config, dataset, backbones, extractors, folds)
        rows, seconds = [], {}
        pixels = {PIXELS: RawPixels(next(iter(extractors.values())).image_size)} if config.pixels else {}
        for name, extractor in {**extractors, **pixels}.items():
            started = time.perf_counter()
            learning, test = extract(config, extractor, dataset, folds)
            extracted = time.perf_counter()
            blocks = backbones[name].model.config.depth if name in backbones else 0
            rows += judge_network(name, config, learning, test, dataset, folds, blocks)
            seconds[name] = {"features": extracted - started, "classifiers": time.perf_counter() - extracted}
        subject = f"{_subject(config)} on {dataset.name}, {next(iter(extractors.values())).image_size} px"
        if config.figures:
            save_accuracies(folder / "accuracies.png", rows, title=subject)
            save_probe_curves(folder, rows, subject)
        result = _result(command, config, dataset, backbones, extractors, folds, rows)
        records.write_json(folder / records.RESULT_FILE, {**result, "pretraining": known, "seconds": seconds})
        records.write_json(folder / records.CONFIG_FILE, dataclasses.asdict(config))
        files = sorted(file.name for file in folder.iterdir())
    print(f"\n{subject}\n{table(rows, len(dataset.test), len(folds))}\n")
    print("\n".join(f"  {out / file}" for file in files))
    return out


def load_networks(config: EvaluationConfig) -> dict[str, Backbone]:
    """The networks to judge, by name.

    Raises:
        UserError: no such weights, or no such network in the run folder.
    """
    options = {"seed": config.seed, "cache_dir": config.cache_dir.expanduser()}
    found = find_networks(config.weights)
    if config.network != "all":
        found = {config.network: find_network(config.weights, config.network)}
    if not found:
        name = Path(config.weights).name
        found = {name if name in NETWORKS else OTHER: config.weights}
    backbones = {name: load_backbone(weights, **options) for name, weights in found.items()}
    if config.untrained:
        first = next(iter(backbones.values()))
        drawn = VisionTransformer(first.model.config, rngs=nnx.Rngs(config.seed))
        backbones[UNTRAINED] = first._replace(model=drawn, weights=UNTRAINED)
    return backbones


def make_extractor(config: EvaluationConfig, backbone: Backbone) -> FeatureExtractor:
    """The backbone as a maker of cached features, at the size asked for or at its own.

    Raises:
        UserError: a size that the model does not take.
    """
    extractor = FeatureExtractor(
        backbone.model,
        normalisation=backbone.normalisation,
        image_size=config.image_size or backbone.image_size,
        cache_dir=config.cache_dir.expanduser(),
        dtype=config.dtype,
        batch_size=config.batch_size,
    )
    if config.resize is not None and config.resize < extractor.image_size:
        raise UserError(f"--resize {config.resize} is less than the {extractor.image_size} px that are cut out of it")
    return extractor


def pretraining(backbone: Backbone) -> dict[str, Any]:
    """What is known of how the weights were made: what is kept beside them, and the result of their training."""
    known = {name: value for name, value in backbone.source.items() if name not in ("mean", "std")}
    folder = Path(backbone.weights).expanduser().parent
    if Path(backbone.weights).name in NETWORKS and (folder / records.RESULT_FILE).is_file():
        result = records.read_json(folder / records.RESULT_FILE)
        known |= {name: result.get(name) for name in ("train_seconds", "config")}
        known |= {name: result.get("environment", {}).get(name) for name in ("device", "backend", "git_commit")}
    return known


def _result(
    command: str,
    config: EvaluationConfig,
    dataset: Dataset,
    backbones: Mapping[str, Backbone],
    extractors: Mapping[str, FeatureExtractor],
    folds: Sequence[Fold],
    rows: Sequence[Row],
) -> dict[str, Any]:
    """What result.json says of this evaluation beside its times: the same in every run of the same settings."""
    first = next(iter(extractors.values()))
    return {
        "command": command,
        "weights": config.weights,
        "data": {
            "name": dataset.name,
            "classes": len(dataset.class_names),
            **{f"{split.name}_images": len(split) for split in (dataset.train, dataset.test)},
            **{f"{split.name}_fingerprint": split.fingerprint for split in (dataset.train, dataset.test)},
            "folds": len(folds),
        },
        "image_size": first.image_size,
        "resize": config.resize or first.image_size,
        "parameters": first.parameters,
        "feature_dtype": first.dtype.name,
        "networks": {
            name: {
                "fingerprint": extractors[name].fingerprint,
                "untrained": name == UNTRAINED or is_random(config.weights),
                "architecture": dataclasses.asdict(backbone.model.config),
                "normalisation": backbone.normalisation,
            }
            for name, backbone in backbones.items()
        },
        "rows": [row.as_json() for row in rows],
        "config": dataclasses.asdict(config),
        "environment": records.environment(),
    }


def _subject(config: EvaluationConfig) -> str:
    """What is judged, as titles say it."""
    shown = "/".join(Path(config.weights).parts[-2:])
    return shown + (" (UNTRAINED BASELINE)" if is_random(config.weights) else "")


def _introduce(
    config: EvaluationConfig,
    dataset: Dataset,
    backbones: Mapping[str, Backbone],
    extractors: Mapping[str, FeatureExtractor],
    folds: Sequence[Fold],
) -> None:
    """What will be done, before anything slow; flushed, because logs may be files."""
    for note in dataset.notes:
        print(f"note: {note}")
    first, several = next(iter(extractors.values())), f" in {len(folds)} official folds" if len(folds) > 1 else ""
    print(
        f"{dataset.name}: {len(dataset.train):,} training images{several} and {len(dataset.test):,} test images, "
        f"{len(dataset.class_names)} classes\n"
        f"{_subject(config)}: {', '.join(backbones)}; {first.parameters / 1e6:.1f} M parameters, images resized to "
        f"{config.resize or first.image_size} px and cut to {first.image_size} px, {first.dtype.name} on "
        f"{jax.devices()[0].device_kind}"
    )
    depth = next(iter(backbones.values())).model.config.depth
    if "sweep" in config.names and depth < LAST_BLOCKS:
        print(f"note: the sweep of 52 heads needs {LAST_BLOCKS} blocks and this model has {depth}; it is left out")
    print(flush=True)
