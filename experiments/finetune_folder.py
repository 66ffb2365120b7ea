"""Fine-tuning on a folder of images: a classifier on a pretrained backbone, frozen or trained in one of three ways.

    python -m experiments.finetune_folder path/to/folder                      a linear head on a frozen backbone
    python -m experiments.finetune_folder path/to/folder --mode llrd          everything, the early blocks slowly
    python -m experiments.finetune_folder path/to/folder --mode all           the four modes, in one table
    python -m experiments.finetune_folder path/to/classes --val-fraction 0.2  class folders without splits
    python -m experiments.finetune_folder path/to/folder --mode linear --protocol reported
    python -m experiments.predict photo.jpg --run runs/finetune_folder/<folder>/llrd

Images of any size lie in training/<class>/… and validation/<class>/… They are decoded when they are needed, so that
memory does not limit their number. Faults of the folder are named: copies in both splits, classes without validation
images, files that are not images. The epoch with the best validation result is kept; test images, if there are any, are
evaluated once.

Each mode gets a folder with metrics.json (accuracy, balanced accuracy, recall of each class), predictions.csv,
confusion.png, the tuned model/ (weights for the other commands) and the head. The run folder gets results.md,
curves.png and metrics.json of all modes. The same command resumes an interrupted run after its last whole epoch.
"""

from collections.abc import Sequence

from dinojax.commands import exit_on_user_error
from experiments.finetuning.config import FinetuneConfig as Config
from experiments.finetuning.config import FinetuneResult
from experiments.runs.command_line import command_line
from experiments.runs.host_memory import keep_freed_memory


def run(config: Config) -> FinetuneResult:
    """Trains every mode asked for, or resumes it.

    Raises:
        UserError: images, weights or settings that cannot be used, a run folder of other settings, or a loss that is
            not finite.
    """
    from experiments.finetuning.loop import finetune

    return finetune(config)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    keep_freed_memory()
    with exit_on_user_error():
        run(command_line(Config, "experiments.finetune_folder", __doc__, args))


if __name__ == "__main__":
    main()
