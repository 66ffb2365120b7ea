"""DINO from scratch on CIFAR-100 or other images of 32 px, by named recipes whose every setting can be changed.

    python -m experiments.dino_cifar100                       ViT-Tiny with patches of 4 px, 200 epochs
    python -m experiments.dino_cifar100 reported              ViT-Tiny/16 at 128 px, as reported for this data set
    python -m experiments.dino_cifar100 notebook              as reported, with other schedules and fewer crops
    python -m experiments.dino_cifar100 smoke --data digits   minutes on two cores, no download
    python -m experiments.dino_cifar100 cpu --data cifar10    an hour or two on two cores
    python -m experiments.dino_cifar100 small --data cifar10 --epochs 100 --seed 1

The same command resumes an interrupted run from its last checkpoint. The run folder gets the networks teacher/ and
student/ (weights for the other commands), metrics.jsonl, curves.png, and result.json with the k-NN accuracy of the
trained networks and of an untrained one. `RECIPE --help` lists all settings.
"""

from collections.abc import Sequence

from experiments.pretraining.command import run, run_recipe
from experiments.pretraining.config import PretrainConfig as Config
from experiments.pretraining.recipes import recipes

__all__ = ["RECIPES", "Config", "main", "run"]

RECIPES = recipes("dino_cifar100", "cifar100", image_size=32)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_recipe("experiments.dino_cifar100", RECIPES, __doc__, args, default="small")


if __name__ == "__main__":
    main()
