"""Your folder, your classes: a classifier on a pretrained backbone, by frozen features or by tuning all of it.

    python -m experiments.finetune_folder path/to/folder                      frozen backbone, a linear head; minutes
    python -m experiments.finetune_folder path/to/folder --mode llrd          all of it, the early blocks slowly
    python -m experiments.finetune_folder path/to/folder --mode all           the four modes, in one table
    python -m experiments.finetune_folder path/to/classes --val-fraction 0.2  class folders without splits
    python -m experiments.finetune_folder path/to/folder --mode linear --protocol seed
    python -m experiments.predict photo.jpg --run runs/finetune_folder/<folder>/llrd

Images of any size lie in training/<class>/… and validation/<class>/…; they are decoded as they are needed, a few at a
time. Faults of the folder are named: copies in both splits, classes without validation images, files that are no
images. The epoch that is best on the validation images is kept; test images, if there are some, are judged once. Each
mode gets a folder with metrics.json (accuracy, balanced accuracy, recall of each class), predictions.csv,
confusion.png, the tuned model/ (which every --weights takes) and the head; the run folder gets results.md, curves.png
and metrics.json of all modes. Interrupted in whatever way, the same command goes on from the last epoch.
"""

from collections.abc import Sequence

import tyro

from dinojax.commands import exit_on_user_error
from experiments.finetuning.config import FinetuneConfig
from experiments.runs.host_memory import keep_freed_memory


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    keep_freed_memory()
    with exit_on_user_error():
        config = tyro.cli(FinetuneConfig, args=args, description=__doc__)
        from experiments.finetuning.loop import finetune

        finetune(config)


if __name__ == "__main__":
    main()
