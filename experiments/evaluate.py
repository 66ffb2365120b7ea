"""What frozen features are worth: k-NN, linear probes and few shots, for the teacher and the student of a training.

    python -m experiments.evaluate runs/dino_cifar100/small-seed0 --data cifar100
    python -m experiments.evaluate runs/dino_cifar100/small-seed0 --data cifar10 --network teacher --untrained
    python -m experiments.evaluate dinov2_vits14 --data path/to/folder --classifiers knn,sweep --resize 256
    python -m experiments.evaluate runs/dino_cifar100/smoke-seed0 --data digits --sweep-steps 500

Every probe but the sweep is fitted to CLS tokens and to the mean of the patch tokens. Epochs and heads are chosen on
held-out training images; the test images are judged once. Features are cached: an interrupted evaluation goes on from
them, and the same command gives the same numbers. The output folder gets result.json (every number, with settings,
versions, device and times), config.json, accuracies.png and the curves of the linear probe. Several evaluations make a
table with `python -m experiments.summarize`.
"""

from collections.abc import Sequence
from pathlib import Path

import tyro

from dinojax.commands import exit_on_user_error
from experiments.probing.evaluation_config import EvaluationConfig


def run(config: EvaluationConfig) -> Path:
    """Evaluates; returns the output folder.

    Raises:
        UserError: weights, data or settings that cannot be used.
    """
    from experiments.data.load import load_dataset
    from experiments.probing.evaluation_run import evaluate

    config.check()
    limits = {"max_train": config.max_train, "max_test": config.max_test, "seed": config.seed}
    return evaluate(config, load_dataset(config.data, data_dir=config.data_dir, **limits), command="evaluate")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(tyro.cli(EvaluationConfig, args=args, description=__doc__))


if __name__ == "__main__":
    main()
