"""What the model inside the package sees in two photos; no download.

    python -m experiments.demo

Two photos that come with scikit-learn go through dinojax_vitt, a small model that was trained without labels. The
output folder gets photos.png: for each photo the attention of the class token, the patches that hold 60 % of it, the
similarity of all patches to one of them, and the first three principal components of the patches as colours.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from experiments.runs.command_line import command_line

if TYPE_CHECKING:
    from experiments.figures.maps import SheetRow

FIGURE = "photos.png"
# Photo → row and column of the patch that others are compared with: on the flower, on the pavilion.
_PHOTOS = {"flower.jpg": (20, 27), "china.jpg": (25, 18)}
_SIDE = 160  # pixels of the shorter side
_MASS = 0.6


@dataclasses.dataclass(frozen=True)
class Config:
    """Attention and patches of two photos, in seconds."""

    out: Path = Path("runs/demo")
    """Folder of the figure."""


def run(config: Config) -> Path:
    """Draws the figure; returns its path.

    Raises:
        UserError: a folder that cannot be written.
    """
    from experiments.figures.maps import save_contact_sheet

    rows = see()
    figure = config.out.expanduser() / FIGURE
    try:
        figure.parent.mkdir(parents=True, exist_ok=True)
        title = "What dinojax_vitt sees: attention, similarity of the patches to one of them, patch PCA"
        save_contact_sheet(figure, rows, title=title, note="0.8 M parameters, trained on CIFAR-10 without labels")
    except OSError as error:
        raise UserError(f"--out {config.out} cannot be written ({error.strerror}); name another folder") from error
    print(f"{' and '.join(_PHOTOS)} through dinojax_vitt, the model inside the package: {figure}")
    return figure


def see() -> list["SheetRow"]:
    """The maps of each photo."""
    import jax
    import numpy as np
    from sklearn.datasets import load_sample_image

    import dinojax
    from converters.pretrained import load_pretrained
    from dinojax import maps
    from experiments.figures.maps import SheetRow

    model = load_pretrained("dinojax_vitt")
    images = dinojax.preprocess(map(load_sample_image, _PHOTOS), model, size=_SIDE, crop=False)
    grid = tuple(side // model.config.patch_size for side in images.shape[1:3])
    weights = jax.jit(lambda model, images: model.get_last_selfattention(images))(model, images)
    tokens = jax.jit(lambda model, images: model(images).patch_tokens)(model, images)
    attention = np.asarray(maps.cls_attention(weights, *grid)).mean(axis=1)
    features = np.asarray(tokens).reshape(len(images), *grid, -1)
    mean, std = (np.array(values)[None, None, None] for values in (model.preprocessing.mean, model.preprocessing.std))
    pixels = np.rint(255 * (images * std + mean)).clip(0, 255).astype(np.uint8)
    return [
        SheetRow(photo, name, heat, maps.mass_mask(heat, _MASS), maps.patch_similarity(found, found[point]), colours)
        for photo, (name, point), heat, found, colours in zip(
            pixels, _PHOTOS.items(), attention, features, maps.pca_maps(list(features), threshold=None)
        )
    ]


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(command_line(Config, "experiments.demo", __doc__, args))


if __name__ == "__main__":
    main()
