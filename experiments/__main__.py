"""The front door: `dinojax COMMAND …`, the same commands as `python -m experiments.NAME`.

Only the command that is called is imported, so that `dinojax --help` answers at once.
"""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence

import dinojax
from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError

# Command: the module whose `main` it is, and what `dinojax --help` says of it.
COMMANDS = {
    "probe": ("experiments.cifar10_probe", "nine classifiers on frozen features, in one table"),
    "predict": ("experiments.predict", "classify images, or their pixels, with an earlier run"),
    "evaluate": ("experiments.evaluate", "k-NN, linear and few-shot accuracy of a trained network"),
    "embed": ("experiments.embed", "features of every photo in a folder, as a table"),
    "visualize": ("experiments.visualize", "attention, patch PCA and patch similarity of photos"),
    "patches": ("experiments.patches", "matches, tracking, foreground, objects and anomalies from patch features"),
    "finetune": ("experiments.finetune_folder", "train a classifier on a folder of images"),
    "dense": ("experiments.dense", "train a segmentation or depth head on images and their masks"),
    "pretrain": ("experiments.pretrain", "train DINO or DINOv2 on images without labels"),
    "summarize": ("experiments.summarize", "mean and deviation of several runs, as a table"),
    "search": ("experiments.search", "the images of an embedding file that are most similar to a photo"),
    "duplicates": ("experiments.duplicates", "groups of near-duplicates in an embedding file"),
    "cluster": ("experiments.cluster", "clusters of the images of an embedding file"),
    "convert": ("converters.__main__", "convert weights from PyTorch, and back"),
    "demo": ("experiments.demo", "what the model inside the package sees in two photos"),
}


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    name, *rest = list(sys.argv[1:] if args is None else args) or ["--help"]
    with exit_on_user_error():
        if name in ("-h", "--help"):
            print(_help())
        elif name == "--version":
            print(f"dinojax {dinojax.__version__}")
        else:
            _command(name)(rest)


def _command(name: str) -> Callable[[Sequence[str]], None]:
    """The `main` of a command's module."""
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "dinojax --help lists the commands"
        raise UserError(f"dinojax has no command {name!r}; {hint}")
    try:
        return importlib.import_module(COMMANDS[name][0]).main
    except ModuleNotFoundError as error:  # installed without its extras
        raise UserError(
            f"dinojax {name} needs the package {error.name}; pip install 'dinojax[experiments,torch]' installs it"
        ) from error


def _help() -> str:
    lines = [f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dinojax COMMAND …",
            "",
            "DINO and DINOv2 in JAX: convert, probe, fine-tune and pretrain vision transformers.",
            "",
            "commands:",
            *lines,
            "",
            "dinojax COMMAND --help describes the settings of a command; dinojax --version prints the version.",
        ]
    )


if __name__ == "__main__":
    main()
