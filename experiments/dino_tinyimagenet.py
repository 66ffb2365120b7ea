"""DINO from scratch on Tiny-ImageNet or other images of 64 px, by named recipes whose every setting can be changed.

    python -m experiments.dino_tinyimagenet                       ViT-Tiny with patches of 8 px, 200 epochs
    python -m experiments.dino_tinyimagenet reported              ViT-Tiny/16 at 128 px, as reported for this data set
    python -m experiments.dino_tinyimagenet notebook              as reported, with other schedules and fewer crops
    python -m experiments.dino_tinyimagenet smoke --data digits   minutes on two cores, no download
    python -m experiments.dino_tinyimagenet small --data path/to/images --epochs 100 --seed 1

The same command resumes an interrupted run from its last checkpoint. The run folder gets the networks teacher/ and
student/ (weights for the other commands), metrics.jsonl, curves.png, and result.json with the k-NN accuracy of the
trained networks and of an untrained one. `RECIPE --help` lists all settings.
"""

from collections.abc import Sequence

from experiments.pretraining.command import run, run_recipe
from experiments.pretraining.config import PretrainConfig as Config
from experiments.pretraining.recipes import recipes

__all__ = ["RECIPES", "Config", "main", "run"]

RECIPES = recipes("dino_tinyimagenet", "tiny_imagenet", image_size=64)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_recipe("experiments.dino_tinyimagenet", RECIPES, __doc__, args, default="small")


if __name__ == "__main__":
    main()
