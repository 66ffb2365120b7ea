"""Supervised training on a folder of images: data, steps, the validation after each epoch, checkpoints, and going on.

Each mode has a folder in the run folder: config.json, metrics.jsonl (a line an epoch), checkpoints/, and at the end
what `finetune_result` writes of the best epoch. A mode that is finished is left as it is.
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
    Classifier,
    FinetuneState,
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
from dinojax.pretraining.schedules import Schedule, cosine_schedule
from experiments.data.folder import load_image_folder
from experiments.data.loader import Batch
from experiments.data.splits import Split
from experiments.features.backbones import is_random, load_backbone
from experiments.features.extractor import check_image_size
from experiments.finetuning.config import FREE, FinetuneConfig
from experiments.finetuning.data import FeatureData, ImageData, Placement, Task
from experiments.finetuning.result import Outcome, finish, report
from experiments.runs import records
from experiments.runs.log import RunLog, read_log
from experiments.runs.measure import measured

CHECKPOINTS = "checkpoints"


def finetune(config: FinetuneConfig) -> Path:
    """Trains every mode asked for, or goes on with it; returns the run folder.

    Raises:
        UserError: images, weights or settings that cannot be used, a folder of other settings, or a loss that is not
            finite.
    """
    config.check()
    out = (config.out or Path("runs", "finetune_folder", config.folder.expanduser().resolve().name)).expanduser()
    task = make_task(config)
    _introduce(config, task)
    for mode in config.modes:
        settings, folder = config.of_mode(mode), out / mode
        records.open_run(folder, settings, free=FREE)
        if (folder / records.METRICS_FILE).is_file():
            print(f"{mode}: finished before, see {folder}")
            continue
        Training(settings, task, folder).run()
    report(out)
    return out


def make_task(config: FinetuneConfig) -> Task:
    """Reads the folder's names, not its images, and the weights."""
    images = load_image_folder(
        config.folder,
        val_fraction=config.val_fraction,
        train_split=config.train_split,
        val_split=config.val_split,
        test_split=config.test_split,
        max_train=config.max_train,
        max_val=config.max_val,
        seed=config.seed,
    )
    backbone = load_backbone(config.weights, seed=config.seed, cache_dir=config.cache_dir.expanduser())
    size = config.image_size or backbone.image_size
    check_image_size(backbone.model, size)
    resize = config.resize or round(size * 8 / 7)
    if resize < size:
        raise UserError(f"--resize {resize} is less than the {size} px that are cut out of it")
    return Task(images, backbone, size, resize)


class Training:
    """One mode: its parameters, its compiled step, and its epochs."""

    def __init__(self, config: FinetuneConfig, task: Task, folder: Path):
        self.config, self.task, self.folder = config, task, folder
        train, depth = task.images.train, task.backbone.model.config.depth
        self.steps_per_epoch = -(-len(train) // config.batch_size)
        self.root = jax.random.key(config.seed)
        backbone = _with_drop_path(task.backbone.model, config.drop_path)
        self.model = Classifier(backbone, len(task.images.class_names), rngs=nnx.Rngs(config.seed))
        self.trainable, self.frozen = split_parameters(
            self.model, config.mode, lora_rank=config.lora_rank, key=jax.random.fold_in(self.root, 2)
        )
        self.place = Placement(config.batch_size)
        self.schedule = _schedule(config, self.steps_per_epoch)
        self.optimizer = finetune_optimizer(
            config.mode,
            depth,
            learning_rate=self.schedule,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay,
            clip_norm=config.clip_norm,
        )
        on_cpu = jax.default_backend() == "cpu"
        self.dtype = ("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype
        self.data = (
            FeatureData(config, task)
            if config.mode == "linear" and not config.augment
            else ImageData(config, task, self.place, self.model, self.dtype)
        )
        weights = balanced_class_weights(train.labels, len(task.images.class_names))
        update = make_finetune_step(
            self.data.logits_of,
            self.optimizer,
            class_weights=weights if config.balance == "loss" else None,
            label_smoothing=config.label_smoothing,
            ema_decay=config.ema_decay or None,
            accumulation_steps=config.accumulation_steps or self._parts(on_cpu),
        )

        def step(state: FinetuneState, frozen: Any, batch: Batch, epoch: Array) -> tuple[FinetuneState, dict]:
            inputs = self.data.training_inputs(batch, epoch)
            drop = jax.random.fold_in(jax.random.fold_in(self.root, 1), state.step)
            return update(state, frozen, inputs, batch.labels, drop)

        self.step = jax.jit(step, donate_argnums=0)
        self.forward = jax.jit(lambda parameters, frozen, images: self.data.logits(parameters, frozen, images))

    def _parts(self, on_cpu: bool) -> int:
        if not on_cpu or self.config.mode == "linear":
            return 1
        return cached_parts(self.task.backbone.model, self.config.batch_size, self.task.image_size)

    def init(self) -> FinetuneState:
        """The state before the first step."""
        return init_finetune_state(self.trainable, self.optimizer, ema=bool(self.config.ema_decay))

    def run(self) -> None:
        """All epochs, from the newest checkpoint on, and the result of the best one."""
        config, task, total = self.config, self.task, count_parameters((self.trainable, self.frozen))
        print(f"\n{config.mode}: {count_parameters(self.trainable):,} of {total:,} parameters train", flush=True)
        like = jax.eval_shape(self.init)
        with TrainingCheckpoints(self.folder / CHECKPOINTS, keep_newest=1) as checkpoints:
            restored = checkpoints.restore(like)
            for sentence in restored.skipped if restored else ():
                print(f"note: {sentence}")
            state, first = (restored.state, restored.record["epoch"]) if restored else (self.init(), 0)
            if first:
                print(f"going on after epoch {first} of {config.epochs}", flush=True)
            with measured() as cost:
                self._epochs(self.place.whole(state), first, checkpoints)
            checkpoints.wait()
            best = checkpoints.restore_best(like)
        state = best.state
        parameters = state.trainable if state.ema is None else state.ema
        kept = merge_parameters(parameters, self.frozen, lora_alpha=config.lora_alpha)
        outcome = Outcome(
            best_epoch=best.record["epoch"],
            trainable=count_parameters(self.trainable),
            parameters=count_parameters(kept),
            peak_mib=_device_peak_mib() or cost.peak_mib,
            logits={split.name: self.judge(self.place.whole(parameters), split) for split in task.judged},
        )
        finish(self.folder, config, task, nnx.merge(nnx.split(self.model, nnx.Param)[0], kept), outcome, self.dtype)

    def judge(self, parameters: Any, split: Split) -> Float[np.ndarray, "images classes"]:
        """The logits of all images of a split."""
        frozen, parts = self.place.whole(self.frozen), []
        for inputs, count in self.data.judged_inputs(split):
            parts.append(np.asarray(self.forward(parameters, frozen, inputs), np.float32)[:count])
        return np.concatenate(parts)

    def _epochs(self, state: FinetuneState, first: int, checkpoints: TrainingCheckpoints) -> None:
        config, frozen, images = self.config, self.place.whole(self.frozen), len(self.task.images.train)
        log_so_far = [record for record in read_log(self.folder) if record["epoch"] <= first]
        scores = [record["score"] for record in log_so_far]
        bar = tqdm(
            total=config.epochs * images, initial=first * images, desc=config.mode, unit="img", dynamic_ncols=True
        )
        with bar, RunLog(self.folder, first * self.steps_per_epoch, tensorboard=False) as log:
            for epoch in range(first, config.epochs):
                if config.early_stop and len(scores) - 1 - int(np.argmax(scores or [0])) >= config.early_stop:
                    bar.write(f"no better epoch in {config.early_stop}: stopped after epoch {epoch}")
                    return
                started, sums = time.perf_counter(), []
                for batch in self.data.training_batches(epoch):
                    state, metrics = self.step(state, frozen, self.place.split(batch), epoch)
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
            raise UserError(
                f"{self.config.mode}: the loss of epoch {epoch + 1} is {means['train_loss']}; earlier epochs are "
                f"intact in {self.folder}; start anew in another --out with a lower --learning-rate than "
                f"{self.config.learning_rate:g}, or with --clip-norm 1"
            )
        return {"step": step, "epoch": epoch + 1, **means, "learning_rate": float(self.schedule(step - 1))}

    def _validate(self, state: FinetuneState) -> dict[str, float]:
        """Of the validation images, by the moving average where there is one; a higher score is better."""
        labels = self.task.images.validation.labels
        logits = self.judge(state.trainable if state.ema is None else state.ema, self.task.images.validation)
        hits = logits.argmax(axis=1) == labels
        numbers = {
            "validation_loss": float(weighted_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))),
            "validation_accuracy": float(hits.mean()),
            "validation_balanced_accuracy": float(np.mean([hits[labels == one].mean() for one in np.unique(labels)])),
        }
        wanted = numbers[f"validation_{self.config.select}"]
        return {**numbers, "score": -wanted if self.config.select == "loss" else wanted}


def _schedule(config: FinetuneConfig, steps_per_epoch: int) -> Schedule:
    total, warmup = config.epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "cosine":
        return cosine_schedule(config.learning_rate, 0.0, total, warmup_steps=warmup)
    halfway = config.epochs // 2 * steps_per_epoch
    rate = optax.piecewise_constant_schedule(config.learning_rate, {halfway: 0.1} if config.schedule == "step" else {})
    return lambda step: rate(step) * jnp.minimum(1, (step + 1) / max(warmup, 1))


def _with_drop_path(model: VisionTransformer, rate: float) -> VisionTransformer:
    """The same parameters in a model that drops residual branches."""
    shape = dataclasses.replace(model.config, drop_path_rate=rate)
    return with_parameters(abstract_model(shape), named_parameters(model))


def _device_peak_mib() -> float | None:
    """Of an accelerator's memory; None where the device does not tell, as CPUs."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in stats else None


def _introduce(config: FinetuneConfig, task: Task) -> None:
    """What will be done, before anything slow; flushed, because logs may be files."""
    images, devices = task.images, jax.devices()
    for note in images.notes:
        print(f"note: {note}")
    parts = [f"{len(split):,} {split.name}" for split in (images.train, *task.judged)]
    counts = np.bincount(images.train.labels)
    print(
        f"{images.name}: {', '.join(parts)} images, {len(images.class_names)} classes of {counts.min():,} to "
        f"{counts.max():,} training images\n"
        f"{config.weights}: {task.image_size} px out of {task.resize}, on {len(devices)} × {devices[0].device_kind}",
        flush=True,
    )
    if is_random(config.weights):
        print("UNTRAINED: these weights are random, the numbers below show what architecture alone gives", flush=True)
