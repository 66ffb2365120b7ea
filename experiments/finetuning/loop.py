"""Supervised training on a folder of images: steps, the validation after each epoch, checkpoints, and resuming.

Each mode has a folder in the run folder: config.json, metrics.jsonl (one line per epoch), checkpoints/, and at the end
what `finetuning.result` writes about the best epoch. A finished mode is left as it is.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from tqdm import tqdm

from dinojax import VisionTransformer
from dinojax.checkpoint import TrainingCheckpoints
from dinojax.errors import UserError
from dinojax.finetune import (
    FinetuneState,
    ImageClassifier,
    balanced_class_weights,
    cached_parts,
    count_parameters,
    finetune_optimizer,
    init_finetune_state,
    make_finetune_step,
    merge_parameters,
    split_parameters,
    weighted_cross_entropy,
)
from dinojax.models.files import abstract_model, named_parameters, with_parameters
from dinojax.parallel import make_mesh, on_mesh
from dinojax.pretraining.schedules import Schedule, cosine_schedule
from experiments.data.folder import load_image_folder
from experiments.data.loader import Batch
from experiments.data.splits import Split
from experiments.features.backbones import is_random, load_backbone
from experiments.features.extractor import check_image_size, seen_size
from experiments.finetuning.config import FinetuneConfig, FinetuneResult, TrainingSettings
from experiments.finetuning.data import FeatureData, ImageData, Placement, Task
from experiments.finetuning.result import BestEpoch, finish, report
from experiments.runs import records
from experiments.runs.log import RunLog, read_log
from experiments.runs.measure import measured
from experiments.runs.settings import resolve_dtype

CHECKPOINTS = "checkpoints"


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Trains every mode asked for, or resumes it.

    Raises:
        UserError: images, weights or settings that cannot be used, a run folder of other settings, or a loss that is
            not finite.
    """
    config = config.resolved()
    config.check()
    out = config.folder
    task = make_task(config)
    _introduce(config, task)
    data = records.data_record(
        task.images.class_names, {split.name: split for split in (task.images.train, *task.evaluated)}
    )
    for mode in config.modes:
        settings, folder = config.of_mode(mode), out / mode
        with records.open_run(folder, settings, data, accept_changed_data=config.run.accept_changed_data):
            if (folder / records.METRICS_FILE).is_file():
                print(f"{mode} is finished: see {folder}")
            else:
                Training(settings, task, folder).run()
    return FinetuneResult(out, report(out))


def make_task(config: FinetuneConfig) -> Task:
    """Lists the images, without decoding them, and loads the weights."""
    data = config.dataset
    images = load_image_folder(
        data.folder,
        val_fraction=data.val_fraction,
        train_split=data.train_split,
        val_split=data.val_split,
        test_split=data.test_split,
        max_train=data.max_train,
        max_val=data.max_val,
        seed=config.run.seed,
    )
    backbone = load_backbone(config.model.weights, seed=config.run.seed, cache_dir=config.run.cache_dir)
    size = config.model.image_size or backbone.image_size
    check_image_size(backbone.model, size)
    resize = config.views.resize or round(size * 8 / 7)
    if resize < size:
        raise UserError(f"--resize {resize} is less than the {size} px that are cut out of it")
    return Task(images, backbone, size, resize)


class Training:
    """The training of one mode: its parameters, its compiled step, and its epochs."""

    def __init__(self, config: FinetuneConfig, task: Task, folder: Path):
        self.config, self.task, self.folder = config, task, folder
        training = config.training
        train, depth = task.images.train, task.backbone.model.config.depth
        self.steps_per_epoch = -(-len(train) // training.batch_size)
        self.root = jax.random.key(config.run.seed)
        backbone = _with_drop_path(task.backbone.model, training.drop_path)
        self.model = ImageClassifier(backbone, len(task.images.class_names), rngs=nnx.Rngs(config.run.seed))
        self.trainable, self.frozen = split_parameters(
            self.model, training.mode, lora_rank=training.lora_rank, key=jax.random.fold_in(self.root, 2)
        )
        self.place = Placement(config.compute.mesh, training.batch_size, config.compute.accumulation_steps or 1)
        self.schedule = _schedule(training, self.steps_per_epoch)
        self.optimizer = finetune_optimizer(
            training.mode,
            depth,
            learning_rate=self.schedule,
            weight_decay=training.weight_decay,
            momentum=training.momentum,
            layer_decay=training.layer_decay,
            clip_norm=training.clip_norm,
        )
        self.dtype = resolve_dtype(config.model.dtype)
        self.data = (
            FeatureData(config, task, self.place)
            if training.mode == "linear" and not config.views.augment
            else ImageData(config, task, self.place, self.model, self.dtype)
        )
        weights = balanced_class_weights(train.labels, len(task.images.class_names))
        update = make_finetune_step(
            self.data.logits_of,
            self.optimizer,
            class_weights=weights if config.dataset.balance == "loss" else None,
            label_smoothing=training.label_smoothing,
            ema_decay=training.ema_decay or None,
            accumulation_steps=config.compute.accumulation_steps or self._micro_batches(),
        )

        def step(state: FinetuneState, frozen: Any, batch: Batch, epoch: Array) -> tuple[FinetuneState, dict]:
            inputs = self.data.training_inputs(batch, epoch)
            drop = jax.random.fold_in(jax.random.fold_in(self.root, 1), state.step)
            return update(state, frozen, inputs, batch.labels, drop)

        mesh = self.place.mesh
        self.step = jax.jit(on_mesh(step, mesh), donate_argnums=0)
        self.forward = jax.jit(on_mesh(self.data.logits, mesh))

    def _micro_batches(self) -> int:
        """As many as it takes for each to fit the caches of a CPU."""
        if jax.default_backend() != "cpu" or self.place.mesh.size > 1 or self.config.training.mode == "linear":
            return 1
        return cached_parts(self.task.backbone.model, self.config.training.batch_size, self.task.image_size)

    def init(self) -> FinetuneState:
        """The state before the first step."""
        return init_finetune_state(self.trainable, self.optimizer, ema=bool(self.config.training.ema_decay))

    def run(self) -> None:
        """Trains all epochs, from the newest checkpoint on, and writes the result of the best one."""
        config, task, total = self.config, self.task, count_parameters((self.trainable, self.frozen))
        trainable = count_parameters(self.trainable)
        print(f"\n{config.training.mode}: {trainable:,} of {total:,} parameters are trained", flush=True)
        like = jax.eval_shape(self.init)
        with TrainingCheckpoints(self.folder / CHECKPOINTS, keep_newest=1) as checkpoints:
            restored = checkpoints.restore(like)
            for sentence in restored.skipped if restored else ():
                print(f"note: {sentence}")
            state, first = (restored.state, restored.record["epoch"]) if restored else (self.init(), 0)
            if first:
                print(f"resuming after epoch {first} of {config.training.epochs}", flush=True)
            with measured() as cost:
                self._epochs(self.place.spread(state), first, checkpoints)
            checkpoints.wait()
            best = checkpoints.restore_best(like)
            for sentence in best.skipped:
                print(f"note: {sentence}; the epoch of step {best.step} is kept instead")
        state = best.state
        parameters = state.trainable if state.ema is None else state.ema
        kept = merge_parameters(parameters, self.frozen, lora_alpha=config.training.lora_alpha)
        result = BestEpoch(
            epoch=best.record["epoch"],
            trainable=trainable,
            parameters=count_parameters(kept),
            peak_mib=_device_peak_mib() or cost.peak_mib,
            logits={split.name: self.evaluate(self.place.spread(parameters), split) for split in task.evaluated},
        )
        finish(self.folder, config, task, nnx.merge(nnx.split(self.model, nnx.Param)[0], kept), result, self.dtype)

    def evaluate(self, parameters: Any, split: Split) -> Float[np.ndarray, "images classes"]:
        """The logits of all images of a split."""
        frozen, parts = self.place.spread(self.frozen), []
        for inputs, count in self.data.evaluation_inputs(split):
            parts.append(np.asarray(self.forward(parameters, frozen, inputs), np.float32)[:count])
        return np.concatenate(parts)

    def _epochs(self, state: FinetuneState, first: int, checkpoints: TrainingCheckpoints) -> None:
        config, images = self.config.training, len(self.task.images.train)
        frozen = self.place.spread(self.frozen)
        log_so_far = [record for record in read_log(self.folder) if record["epoch"] <= first]
        scores = [record["score"] for record in log_so_far]
        bar = tqdm(
            total=config.epochs * images, initial=first * images, desc=config.mode, unit="img", dynamic_ncols=True
        )
        with bar, RunLog(self.folder, first * self.steps_per_epoch, tensorboard=False) as log:
            for epoch in range(first, config.epochs):
                if config.early_stop and len(scores) - 1 - int(np.argmax(scores or [0])) >= config.early_stop:
                    bar.write(f"stopped after epoch {epoch}: no improvement in {config.early_stop} epochs")
                    return
                started, sums = time.perf_counter(), []
                for batch in self.data.training_batches(epoch):
                    state, metrics = self.step(state, frozen, self.place.shard(batch), epoch)
                    count = int(np.sum(batch.labels >= 0))
                    sums.append((count, metrics))
                    bar.update(count)
                record = self._means(sums, epoch, state) | {"seconds": round(time.perf_counter() - started, 3)}
                record |= self._validate(state)
                better = record["score"] > max(scores, default=-math.inf)
                scores.append(record["score"])
                log.write(record)
                bar.set_postfix(loss=f"{record['train_loss']:.3f}", val=f"{100 * record['validation_accuracy']:.1f}%")
                checkpoints.save(
                    record["step"], state, record={"epoch": epoch + 1}, score=record["score"] if better else None
                )

    def _means(self, sums: list[tuple[int, dict]], epoch: int, state: FinetuneState) -> dict[str, float]:
        counts = np.array([count for count, _ in sums])
        names = ("loss", "accuracy")
        means = {f"train_{n}": float(np.average([float(m[n]) for _, m in sums], weights=counts)) for n in names}
        step = int(state.step)
        if not math.isfinite(means["train_loss"]):
            config = self.config.training
            raise UserError(
                f"{config.mode}: the loss of epoch {epoch + 1} is {means['train_loss']}; earlier epochs are intact in "
                f"{self.folder}; start again in another --out with a lower --learning-rate "
                f"than {config.learning_rate:g}, or with --clip-norm 1"
            )
        return {"step": step, "epoch": epoch + 1, **means, "learning_rate": float(self.schedule(step - 1))}

    def _validate(self, state: FinetuneState) -> dict[str, float]:
        """Metrics on the validation images, of the moving average where there is one; a higher score is better."""
        labels = self.task.images.validation.labels
        logits = self.evaluate(state.trainable if state.ema is None else state.ema, self.task.images.validation)
        hits = logits.argmax(axis=1) == labels
        numbers = {
            "validation_loss": float(weighted_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))),
            "validation_accuracy": float(hits.mean()),
            "validation_balanced_accuracy": float(np.mean([hits[labels == one].mean() for one in np.unique(labels)])),
        }
        wanted = numbers[f"validation_{self.config.training.select}"]
        return {**numbers, "score": -wanted if self.config.training.select == "loss" else wanted}


def _schedule(config: TrainingSettings, steps_per_epoch: int) -> Schedule:
    total, warmup = config.epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "cosine":
        return cosine_schedule(config.learning_rate, 0.0, total, warmup_steps=warmup)
    halfway = config.epochs // 2 * steps_per_epoch
    rate = optax.piecewise_constant_schedule(config.learning_rate, {halfway: 0.1} if config.schedule == "step" else {})
    return lambda step: rate(step) * jnp.minimum(1, (step + 1) / max(warmup, 1))


def _with_drop_path(model: VisionTransformer, rate: float) -> VisionTransformer:
    """A model with the same parameters that drops residual branches."""
    shape = dataclasses.replace(model.config, drop_path_rate=rate)
    return with_parameters(abstract_model(shape), named_parameters(model))


def _device_peak_mib() -> float | None:
    """Peak memory of an accelerator; None for devices that do not report it, such as CPUs."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in stats else None


def _introduce(config: FinetuneConfig, task: Task) -> None:
    """Says what will be done; flushed, because the output may go to a file."""
    images, devices = task.images, make_mesh(config.compute.mesh).devices.ravel()
    for note in images.notes:
        print(f"note: {note}")
    parts = [f"{len(split):,} {split.name}" for split in (images.train, *task.evaluated)]
    counts = np.bincount(images.train.labels)
    print(
        f"{images.name}: {', '.join(parts)} images, {len(images.class_names)} classes of {counts.min():,} to "
        f"{counts.max():,} training images\n"
        f"{config.model.weights}: {task.image_size} px cut out of {task.resize} px, on "
        f"{len(devices)} × {devices[0].device_kind}",
        flush=True,
    )
    if cut := seen_size(task.backbone.model, task.image_size):
        print(f"note: {cut}")
    if is_random(config.model.weights):
        print("UNTRAINED: these weights are random; the numbers show what the architecture alone gives", flush=True)
