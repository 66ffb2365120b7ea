"""DINO or DINOv2 on a folder of images, from scratch or from given weights: any sizes, at any depth, without labels.

    python -m experiments.pretrain_folder path/to/images                 a recipe that follows from the images' size
    python -m experiments.pretrain_folder path/to/images smoke           minutes on two cores: does it work?
    python -m experiments.pretrain_folder path/to/images small64 --epochs 100 --method dinov2
    python -m experiments.pretrain_folder path/to/images --init dinov2_vits14 --method dinov2

The recipe is small32 for images below 64 px, small64 below 128 px, and reported (crops of 128 px) for larger ones; the
median of the shorter sides decides. With --init, the pretraining of these weights is continued: first their new heads
learn alone, then everything at a low rate. A note says if k-NN accuracy or feature rank falls below that of the start.
Images of several sizes are stored as squares of --image-size. `FOLDER RECIPE --help` lists all settings.

Labels are read if the folder holds train/<class>/… and test/<class>/…; then k-NN and the final evaluation use them.
From any other folder, 5 % of the images (32 to 2,000) are held out, and the rank of their features (RankMe) is
monitored. The run folder gets the networks teacher/ and student/ (weights for the other commands), metrics.jsonl,
curves.png and result.json. The same command resumes an interrupted run from its last checkpoint.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from experiments.pretraining.command import run, run_recipe
from experiments.pretraining.config import PretrainConfig as Config
from experiments.pretraining.recipes import CONTINUED, general_recipes, recipe_for
from experiments.runs.settings import REQUIRED

__all__ = ["Config", "main", "run"]

_LOOKED_AT = 100  # images, whose median size decides


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    words = list(sys.argv[1:] if args is None else args)
    folder = words.pop(0) if words and not words[0].startswith("-") else None
    recipes = general_recipes("pretrain_folder", REQUIRED)
    if not {"-h", "--help"} & set(words):
        with exit_on_user_error():
            if folder is None:
                raise UserError("no folder was given; name the folder of images first")
            if not Path(folder).expanduser().is_dir():
                raise UserError(f"{folder}: there is no such folder; name the folder of images first, then the recipe")
            if not words or words[0].startswith("-"):
                continued = any(word.partition("=")[0] == "--init" for word in words)
                words.insert(0, CONTINUED if continued else _suggested(Path(folder).expanduser()))
            recipes = general_recipes(_command(folder), folder)
    run_recipe("experiments.pretrain_folder FOLDER", recipes, __doc__, words)


def _command(folder: str) -> str:
    """The command's name with that of the folder, because each folder gets runs of its own."""
    import hashlib
    import os

    place = Path(folder).expanduser().resolve()
    return f"pretrain_folder/{place.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:6]}"


def _suggested(folder: Path) -> str:
    """The recipe for the images of a folder."""
    import statistics

    from dinojax.images.decode import image_size
    from experiments.data.files import find_images, no_images

    found = find_images(folder)
    if not found.files:
        raise UserError(f"{no_images(folder, found)}; name a folder of images")
    some = found.files[:: -(-len(found.files) // _LOOKED_AT)]
    side = int(statistics.median(min(image_size(path, str(path))) for path in some))
    recipe = recipe_for(side)
    print(f"recipe {recipe}, for images of about {side} px")
    return recipe


if __name__ == "__main__":
    main()
