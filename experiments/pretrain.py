"""DINO from scratch on any images, by named recipes whose every setting can be changed.

    python -m experiments.pretrain small32 --data cifar10                              images of about 32 px
    python -m experiments.pretrain small64 --data path/to/images --image-size 64       images of about 64 px
    python -m experiments.pretrain reported --data path/to/images --image-size 160     crops of 128 px
    python -m experiments.pretrain smoke --data digits                                 minutes on two cores, no download

A folder of images needs no labels, splits or equal sizes; `python -m experiments.pretrain_folder path/to/images` is the
same training with a recipe that follows from the size of the images. The same command resumes an interrupted run from
its last checkpoint. The run folder gets the networks teacher/ and student/ (weights for the other commands),
metrics.jsonl, curves.png, and result.json with the feature rank and, if there are labels, the k-NN accuracy of the
trained networks and of an untrained one. `RECIPE --help` lists all settings.
"""

from collections.abc import Sequence

from experiments.pretraining.command import run, run_recipe
from experiments.pretraining.config import PretrainConfig as Config
from experiments.pretraining.recipes import general_recipes
from experiments.runs.settings import REQUIRED

__all__ = ["RECIPES", "Config", "main", "run"]

RECIPES = general_recipes("pretrain", REQUIRED)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_recipe("experiments.pretrain", RECIPES, __doc__, args)


if __name__ == "__main__":
    main()
