"""DINO in a minute: a small vision transformer learns from scans of digits, without labels; no download.

    python -m experiments.demo

It prints the k-NN accuracy of its features on test images before and after, and leaves in runs/demo-dino the networks
teacher/ and student/, the log, curves.png, and attention.png: what the class token attends to in each head. The folder
serves as weights for the other commands: `python -m experiments.evaluate runs/demo-dino --data digits`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from dinojax.commands import exit_on_user_error
from dinojax.pretraining.augment import MultiCropConfig
from experiments.pretraining.config import PretrainConfig
from experiments.runs.command_line import command_line
from experiments.runs.host_memory import keep_freed_memory
from experiments.runs.settings import POSITIVE, create, replace

# With so few steps, the teacher must follow quickly and be sharp from the start.
SETTINGS = create(
    PretrainConfig,
    data="digits",
    patch_size=4,
    embed_dim=192,
    depth=2,
    num_heads=6,
    drop_path_rate=0.0,
    prototypes=1024,
    head_hidden_dim=512,
    # A mirrored digit is not a digit, and the scans have no colours.
    crops=MultiCropConfig(
        global_size=16,
        local_size=8,
        local_crops=2,
        global_scale=(0.5, 1.0),
        local_scale=(0.2, 0.5),
        flip_probability=0.0,
        jitter=(0.4, 0.4, 0.0, 0.0),
        grayscale_probability=0.0,
        blur_probabilities=(0.5, 0.1, 0.2),
        blur_radius=(0.1, 1.0),
        solarize_probability=0.0,
    ),
    own_statistics=True,
    norm_last_layer=False,
    epochs=6,
    batch_size=128,
    warmup_epochs=2,
    weight_decay_end=0.04,
    teacher_momentum=0.99,
    warmup_teacher_temp=0.01,
    teacher_temp=0.01,
    knn_every=0,
    evaluate=False,
    log_every=11,
    command="demo",
    recipe="demo",
)
FIGURE = "attention.png"
_SHOWN, _PIXELS = 6, 32


@dataclasses.dataclass(frozen=True)
class Config:
    """DINO on the bundled digits, about a minute on two cores."""

    epochs: Annotated[int, POSITIVE] = SETTINGS.training.epochs
    """Number of passes through the 1,438 training images."""
    seed: int = 0
    """Random seed of everything that is drawn."""
    out: Path = Path("runs/demo-dino")
    """Folder of the run, which the same command resumes."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What the demo gives.

    Attributes:
        folder: of the run.
        test_knn_accuracy: fraction of the test images, for teacher, student and random_init.
        figure: path of the attention maps.
    """

    folder: Path
    test_knn_accuracy: Mapping[str, float]
    figure: Path


def run(config: Config) -> Result:
    """Trains, and draws the figure.

    Raises:
        UserError: a run folder with other settings, or one that cannot be written.
    """
    from experiments.pretraining.loop import pretrain

    result = pretrain(replace(SETTINGS, **dataclasses.asdict(config)))
    draw_attention(result.folder)
    figure, accuracies = result.folder / FIGURE, result.test_knn_accuracy
    print(
        f"\nk-NN on test images: {100 * accuracies['random_init']:.1f} % before, {100 * accuracies['teacher']:.1f} % "
        f"after learning without labels\nattention of the heads: {figure}"
    )
    return Result(result.folder, accuracies, figure)


def draw_attention(folder: Path) -> None:
    """Draws what the teacher's heads attend to in a few test images, enlarged."""
    import jax
    import numpy as np
    from PIL import Image

    from dinojax.maps import cls_attention
    from experiments.data.digits import load_digits
    from experiments.features.backbones import load_backbone
    from experiments.figures.attention_grid import save_attention_grid

    backbone, test = load_backbone(str(folder), seed=0, cache_dir=Path()), load_digits().test
    firsts = [int(np.flatnonzero(test.labels == label)[0]) for label in range(_SHOWN)]
    enlarged = [Image.fromarray(test.read(i)).resize((_PIXELS, _PIXELS), Image.Resampling.BICUBIC) for i in firsts]
    images = np.stack([np.asarray(image) for image in enlarged])
    mean, std = (np.asarray(numbers, np.float32) for numbers in backbone.normalisation)
    attention = jax.jit(backbone.model.get_last_selfattention)((images / np.float32(255) - mean) / std)
    side = _PIXELS // backbone.model.config.patch_size
    heads = np.asarray(cls_attention(attention, side, side))
    maps = np.concatenate([heads.mean(axis=1, keepdims=True), heads], axis=1)
    title = "Attention of the class token in the last block"
    note = "teacher after DINO on the digits; colours range from each map's 1st to its 99th percentile"
    save_attention_grid(folder / FIGURE, images, maps, title=title, note=note)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    keep_freed_memory()
    with exit_on_user_error():
        run(command_line(Config, "experiments.demo", __doc__, args))


if __name__ == "__main__":
    main()
