"""Segmentation or depth on your photos: a linear head on the patch features of a frozen backbone.

    python -m experiments.dense path/to/folder                           classes from images/ and masks/
    python -m experiments.dense path/to/folder --classes classes.csv     masks in colours: lines name,r,g,b
    python -m experiments.dense path/to/folder --blocks 4 --scales 1 1.5 four blocks, two sizes averaged
    python -m experiments.dense path/to/folder --task depth --depth-scale 256
    python -m experiments.predict photo.jpg --run runs/dense/20250101-120000

The folder holds images/ and masks/ with files of the same names (a.jpg and a.png), or train/ and val/ (and test/) that
hold these two. A mask has the size of its photo and one class index a pixel, or colours that --classes names; 255
(--void) does not count. Depth maps are 16-bit images or .npy files in metres, 0 where nothing was measured.

Photos are resized and cut into square windows. Their patch features are computed once and cached; then the head trains
on them, in one to two seconds per epoch for 400 windows of 32 × 32 patches on one CPU core. Scores are computed on
whole photos at their own size: mean IoU, pixel accuracy and IoU of each class, or RMSE, AbsRel and δ1, with bootstrap
intervals over the images. The epoch with the best validation score is kept; test images, if there are any, are
evaluated once.

The run folder gets result.json, the head (dense.json, head.safetensors), curves.png, examples.png and classes.png. A
training that is interrupted starts again, with the features that are cached.
"""

from collections.abc import Sequence

from dinojax.commands import exit_on_user_error
from experiments.dense_tasks.config import DenseConfig as Config
from experiments.dense_tasks.config import DenseResult
from experiments.runs.command_line import command_line
from experiments.runs.host_memory import keep_freed_memory


def run(config: Config) -> DenseResult:
    """Trains a head on cached features and evaluates it.

    Raises:
        UserError: pairs, weights or settings that cannot be used, or a loss that is not finite.
    """
    from experiments.dense_tasks.run import train_dense

    return train_dense(config)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    keep_freed_memory()
    with exit_on_user_error():
        run(command_line(Config, "experiments.dense", __doc__, args))


if __name__ == "__main__":
    main()
