"""The settings of an evaluation of frozen features."""

import dataclasses
import difflib
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dinojax.errors import UserError
from experiments.runs.settings import require, require_positive

CLASSIFIERS = ("knn", "knn5", "sweep", "crops", "few_shot")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Settings that all evaluations share."""

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_WEIGHTS")]
    """The run folder of a training, a published checkpoint by its torch.hub name (dino_vits16 … dinov2_vitg14_reg),
    dinojax_vitt (a small one trained on CIFAR-10, inside the package: no download), a
    .pth or .safetensors file, a folder made by `python -m converters`, or "random:NAME" (never trained)."""
    data: str
    """"digits" (inside scikit-learn, no download), a folder with train/<class>/… and test/<class>/… (also training,
    val, validation), tiny_imagenet, or a TensorFlow Datasets name such as cifar10, cifar100, stl10."""
    network: Literal["all", "teacher", "student"] = "all"
    """Which networks of a run folder."""
    untrained: bool = False
    """Also judge a network of the same architecture that was never trained, drawn from the seed."""
    pixels: bool = False
    """Also judge raw pixels in the place of features. Takes 24 bytes of memory for every pixel of every image."""
    classifiers: str = "all"
    """"all", or some of: knn (DINO's weighted cosine votes, k = 10, 20, 100, 200), knn5 (Euclidean majority of raw
    features, k = 5), sweep (DINOv2's 52 linear heads; models of four blocks or more), crops (a linear probe by Adam and
    a Euclidean 5-NN that learn from one random crop of 60–100 % of each image, flipped or not, and are judged on images
    resized to 8 px more than --image-size and cut around the centre), few_shot (1-NN, k-NN and linear)."""
    image_size: int | None = None
    """Pixels of the square a model sees. Default: the size it was trained at; 224 for published weights."""
    resize: int | None = None
    """Pixels of the shorter side before the square is cut around the centre. Default: --image-size."""
    max_train: int | None = None
    """Use only this many training images, drawn from every class in proportion."""
    max_test: int | None = None
    """Likewise for test images."""
    batch_size: int | None = None
    """Images per forward pass. Default: what the cache of a CPU holds, 256 on a GPU or TPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; auto is float32 on a CPU and bfloat16 elsewhere."""
    epochs: int = 100
    """Epochs of the linear probe on crops."""
    learning_rate: float = 1e-3
    """Its peak learning rate (Adam, cosine schedule, standardised features)."""
    probe_batch_size: int = 256
    """Its features a step."""
    sweep_steps: int = 12_500
    """Steps of the sweep, 128 features each."""
    shots: int = 5
    """Training images per class of few_shot."""
    draws: int = 5
    """How often few_shot draws them anew."""
    heldout_fraction: float = 0.1
    """Share of the training images that is held out to choose an epoch or a head on."""
    figures: bool = True
    """Draw figures; some seconds."""
    seed: int = 0
    """Of the images drawn and held out, of the order of minibatches, and of random weights."""
    out: Path | None = None
    """The folder to write to. Default: runs/<command>/<date-time>."""
    cache_dir: Path = Path("~/.cache/dinojax")
    """Where features and downloaded weights are kept."""
    data_dir: Path | None = None
    """Where TensorFlow Datasets keeps its files and where tiny-imagenet-200 was extracted."""

    def check(self) -> None:
        """Raises a `UserError` for settings that nothing can be evaluated with."""
        positive = ("image_size", "resize", "max_train", "max_test", "batch_size", "epochs", "learning_rate",
                    "probe_batch_size", "sweep_steps", "shots", "draws")  # fmt: skip
        require_positive(self, positive)
        require(0 < self.heldout_fraction < 1, "heldout_fraction", self.heldout_fraction, "between 0 and 1")
        for name in self.names:
            if name not in CLASSIFIERS:
                close = difflib.get_close_matches(name, CLASSIFIERS, n=1)
                hint = f"did you mean {close[0]}?" if close else f"take all, or some of {','.join(CLASSIFIERS)}"
                raise UserError(f"--classifiers {self.classifiers}: {name!r} is none; {hint}")

    @property
    def names(self) -> list[str]:
        """The classifiers asked for."""
        return list(CLASSIFIERS) if self.classifiers == "all" else [n.strip() for n in self.classifiers.split(",")]
