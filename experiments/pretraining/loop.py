"""The DINO training loop: images on the device, compiled steps, log, k-NN, checkpoints, and the result.

The run folder holds config.json, metrics.jsonl, checkpoints/, curves.png and, at the end, the networks teacher/ and
student/ (which every `--weights` takes), result.json, and evaluation/ with the result of every probe. The same
command resumes an interrupted run from the newest sound checkpoint, and ends with the same numbers, bit for bit, as a
run that was never interrupted.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from dinojax import save
from dinojax.checkpoint import TrainingCheckpoints
from dinojax.errors import UserError
from dinojax.pretraining.monitors import diagnose_collapse
from dinojax.pretraining.step import TrainState
from experiments.data.load import load_dataset
from experiments.data.splits import Dataset
from experiments.features.backbones import Backbone
from experiments.pretraining.config import PretrainConfig, PretrainResult
from experiments.pretraining.data import EpochSampler, Images, Window, own_statistics, read_images, windows
from experiments.pretraining.online import Embed, Subset, make_embed
from experiments.pretraining.program import Program, compute_dtype, is_sound, make_networks, make_program
from experiments.probing.after_training import evaluate_training, knn_accuracies
from experiments.runs import records
from experiments.runs.log import RunLog, read_log
from experiments.runs.settings import flat
from experiments.runs.stop import Stop

CHECKPOINTS, CURVES = "checkpoints", "curves.png"
TEACHER, STUDENT = "teacher", "student"
EVALUATION = "evaluation"
_WAY_BACK = (
    "training has diverged, and earlier checkpoints are intact: go back with --from-step N, one of the steps in "
    "{folder}/checkpoints, and a lower --learning-rate, a smaller --clip-norm or --dtype float32"
)


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Runs a pretraining, or resumes it.

    Raises:
        UserError: data or settings that cannot be used, a run folder of other settings, no sound checkpoint in it, or
            a loss that is not finite.
    """
    config.check()
    folder, data = config.folder, config.dataset
    dataset = load_dataset(data.data, data_dir=data.data_dir, max_train=data.max_train, max_test=data.max_test)
    if len(dataset.train) < config.training.batch_size:
        raise UserError(
            f"--batch-size {config.training.batch_size} is more than the {len(dataset.train):,} training images"
        )
    found = records.data_record(dataset.class_names, {"train": dataset.train, "test": dataset.test})
    accept, back = config.run.accept_changed_data, config.run.from_step is not None
    with records.open_run(folder, config, found, accept_changed_data=accept, other_settings=back):
        result, evaluation = (place / records.RESULT_FILE for place in (folder, folder / EVALUATION))
        if result.is_file() and (evaluation.is_file() or not config.monitoring.evaluate):
            print(f"{folder} is finished: see {result}; name another --out or --seed to run again")
            return _result(folder)
        if not result.is_file() and not _train(config, folder, dataset):
            return PretrainResult(folder, None)
        if config.monitoring.evaluate:
            evaluate_training(folder, folder / EVALUATION, dataset, data, config.run)
        return _result(folder)


def _result(folder: Path) -> PretrainResult:
    return PretrainResult(folder, records.read_json(folder / records.RESULT_FILE)["test_knn_accuracy"])


def _train(config: PretrainConfig, folder: Path, dataset: Dataset) -> bool:
    """Whether the training came to its end, and left its result in the folder."""
    images = read_images(dataset.train, config.dataset.image_size)
    if config.dataset.own_statistics:
        mean, std = own_statistics(images)
        config = dataclasses.replace(config, crops=dataclasses.replace(config.crops, mean=mean, std=std))
    run = Run(config, folder, dataset, images)
    run.introduce()
    checkpoints = TrainingCheckpoints(folder / CHECKPOINTS, keep_newest=config.monitoring.keep)
    with checkpoints, Stop(config.monitoring.minutes) as stop:
        state = run.train(checkpoints, stop)
        checkpoints.wait()
    if state is not None:
        run.finish(state)
    return state is not None


class Run:
    """The settings, images and compiled program of a run, and its stages: introduce, train, finish."""

    def __init__(self, config: PretrainConfig, folder: Path, dataset: Dataset, images: Images):
        self.config, self.folder, self.dataset, self.images = config, folder, dataset, images
        self.sampler = EpochSampler(len(images), config.training.batch_size, config.run.seed)
        self.program: Program = make_program(config, self.sampler.steps_per_epoch)
        self.embed: Embed = make_embed(self.program.backbone_graph, config)
        monitoring = config.monitoring
        self.subset = Subset.of(dataset, images, monitoring.knn_images) if monitoring.knn_every else None
        self.total_steps = config.training.epochs * self.sampler.steps_per_epoch

    def introduce(self) -> None:
        """Says what will be done; flushed, because the output may go to a file."""
        config, device = self.config, jax.devices()[0].device_kind
        training, model = config.training, config.model
        sizes = [x.size for x in jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: make_networks(config))))]
        crops = config.crops
        for note in self.dataset.notes:
            print(f"note: {note}")
        print(
            f"{self.dataset.name}: {len(self.images):,} images of {self.images.shape[1]}×{self.images.shape[2]} px, "
            f"{training.epochs} epochs of {self.sampler.steps_per_epoch} steps of {training.batch_size}\n"
            f"{sum(sizes) / 1e6:.1f} M parameters with the head; patches of {model.patch_size} px; "
            f"{crops.global_crops}×{crops.global_size} + {crops.local_crops}×{crops.local_size} px crops; "
            f"{model.prototypes:,} prototypes; {np.dtype(compute_dtype(config) or 'float32')} on {device}\n"
            f"{self.folder}",
            flush=True,
        )

    def train(self, checkpoints: TrainingCheckpoints, stop: Stop) -> TrainState | None:
        """The state after the last step; None if the run was stopped before, with a checkpoint."""
        config = self.config
        state, start, collapse = self._first_state(checkpoints)
        images = jax.device_put(self.images)
        done, saved_at = start, time.monotonic()
        bar = tqdm(
            total=self.total_steps * config.training.batch_size, initial=start * config.training.batch_size,
            unit="img", unit_scale=True, dynamic_ncols=True, smoothing=0.05,
        )  # fmt: skip
        with bar, RunLog(self.folder, start, tensorboard=config.monitoring.tensorboard) as log:
            reporter = Reporter(self, log, bar, collapse)
            if self.subset and not read_log(self.folder):
                log.write({"step": 0, "epoch": 0, **self.subset.evaluate(self.embed, state.teacher["backbone"])})
            every, steps_per_epoch = config.monitoring.log_every, self.sampler.steps_per_epoch
            for window in windows(start, config.training.epochs, steps_per_epoch, every):
                parts = []
                for batches, count in self.sampler.batches(window, self._steps_per_dispatch):
                    state, metrics = self.program.steps(state, images, batches, count)
                    parts.append((metrics, count))
                reporter.report_last()  # while the device computes this one
                reporter.last = (window, parts)
                done = window.stop
                score = self._evaluate_epoch(window, state, reporter) if window.ends_epoch else None
                late = time.monotonic() - saved_at > 60 * config.monitoring.checkpoint_minutes
                finished = done == self.total_steps
                if stop.wanted or finished or (window.ends_epoch and (late or score is not None)):
                    reporter.report_last()
                    self._raise_unless_sound(state, done)
                    record = {"epoch": window.epoch, "collapse": reporter.collapse}
                    checkpoints.save(done, state, record=record, score=score)
                    saved_at = time.monotonic()
                if stop.wanted and not finished:
                    checkpoints.wait()
                    break
        from experiments.pretraining.curves import save_training_curves

        save_training_curves(self.folder / CURVES, read_log(self.folder), config.model.prototypes, title=self._title)
        if done == self.total_steps:
            return state
        print(f"stopped {stop.reason} at step {done:,} of {self.total_steps:,}; the same command resumes from there")
        stop.raise_interrupt()
        return None

    def finish(self, state: TrainState) -> None:
        """Writes the networks and the result; result.json comes last, and marks the run as finished."""
        config = self.config
        print("k-NN on the test images", flush=True)
        backbones = {
            "teacher": state.teacher["backbone"],
            "student": state.student["backbone"],
            "random_init": self.program.init().teacher["backbone"],
        }
        source = {
            "method": "DINO, trained by dinojax",
            "data": self.dataset.name,
            "images": len(self.images),
            "epochs": config.training.epochs,
            "seed": config.run.seed,
        }
        models = {name: nnx.merge(self.program.backbone_graph, state) for name, state in backbones.items()}
        networks = {name: Backbone(model, name, source) for name, model in models.items()}
        accuracies = knn_accuracies(networks, self.dataset, config.run.cache_dir, config.compute.dtype)
        for name in (TEACHER, STUDENT):
            save(models[name], self.folder / name, source=source)
        log = read_log(self.folder)
        last = [record for record in log if "loss" in record][-1]
        result = {
            "test_knn_accuracy": accuracies,
            "loss": last["loss"],
            "uniform_loss": math.log(config.model.prototypes),
            "collapse": last.get("collapse"),
            "steps": self.total_steps,
            "train_seconds": round(sum(record.get("seconds", 0) for record in log), 1),
            "images": len(self.images),
            "data_fingerprint": self.dataset.train.fingerprint,
            "config": flat(config),
            "environment": records.environment(),
        }
        records.write_json(self.folder / records.RESULT_FILE, result)
        shown = ", ".join(f"{name} {100 * accuracy:.2f} %" for name, accuracy in accuracies.items())
        print(f"test k-NN: {shown}\nloss {last['loss']:.4f} (uniform: {result['uniform_loss']:.4f})\n{self.folder}")

    @property
    def _steps_per_dispatch(self) -> int:
        default = 1 if jax.default_backend() == "cpu" else self.config.monitoring.log_every
        return min(self.config.compute.steps_per_dispatch or default, self.config.monitoring.log_every)

    @property
    def _title(self) -> str:
        return f"DINO on {self.dataset.name}: {len(self.images):,} images, seed {self.config.run.seed}"

    def _first_state(self, checkpoints: TrainingCheckpoints) -> tuple[TrainState, int, str | None]:
        """The state, step and collapse of the newest sound checkpoint, else of a new run."""
        restored = checkpoints.restore(jax.eval_shape(self.program.init), step=self.config.run.from_step)
        if restored is None:
            return self.program.init(), 0, None
        for sentence in restored.skipped:
            print(f"note: {sentence}")
        print(f"resuming at step {restored.step:,} of {self.total_steps:,}", flush=True)
        return restored.state, restored.step, restored.record["collapse"]

    def _raise_unless_sound(self, state: TrainState, step: int) -> None:
        """A diverged state must not become the newest checkpoint."""
        if not is_sound(state):
            raise UserError(f"the parameters overflow after step {step:,}; {_WAY_BACK.format(folder=self.folder)}")

    def _evaluate_epoch(self, window: Window, state: TrainState, reporter: "Reporter") -> float | None:
        """Logs k-NN accuracy and feature rank if this epoch is due for them; returns the accuracy."""
        epoch, config = window.epoch + 1, self.config
        if not self.subset or (epoch % config.monitoring.knn_every and epoch != config.training.epochs):
            return None
        reporter.report_last()
        numbers = self.subset.evaluate(self.embed, state.teacher["backbone"])
        reporter.write({"step": window.stop, "epoch": epoch, **numbers})
        return numbers["knn_accuracy"]


class Reporter:
    """Writes the metrics of each window to the log and the progress bar; stops the run if the loss is not finite."""

    def __init__(self, run: Run, log: RunLog, bar: tqdm, collapse: str | None):
        self._run, self._log, self._bar = run, log, bar
        self.last: tuple[Window, list] | None = None
        self.collapse = collapse
        self._since = time.monotonic()
        self._shown: dict[str, str] = {}

    def write(self, record: dict[str, Any]) -> None:
        """Writes an evaluation to the log and the progress bar."""
        self._log.write(record)
        if "knn_accuracy" in record:
            self._shown["knn"] = f"{100 * record['knn_accuracy']:.1f}%"
        self._since = time.monotonic()

    def report_last(self) -> None:
        """Waits for the window in `last`, if there is one, and writes its metrics.

        Raises:
            UserError: its loss is not finite.
        """
        if self.last is None:
            return
        window, parts = self.last
        self.last, config = None, self._run.config
        means = _means(parts)
        if not math.isfinite(means["loss"]):
            raise UserError(
                f"the loss is {means['loss']} between steps {window.start:,} and {window.stop:,}; "
                f"{_WAY_BACK.format(folder=self._run.folder)}"
            )
        now = time.monotonic()
        schedules = {name: float(of(window.stop - 1)) for name, of in self._run.program.schedules.items()}
        record = {
            "step": window.stop,
            "epoch": window.stop / self._run.sampler.steps_per_epoch,
            **means,
            **schedules,
            "seconds": round(now - self._since, 3),
        }
        self._since = now
        if window.epoch >= max(1, config.training.warmup_epochs) and window.ends_epoch:
            self._diagnose_collapse(means)
        if self.collapse:
            record["collapse"] = self.collapse
        self._log.write(record)
        self._shown["loss"] = f"{means['loss']:.3f}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update((window.stop - window.start) * config.training.batch_size)

    def _diagnose_collapse(self, means: dict[str, float]) -> None:
        sentence = diagnose_collapse(means["loss"], means["feature_std"], self._run.config.model.prototypes)
        if sentence and not self.collapse:
            self._bar.write(f"note: {sentence}")
        self.collapse = sentence


def _means(parts: Sequence[tuple[dict[str, jax.Array], int]]) -> dict[str, float]:
    """Mean of each metric over the steps of a window."""
    fetched = [({name: np.asarray(x)[:count] for name, x in metrics.items()}) for metrics, count in parts]
    return {name: float(np.mean(np.concatenate([part[name] for part in fetched]))) for name in fetched[0]}
