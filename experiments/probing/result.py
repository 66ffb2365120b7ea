"""An evaluation as a command: what it prints first, result.json and config.json, and the folder that holds them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.data.splits import Dataset
from experiments.features.backbones import is_random, short_name
from experiments.features.extractor import FeatureExtractor, seen_size
from experiments.features.parts import PIXELS
from experiments.features.raw_pixels import RawPixels
from experiments.probing.config import REPORTED, EvaluationConfig
from experiments.probing.data import Fold
from experiments.probing.fitting import check_labels, selected_on
from experiments.probing.metrics import are_unlike
from experiments.probing.networks import UNTRAINED, known_training, load_networks, make_extractor
from experiments.probing.pipeline import SWEEP, Evaluation, Pipeline, Row
from experiments.probing.report import listing, save_accuracies, save_probe_curves, table
from experiments.runs import records
from experiments.runs.settings import flat

_LONG_SVC = 10_000  # training images


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """The rows of an evaluation, and the folder that it wrote."""

    rows: Sequence[Row]
    folder: Path


class Evaluator:
    """The networks and the data of an evaluation, and what is printed and written about them.

    Raises:
        UserError: weights or settings that cannot be used.
    """

    def __init__(self, config: EvaluationConfig, dataset: Dataset, command: str, folds: Sequence[Fold] | None = None):
        self.config, self.dataset, self._command = config, dataset, command
        self._pipeline = Pipeline(config, dataset, folds)
        self.backbones = load_networks(config)
        self._training = known_training(next(iter(self.backbones.values())))
        self._extractors = {name: make_extractor(config, backbone) for name, backbone in self.backbones.items()}

    @property
    def folds(self) -> int:
        """Number of folds."""
        return len(self._pipeline.folds)

    @property
    def extractor(self) -> FeatureExtractor:
        """The first network's."""
        return next(iter(self._extractors.values()))

    @property
    def subject(self) -> str:
        """What is evaluated, for titles."""
        return f"{self._weights} on {self.dataset.name}, {self.extractor.image_size} px"

    @property
    def untrained(self) -> bool:
        """Whether the weights themselves are random."""
        return is_random(self.config.model.weights)

    def introduce(self) -> None:
        """Prints what will be done, before anything slow; flushed, because logs may be files."""
        data, first, names = self.dataset, self.extractor, self.config.probes.names
        evaluated = f"{len(data.test):,} {data.test.name} images"
        for note in data.notes:
            print(f"note: {note}")
        several = f" in {self.folds} official folds" if self.folds > 1 else ""
        resize = self.config.networks.resize or first.image_size
        print(
            f"{data.name}: {len(data.train):,} training images{several} and {evaluated}, "
            f"{len(data.class_names)} classes\n"
            f"{self._weights}: {', '.join(self.backbones)}; {first.parameters / 1e6:.1f} M parameters, images resized "
            f"to {resize} px and cropped to {first.image_size} px, {first.dtype.name} on "
            f"{jax.devices()[0].device_kind}"
        )
        if cut := seen_size(next(iter(self.backbones.values())).model, first.image_size):
            print(f"note: {cut}")
        if self.untrained:
            print("UNTRAINED BASELINE: these weights are random; the numbers below show what the architecture gives")
        if self.config.probes.protocol == REPORTED:
            chosen = selected_on(data.test.name)
            print(f"PROTOCOL reported: epochs and heads are {chosen}, so the numbers are optimistic")
        depth = next(iter(self.backbones.values())).model.config.depth
        needed = self.config.probes.fewest_sweep_blocks
        if SWEEP in names and depth < needed:
            print(f"note: the sweep of 52 heads needs {needed} blocks and this model has {depth}; it is left out")
        if "svc" in names and len(data.train) > _LONG_SVC:
            print(f"note: svc takes minutes for {len(data.train):,} training images, on one core")
        print(flush=True)

    def evaluations(self) -> Iterator[Evaluation]:
        """Of each network in turn, and then of raw pixels if the settings ask for them."""
        pixels = {PIXELS: RawPixels(self.extractor.image_size)} if self.config.networks.pixels else {}
        for name, source in {**self._extractors, **pixels}.items():
            yield self._pipeline.evaluate_network(name, source)

    def write(self, folder: Path, rows: Sequence[Row], seconds: Mapping[str, Mapping[str, float]]) -> None:
        """Writes result.json and config.json."""
        data, first, config = self.dataset, self.extractor, flat(self.config)
        result = {
            "command": self._command,
            "weights": self.config.model.weights,
            "data": {**describe(data), "folds": self.folds},
            "image_size": first.image_size,
            "resize": self.config.networks.resize or first.image_size,
            "parameters": first.parameters,
            "feature_dtype": first.dtype.name,
            "networks": {name: self._describe(name) for name in self.backbones},
            "rows": [row.as_json() for row in rows],
            "config": config,
            "environment": records.environment(),
            "pretraining": self._training,
            "seconds": seconds,
        }
        records.write_json(folder / records.RESULT_FILE, result)
        records.write_json(folder / records.CONFIG_FILE, config)

    def _describe(self, name: str) -> dict[str, Any]:
        backbone = self.backbones[name]
        return {
            "fingerprint": self._extractors[name].fingerprint,
            "untrained": name == UNTRAINED or self.untrained,
            "architecture": backbone.model.config.settings(),
            "normalisation": backbone.normalisation,
        }

    @property
    def _weights(self) -> str:
        return short_name(self.config.model.weights) + (" (UNTRAINED BASELINE)" if self.untrained else "")


def describe(dataset: Dataset) -> dict[str, Any]:
    """The data set as results name it."""
    splits = (dataset.train, dataset.test)
    return {
        "name": dataset.name,
        "classes": len(dataset.class_names),
        "evaluated_on": dataset.test.name,
        "unlike_classes": are_unlike(dataset.test.labels),
        **{f"{split.name}_images": len(split) for split in splits},
        **{f"{split.name}_fingerprint": split.fingerprint for split in splits},
    }


class Reported(NamedTuple):
    """The rows, the table to print, and what draws the figures into a folder."""

    rows: Sequence[Row]
    table: str
    draw: Callable[[Path], None]


Report = Callable[[Path, Evaluator], Reported]


def overview(folder: Path, evaluator: Evaluator) -> Reported:
    """Evaluates all networks, and writes the result."""
    rows: list[Row] = []
    seconds = {}
    for found in evaluator.evaluations():
        rows += found.rows
        seconds[found.network] = found.seconds
    evaluator.write(folder, rows, seconds)

    def draw(folder: Path) -> None:
        save_accuracies(folder / "accuracies.png", rows, evaluator.dataset.test, title=evaluator.subject)
        save_probe_curves(folder, rows, evaluator.subject)

    return Reported(rows, table(rows, evaluator.dataset.test, evaluator.folds), draw)


def run_evaluation(
    config: EvaluationConfig,
    dataset: Dataset,
    *,
    command: str,
    folds: Sequence[Fold] | None = None,
    report: Report = overview,
) -> EvaluationResult:
    """Evaluates all networks and writes the folder: first all results, whole or not at all, then the figures.

    Computed features stay cached.

    Args:
        config: the settings.
        dataset: images and labels.
        command: the command whose run this is.
        folds: the official ones; None is one fold of all training images.
        report: what evaluates, and writes the results.

    Raises:
        UserError: weights, data or settings that cannot be used.
    """
    check_labels(config.probes.names, dataset, config.probes.shots)
    out = (config.run.out or records.default_run_folder(command)).expanduser()
    with records.run_folder(out) as folder:
        evaluator = Evaluator(config, dataset, command, folds)
        evaluator.introduce()
        found = report(folder, evaluator)
        files = {file.name for file in folder.iterdir()}
    print(f"\n{evaluator.subject}\n{found.table}\n", flush=True)
    if config.run.figures:
        with records.run_folder(out) as folder:
            found.draw(folder)
            files |= {file.name for file in folder.iterdir()}
    print(listing(out, sorted(files)))
    return EvaluationResult(found.rows, out)
