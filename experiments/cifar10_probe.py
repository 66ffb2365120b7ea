"""Many classifiers on the frozen features of one backbone, on CIFAR-10 or any labelled images, in one table.

    python -m experiments.cifar10_probe cifar10 --weights dinov2_vits14 --classifiers all
    python -m experiments.cifar10_probe path/to/folder --weights path/to/weights.pth
    python -m experiments.cifar10_probe path/to/classes --val-fraction 0.2    (class folders without splits)
    python -m experiments.cifar10_probe digits --weights random               (an untrained baseline)

The backbone is not trained. Its features are computed once and cached, and the classifiers are fitted to them. Epochs,
learning rates and penalties are selected on held-out training images; the test images are classified once, at the end.
The run folder gets config.json, result.json, metrics.json (a summary by classifier), the prediction of every image,
figures, and the classifiers, with which `python -m experiments.predict` classifies other images.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinojax.commands import exit_on_user_error
from experiments.probing.config import ClassifierConfig as Config
from experiments.runs.command_line import command_line


@dataclasses.dataclass(frozen=True)
class Result:
    """The content of metrics.json, in which accuracies are fractions, and the run folder."""

    metrics: Mapping[str, Any]
    folder: Path


def run(config: Config) -> Result:
    """Runs the whole experiment.

    Raises:
        UserError: data, weights or settings that cannot be used; within seconds where that can be known in advance.
    """
    config = config.resolved()
    config.check()
    from experiments.probing.classifier_report import classifier_report
    from experiments.probing.data import load_data
    from experiments.probing.result import run_evaluation
    from experiments.runs.records import METRICS_FILE, read_json

    folder = run_evaluation(config, load_data(config), command="cifar10_probe", report=classifier_report).folder
    return Result(read_json(folder / METRICS_FILE), folder)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(command_line(Config, "experiments.cifar10_probe", __doc__, args))


if __name__ == "__main__":
    main()
