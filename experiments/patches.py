"""What the patches of a model can do without training: match, track, foreground, discover, anomaly.

    python -m experiments.patches match dinov2_vits14 one.jpg other.jpg            patches that belong together
    python -m experiments.patches track dino_vits16 frames --mask first.png        objects through a video
    python -m experiments.patches foreground dinov2_vits14 photos                  a foreground score of each patch
    python -m experiments.patches discover dino_vits16 photos                      one object in each photo, no labels
    python -m experiments.patches anomaly dinov2_vits14 --normal good --test new   what is unlike normal photos

`python -m experiments.patches TASK --help` describes a task and its settings. Weights are a published checkpoint by its
torch.hub name, dinojax_vitt, a file, a converted folder, or the run folder of a training.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from experiments.runs.command_line import command_line, wrapped

TASKS = ("match", "track", "foreground", "discover", "anomaly")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    task, *rest = list(sys.argv[1:] if args is None else args) or ["--help"]
    with exit_on_user_error():
        if task in ("-h", "--help"):
            print(f"usage: python -m experiments.patches {{{','.join(TASKS)}}} …\n\n{wrapped(__doc__)}")
            return
        if task not in TASKS:
            close = difflib.get_close_matches(task, TASKS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(TASKS)}"
            raise UserError(f"there is no task {task!r}; {hint}")
        module = importlib.import_module(f"experiments.patch_tasks.{task}")
        kind = getattr(module, f"{task.capitalize()}Config")
        config = command_line(kind, f"experiments.patches {task}", module.__doc__, rest)
        getattr(module, f"run_{task}")(config)


if __name__ == "__main__":
    main()
