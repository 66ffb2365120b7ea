"""DINO from scratch on any images, by named recipes whose every setting can be changed.

    python -m experiments.pretrain small32 --data cifar10                              images of about 32 px
    python -m experiments.pretrain small64 --data path/to/images --image-size 64       images of about 64 px
    python -m experiments.pretrain reported --data path/to/images --image-size 160     crops of 128 px
    python -m experiments.pretrain smoke --data digits                                 minutes on two cores, no download

The same command resumes an interrupted run from its last checkpoint. The run folder gets the networks teacher/ and
student/ (weights for the other commands), metrics.jsonl, curves.png, and result.json with the k-NN accuracy of the
trained networks and of an untrained one. `RECIPE --help` lists all settings.
"""

from collections.abc import Sequence

from experiments.pretraining.command import run, run_recipe
from experiments.pretraining.config import PretrainConfig as Config
from experiments.pretraining.recipes import recipes
from experiments.runs.settings import REQUIRED, replace

__all__ = ["RECIPES", "Config", "main", "run"]

_AT_32, _AT_64 = (recipes("pretrain", REQUIRED, image_size=size) for size in (32, 64))
_SMALL = {
    name: replace(small, recipe=name) for name, small in (("small32", _AT_32["small"]), ("small64", _AT_64["small"]))
}
RECIPES = _SMALL | {name: recipe for name, recipe in _AT_32.items() if name != "small"}


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_recipe("experiments.pretrain", RECIPES, __doc__, args)


if __name__ == "__main__":
    main()
