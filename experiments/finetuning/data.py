"""The data of a supervised training: images, decoded in every epoch, or a frozen backbone's features, computed once.

Both give batches to train on, the inputs that the model sees of them, and the inputs that it is evaluated on.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from dinojax.finetune import ImageClassifier, head_logits, make_logits
from dinojax.images.resize import Resampling, resize_square
from dinojax.parallel import batch_sharding, check_divides, make_mesh, replicated, state_shardings
from experiments.data.folder import ImageFolder
from experiments.data.loader import Batch, epoch_rows, make_loader
from experiments.data.splits import Split
from experiments.data.squares import centre_cropped, reduced
from experiments.features.backbones import Backbone
from experiments.features.extractor import FeatureExtractor
from experiments.finetuning.config import FinetuneConfig
from experiments.finetuning.views import plain_views, training_views


class Task(NamedTuple):
    """The images and the model, which all modes share."""

    images: ImageFolder
    backbone: Backbone
    image_size: int
    resize: int

    @property
    def evaluated(self) -> list[Split]:
        """The splits that the model is evaluated on."""
        return [split for split in (self.images.validation, self.images.test) if split is not None]


class Placement:
    """The devices: batches are divided among them, and parameters as the mesh says.

    Args:
        mesh: as `dinojax.parallel.make_mesh` takes it.
        batch_size: images per step, over all devices.
        parts: number of equal parts that are computed one after the other.

    Raises:
        UserError: the batch cannot be divided equally.
    """

    def __init__(self, mesh: str | None, batch_size: int, parts: int = 1):
        self.mesh = make_mesh(mesh)
        check_divides(self.mesh, batch_size, parts)
        self._sharded, self._replicated = batch_sharding(self.mesh), replicated(self.mesh)

    def shard(self, batch: Any) -> Any:
        """Divides arrays among the devices along their first axis."""
        return jax.device_put(batch, self._sharded)

    def spread(self, state: Any) -> Any:
        """Divides the large tensors of a state among devices, see `state_shardings`."""
        return jax.device_put(state, state_shardings(self.mesh, state))

    def replicate(self, arrays: Any) -> Any:
        """Copies arrays to each device."""
        return jax.device_put(arrays, self._replicated)


class ImageData:
    """Images that are decoded in every epoch and cropped at random on the device."""

    def __init__(self, config: FinetuneConfig, task: Task, place: Placement, model: ImageClassifier, dtype: str):
        self._config, self._task, self._place = config, task, place
        self._filter = Resampling[config.views.interpolation.upper()]
        self._options = {"batch_size": config.training.batch_size, "threads": config.compute.threads}
        self._normalisation = tuple(tuple(map(float, numbers)) for numbers in task.backbone.normalisation)
        compute_dtype = None if dtype == "float32" else dtype
        options = {"lora_alpha": config.training.lora_alpha, "compute_dtype": compute_dtype}
        self.logits_of = make_logits(model, remat=config.compute.remat, **options)
        self._inference = make_logits(model, inference=True, **options)

    def training_batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch."""
        config, task = self._config, self._task
        split, prepare = task.images.train, lambda pixels: resize_square(pixels, task.resize, resample=self._filter)
        if config.training.protocol == "recommended":  # as reported, photos are decoded at their full size
            split = reduced(split, task.resize)
        if not config.views.augment:
            split, prepare = self._cropped(task.images.train), lambda pixels: pixels
        return make_loader(
            split,
            prepare=prepare,
            shuffle_seed=config.run.seed,
            epoch=epoch,
            balanced=config.dataset.balance == "sampling",
            **self._options,
        )

    def training_inputs(self, batch: Batch, epoch: Int[Array, ""]) -> Float[Array, "batch size size 3"]:
        """What the model sees of a batch."""
        config, (mean, std) = self._config, self._normalisation
        if not config.views.augment:
            return plain_views(batch.images, mean, std)
        return training_views(
            jax.random.fold_in(jax.random.key(config.run.seed), epoch),
            batch.images,
            batch.ids,
            size=self._task.image_size,
            mean=mean,
            std=std,
            scale=config.views.crop_scale,
            flip_probability=config.views.flip,
            interpolation=config.views.interpolation,
        )

    def evaluation_inputs(self, split: Split) -> Iterator[tuple[Array, int]]:
        """The images of a split in batches of one size, with the number of images in each that are not padding."""
        loader = make_loader(
            self._cropped(split), prepare=lambda pixels: pixels, shuffle_seed=None, epoch=0, **self._options
        )
        for batch in loader:
            yield self._place.shard(batch.images), int(np.sum(batch.labels >= 0))

    def logits(self, parameters: Any, frozen: Any, images: Array) -> Float[Array, "batch classes"]:
        """The logits of images that `evaluation_inputs` gives."""
        return self._inference(parameters, frozen, plain_views(images, *self._normalisation))

    def _cropped(self, split: Split) -> Split:
        task = self._task
        return centre_cropped(split, task.resize, task.image_size, interpolation=self._config.views.interpolation)


class FeatureData:
    """The class tokens of a frozen backbone instead of images: computed once, cached on disk, kept in memory."""

    logits_of = staticmethod(head_logits)

    def __init__(self, config: FinetuneConfig, task: Task, place: Placement):
        self._config, self._task = config, task
        extractor = FeatureExtractor(
            task.backbone.model,
            normalisation=task.backbone.normalisation,
            image_size=task.image_size,
            cache_dir=config.run.cache_dir,
            dtype=config.model.dtype,
            mesh=place.mesh,
        )
        splits, options = [task.images.train, *task.evaluated], {"interpolation": config.views.interpolation}
        cropped = [centre_cropped(split, task.resize, task.image_size, **options) for split in splits]
        found = extractor.extract(cropped)
        self._features = {split.name: features.vectors() for split, features in zip(splits, found)}

    def training_batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch; the last one is padded, as with images."""
        config, split = self._config, self._task.images.train
        size, balanced = config.training.batch_size, config.dataset.balance == "sampling"
        order = epoch_rows(split, config.run.seed, epoch, balanced=balanced)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            missing = size - len(rows)
            features = np.pad(self._features[split.name][rows], ((0, missing), (0, 0)))
            numbers = (np.pad(x, (0, missing), constant_values=-1) for x in (split.labels[rows], rows, rows))
            yield Batch(features, *numbers)

    def training_inputs(self, batch: Batch, epoch: Int[Array, ""]) -> Float[Array, "batch dim"]:
        """The features themselves."""
        return batch.images

    def evaluation_inputs(self, split: Split) -> Iterator[tuple[Array, int]]:
        """The features of a split, all at once."""
        features = self._features[split.name]
        yield features, len(features)

    def logits(self, parameters: Any, frozen: Any, features: Array) -> Float[Array, "batch classes"]:
        """The logits of features."""
        return head_logits(parameters, frozen, features)
