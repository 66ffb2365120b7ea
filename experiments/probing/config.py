"""The settings of an evaluation of frozen features, and what `cifar10_probe` adds to them."""

import dataclasses
import difflib
from typing import Annotated, ClassVar, Literal

import tyro

from dinojax.errors import UserError
from experiments.features.parts import CLS, MEAN_PATCH
from experiments.runs.settings import (
    INNER_FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    UNIMPORTANT,
    BackboneSettings,
    DataSettings,
    Flags,
    GivenBackbone,
    RunSettings,
    check_bounds,
    given_once,
    replace,
)

HELDOUT, REPORTED = "heldout", "reported"


@dataclasses.dataclass(frozen=True)
class LabelledData(DataSettings):
    """The labelled images, and how many of them to use."""

    val_fraction: Annotated[float | None, INNER_FRACTION] = None
    """Share of the images of each class that become the validation images, which are then evaluated, in a folder
    without validation and test images."""


@dataclasses.dataclass(frozen=True)
class GivenData(LabelledData):
    """The labelled images, and how many of them to use."""

    default: ClassVar[str | None] = None  # where nothing is given

    folder: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA"), UNIMPORTANT] = None
    """Name or folder of the data set; --data DATA is the same."""
    data: str | None = None
    """Name or folder of the data set: digits (in scikit-learn, no download); a folder with train/<class>/… and
    test/<class>/…, or with <class>/… alone and --val-fraction; tiny_imagenet; or a TensorFlow Datasets name such as
    cifar10, cifar100 or stl10."""


@dataclasses.dataclass(frozen=True)
class ProbedData(GivenData):
    """The labelled images, and how many of them to use."""

    default: ClassVar[str | None] = "cifar10"

    folder: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA"), UNIMPORTANT] = None
    """Name or folder of the data set; --data DATA is the same. None takes cifar10."""


@dataclasses.dataclass(frozen=True)
class EvaluatedNetworks:
    """The networks that are evaluated."""

    network: Literal["all", "teacher", "student"] = "all"
    """Networks of a run folder to evaluate."""
    untrained: bool = False
    """Whether to also evaluate an untrained network of the same architecture, drawn from the seed."""
    pixels: bool = False
    """Whether to also evaluate raw pixels as features, which takes 12 bytes of memory for each pixel of each image."""
    resize: Annotated[int | None, POSITIVE] = None
    """Pixels that the shorter side of an image is resized to before the centre is cropped. None takes the image
    size."""


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """The classifiers that are fitted to the features."""

    classifiers: str = "all"
    """Comma-separated classifiers, or all: knn (DINO's weighted cosine votes, k = 10, 20, 100, 200); knn5 (Euclidean
    majority vote, k = 5); sweep (DINOv2's 52 linear heads, for models of four blocks or more); crops (a linear probe by
    Adam and a Euclidean 5-NN, fitted to one random crop of 60–100 % of each image, flipped or not, and evaluated on
    images resized to 8 px more than the image size before the centre is cropped); few_shot (1-NN, k-NN and linear)."""

    # What a subclass may change, or declare as a setting.
    available: ClassVar[tuple[str, ...]] = ("knn", "knn5", "sweep", "crops", "few_shot")
    parts: ClassVar[tuple[str, ...]] = (CLS, MEAN_PATCH)  # of a backbone's features that classifiers are fitted to
    fewest_sweep_blocks: ClassVar[int] = 4  # of models that the sweep is fitted to
    predict_training_images: ClassVar[bool] = False
    protocol: ClassVar[str] = HELDOUT
    augment: ClassVar[int] = 0

    epochs: Annotated[int, POSITIVE] = 100
    """Number of epochs of the linear probe on crops."""
    learning_rate: Annotated[float, POSITIVE] = 1e-3
    """Peak learning rate of the linear probe on crops (Adam, cosine schedule, standardised features)."""
    probe_batch_size: Annotated[int, POSITIVE] = 256
    """Images per step of the linear probe on crops."""
    sweep_steps: Annotated[int, POSITIVE] = 12_500
    """Number of steps of the sweep, each on 128 images."""
    shots: Annotated[int, POSITIVE] = 5
    """Training images per class of few_shot."""
    draws: Annotated[int, POSITIVE] = 5
    """Number of random draws of the training images of few_shot."""
    heldout_fraction: Annotated[float, INNER_FRACTION] = 0.1
    """Share of the training images that is held out to select epochs, heads and penalties."""

    @property
    def names(self) -> list[str]:
        """The classifiers that were asked for, in their usual order.

        Raises:
            UserError: a name that is not available.
        """
        asked = [name.strip() for name in self.classifiers.split(",")]
        if asked == ["all"]:
            return list(self.available)
        for name in asked:
            if name not in self.available:
                close = difflib.get_close_matches(name, self.available, n=1)
                hint = f"did you mean {close[0]}?" if close else f"take all, or some of {','.join(self.available)}"
                raise UserError(f"--classifiers {self.classifiers}: there is no {name!r}; {hint}")
        return [name for name in self.available if name in asked]


@dataclasses.dataclass(frozen=True)
class ClassifierSettings(ProbeSettings):
    """The classifiers that are fitted to the features."""

    available: ClassVar[tuple[str, ...]] = (
        *("knn", "knn5", "linear", "sweep", "logistic", "mlp", "mlp_shuffled", "svc", "few_shot"),
    )
    parts: ClassVar[tuple[str, ...]] = (CLS,)
    fewest_sweep_blocks: ClassVar[int] = 1
    predict_training_images: ClassVar[bool] = True

    classifiers: str = "knn,linear"
    """Comma-separated classifiers, or all: knn (DINO's weighted cosine votes, k = 20); knn5 (Euclidean majority vote,
    k = 5); linear; sweep (DINOv2's 52 linear heads); logistic (45 penalties); mlp (one hidden layer of 256, batches of
    64 in file order); mlp_shuffled (batches of 32); svc (RBF kernel; minutes from 10,000 images on); few_shot."""
    protocol: Literal["heldout", "reported"] = HELDOUT
    """Images that epochs and heads are selected on: held-out training images, or the test images, as in the notebooks
    whose reported numbers this repeats. The latter numbers are optimistic and marked "selected on the test set"."""
    augment: Annotated[int, NOT_NEGATIVE] = 0
    """Number of random views (crop of 60–100 %, flip) of each training image that linear, sweep and both MLPs are
    also fitted to. Each takes as long to compute as the training images, and is cached."""
    epochs: Annotated[int, POSITIVE] = 5
    """Number of epochs of the linear probe."""
    learning_rate: Annotated[float, POSITIVE] = 1e-2
    """Peak learning rate of the linear probe (Adam, cosine schedule, standardised features)."""
    probe_batch_size: Annotated[int, POSITIVE] = 64
    """Images per step of the linear probe."""
    mlp_epochs: Annotated[int, POSITIVE] = 25
    """Number of epochs of both MLPs (Adam, learning rate 0.001)."""
    svc_standardise: bool = False
    """Whether to standardise the features for the SVC. The notebooks do not."""


@dataclasses.dataclass(frozen=True)
class OutputSettings(RunSettings):
    """The random seed, the folders that are written to, and the figures."""

    figures: Annotated[bool, UNIMPORTANT] = True
    """Whether to draw figures, which takes some seconds."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """An evaluation of frozen features."""

    model: Flags[GivenBackbone]
    dataset: Flags[GivenData] = GivenData()
    networks: Flags[EvaluatedNetworks] = EvaluatedNetworks()
    probes: Flags[ProbeSettings] = ProbeSettings()
    run: Flags[OutputSettings] = OutputSettings()

    def check(self) -> None:
        """Raises a `UserError` for settings that nothing can be evaluated with."""
        check_bounds(self)
        _ = self.probes.names

    def resolved(self) -> "EvaluationConfig":
        """The same settings with the name of the images in `data`, wherever it was given.

        Raises:
            UserError: it was given twice and differs, or not at all.
        """
        given = given_once(self.dataset.folder, self.dataset.data, "data") or self.dataset.default
        if given is None:
            raise UserError("no images were given; name a data set or a folder after the weights, or as --data DATA")
        return replace(self, folder=None, data=given)


@dataclasses.dataclass(frozen=True)
class FigureSettings(OutputSettings):
    """The random seed, the folders that are written to, and the figures."""

    map: Annotated[Literal["pca", "tsne"], UNIMPORTANT] = "pca"
    """Projection of the test images' features that is drawn as a map. t-SNE takes up to a minute."""


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(EvaluationConfig):
    """Classifiers on the CLS tokens of one frozen backbone."""

    model: Flags[BackboneSettings] = BackboneSettings(image_size=224)
    dataset: Flags[ProbedData] = ProbedData()
    networks: ClassVar[EvaluatedNetworks] = EvaluatedNetworks(network="teacher")
    probes: Flags[ClassifierSettings] = ClassifierSettings()
    run: Flags[FigureSettings] = FigureSettings()
