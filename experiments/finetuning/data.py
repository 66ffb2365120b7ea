"""What a supervised training is fed: images, decoded in every epoch, or a frozen backbone's features, computed once.

Both give batches to learn from, what the model sees of them, and what it is judged by.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from dinojax.errors import UserError
from dinojax.finetune import Classifier, head_logits, make_logits
from experiments.data.folder import ImageFolder
from experiments.data.loader import Batch, epoch_rows, make_loader
from experiments.data.splits import Split
from experiments.data.squares import Resampling, centre_cropped, reduced, squash
from experiments.features.backbones import Backbone
from experiments.features.extractor import FeatureExtractor
from experiments.finetuning.config import FinetuneConfig
from experiments.finetuning.views import plain_views, training_views
from experiments.probing.classifiers import pick_tokens


class Task(NamedTuple):
    """What all modes share."""

    images: ImageFolder
    backbone: Backbone
    image_size: int
    resize: int

    @property
    def judged(self) -> list[Split]:
        """The splits that a result speaks of."""
        return [split for split in (self.images.validation, self.images.test) if split is not None]


class Placement:
    """Where arrays lie: batches in equal parts on all devices, parameters whole on each.

    Raises:
        UserError: a batch that the devices cannot share.
    """

    def __init__(self, batch_size: int):
        devices = jax.device_count()
        if batch_size % devices:
            raise UserError(f"--batch-size {batch_size} is no multiple of the {devices} devices that share it")
        mesh = jax.make_mesh((devices,), ("batch",), axis_types=(AxisType.Auto,))
        self._split, self._whole = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())

    def split(self, batch: Any) -> Any:
        """Arrays of which each device gets its part of the first axis."""
        return jax.device_put(batch, self._split)

    def whole(self, arrays: Any) -> Any:
        """Arrays that each device gets whole."""
        return jax.device_put(arrays, self._whole)


class ImageData:
    """Images as what a training takes: decoded again in every epoch, cropped at random on the device."""

    def __init__(self, config: FinetuneConfig, task: Task, place: Placement, model: Classifier, dtype: str):
        self._config, self._task, self._place = config, task, place
        self._filter = Resampling[config.interpolation.upper()]
        self._options = {"batch_size": config.batch_size, "threads": config.threads}
        self._normalisation = tuple(tuple(map(float, numbers)) for numbers in task.backbone.normalisation)
        compute_dtype = None if dtype == "float32" else dtype
        options = {"lora_alpha": config.lora_alpha, "compute_dtype": compute_dtype}
        self.logits_of = make_logits(model, remat=config.remat, **options)
        self._inference = make_logits(model, inference=True, **options)

    def training_batches(self, epoch: int) -> Iterator[Batch]:
        """One epoch."""
        config, task = self._config, self._task
        split, prepare = task.images.train, lambda pixels: squash(pixels, task.resize, resample=self._filter)
        if config.protocol == "recommended":  # the article's torchvision decodes photos whole
            split = reduced(split, config.folder, task.resize)
        if not config.augment:
            split, prepare = self._cropped(task.images.train), lambda pixels: pixels
        return make_loader(
            split,
            prepare=prepare,
            shuffle_seed=config.seed,
            epoch=epoch,
            drop_remainder=False,
            balanced=config.balance == "sampling",
            **self._options,
        )

    def training_inputs(self, batch: Batch, epoch: Int[Array, ""]) -> Float[Array, "batch size size 3"]:
        """What the model sees of a batch."""
        config, (mean, std) = self._config, self._normalisation
        if not config.augment:
            return plain_views(batch.images, mean, std)
        return training_views(
            jax.random.fold_in(jax.random.key(config.seed), epoch),
            batch.images,
            batch.ids,
            size=self._task.image_size,
            mean=mean,
            std=std,
            scale=config.crop_scale,
            flip_probability=config.flip,
            interpolation=config.interpolation,
        )

    def judged_inputs(self, split: Split) -> Iterator[tuple[Array, int]]:
        """The images of a split in batches of one size, and how many of each batch are real."""
        loader = make_loader(
            self._cropped(split), prepare=lambda pixels: pixels, shuffle_seed=None, epoch=0, drop_remainder=False,
            **self._options,
        )  # fmt: skip
        for batch in loader:
            yield self._place.split(batch.images), int(np.sum(batch.labels >= 0))

    def logits(self, parameters: Any, frozen: Any, images: Array) -> Float[Array, "batch classes"]:
        """Of images as `judged_inputs` gives them."""
        return self._inference(parameters, frozen, plain_views(images, *self._normalisation))

    def _cropped(self, split: Split) -> Split:
        task = self._task
        return centre_cropped(split, task.resize, task.image_size, interpolation=self._config.interpolation)


class FeatureData:
    """The class tokens of a frozen backbone in the place of images: computed once, cached on disk, kept in memory."""

    logits_of = staticmethod(head_logits)

    def __init__(self, config: FinetuneConfig, task: Task):
        self._config, self._task = config, task
        extractor = FeatureExtractor(
            task.backbone.model,
            normalisation=task.backbone.normalisation,
            image_size=task.image_size,
            cache_dir=config.cache_dir.expanduser(),
            dtype=config.dtype,
        )
        splits = [task.images.train, *task.judged]
        cropped = [
            centre_cropped(split, task.resize, task.image_size, interpolation=config.interpolation) for split in splits
        ]
        found = extractor.extract(cropped)
        self._features = {split.name: pick_tokens(features) for split, features in zip(splits, found)}

    def training_batches(self, epoch: int) -> Iterator[Batch]:
        """One epoch; the last batch is filled up as those of images are."""
        config, split = self._config, self._task.images.train
        order = epoch_rows(split, config.seed, epoch, balanced=config.balance == "sampling")
        for start in range(0, len(order), config.batch_size):
            rows = order[start : start + config.batch_size]
            missing = config.batch_size - len(rows)
            features = np.pad(self._features[split.name][rows], ((0, missing), (0, 0)))
            numbers = (np.pad(x, (0, missing), constant_values=-1) for x in (split.labels[rows], rows, rows))
            yield Batch(features, *numbers)

    def training_inputs(self, batch: Batch, epoch: Int[Array, ""]) -> Float[Array, "batch dim"]:
        """The features themselves."""
        return batch.images

    def judged_inputs(self, split: Split) -> Iterator[tuple[Array, int]]:
        """All at once."""
        features = self._features[split.name]
        yield features, len(features)

    def logits(self, parameters: Any, frozen: Any, features: Array) -> Float[Array, "batch classes"]:
        """Of features."""
        return head_logits(parameters, frozen, features)
