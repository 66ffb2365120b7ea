"""Evaluates frozen features by k-NN, linear probes and few-shot classifiers, for each network of a training.

    python -m experiments.evaluate runs/dino_cifar100/small-seed0 cifar100
    python -m experiments.evaluate runs/dino_cifar100/small-seed0 cifar10 --network teacher --untrained
    python -m experiments.evaluate dinov2_vits14 path/to/folder --classifiers knn,sweep --resize 256
    python -m experiments.evaluate dinojax_vitt path/to/classes --val-fraction 0.2

Every probe but the sweep is fitted to CLS tokens and to the mean of the patch tokens. Epochs and heads are selected on
held-out training images; the test images are evaluated once. Features are cached: an interrupted evaluation resumes
from them, and the same command gives the same numbers. The output folder gets result.json (every number, with settings,
versions, device and times), config.json, accuracies.png and the curves of the linear probe. `python -m
experiments.summarize` makes one table of several evaluations.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dinojax.commands import exit_on_user_error
from experiments.probing.config import EvaluationConfig as Config
from experiments.runs.command_line import command_line

if TYPE_CHECKING:
    from experiments.probing.result import EvaluationResult as Result


def run(config: Config) -> "Result":
    """Evaluates, and writes the output folder.

    Raises:
        UserError: weights, data or settings that cannot be used.
    """
    config = config.resolved()
    config.check()
    from experiments.probing.data import load_data
    from experiments.probing.result import run_evaluation

    return run_evaluation(config, load_data(config), command="evaluate")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(command_line(Config, "experiments.evaluate", __doc__, args))


if __name__ == "__main__":
    main()
