"""The DINO training loop: images on the device, compiled steps, log, k-NN, checkpoints, and the result.

The run folder holds config.json, metrics.jsonl, checkpoints/, curves.png and, at the end, the networks teacher/ and
student/ (which every `--weights` takes), result.json and, if there are labels, evaluation/ with the result of every
probe. The same command resumes an interrupted run from the newest sound checkpoint, and ends with the same numbers, bit
for bit, as a run that was never interrupted.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from dinojax import save
from dinojax.checkpoint import TrainingCheckpoints
from dinojax.commands import answering_signals
from dinojax.errors import UserError
from dinojax.models.vit import VisionTransformer
from dinojax.parallel import check_divides, make_mesh, mesh_in_words, replicated
from dinojax.pretraining.step import TrainState
from experiments.data.splits import Dataset
from experiments.data.unlabelled import load_images
from experiments.features.backbones import Backbone
from experiments.pretraining.config import PretrainConfig, PretrainResult
from experiments.pretraining.data import EpochSampler, Images, Window, own_statistics, read_stored, windows
from experiments.pretraining.online import Embed, Monitor, make_embed, make_monitor
from experiments.pretraining.program import (
    Program,
    compute_dtype,
    is_sound,
    make_networks,
    make_program,
    preprocessing,
    vit_config,
)
from experiments.pretraining.reporter import WAY_BACK, Reporter, losses_in_words
from experiments.pretraining.start import load_start
from experiments.probing.after_training import evaluate_training, knn_accuracies
from experiments.runs import records
from experiments.runs.log import RunLog, read_log
from experiments.runs.settings import check_bounds, flat
from experiments.runs.stop import Stop, StoppedError

CHECKPOINTS, CURVES = "checkpoints", "curves.png"
TEACHER, STUDENT = "teacher", "student"
EVALUATION = "evaluation"


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Runs a pretraining, or resumes it.

    Raises:
        UserError: data or settings that cannot be used, a run folder of other settings, no sound checkpoint in it, or
            a loss that is not finite.
    """
    check_bounds(config)
    config, start = load_start(config)
    config.check()
    folder, data = config.folder, config.dataset
    dataset = load_images(data.data, data_dir=data.data_dir, max_train=data.max_train, max_test=data.max_test)
    labelled = bool(dataset.class_names)
    _check_batch(config, len(dataset.train), 0 if labelled else len(dataset.test))
    splits = {"train": dataset.train, "test" if labelled else "held_out": dataset.test}
    found = records.data_record(dataset.class_names, splits)
    accept, back = config.run.accept_changed_data, config.run.from_step is not None
    with records.open_run(folder, config, found, accept_changed_data=accept, other_settings=back):
        result, evaluation = (place / records.RESULT_FILE for place in (folder, folder / EVALUATION))
        evaluate = config.monitoring.evaluate and labelled
        if result.is_file() and (evaluation.is_file() or not evaluate):
            print(f"{folder} is finished: see {result}; name another --out or --seed to run again")
            return _result(folder)
        if not result.is_file() and not _train(config, folder, dataset, start):
            return PretrainResult(folder, None)
        if evaluate:
            evaluate_training(folder, folder / EVALUATION, dataset, data, config.run, config.compute.mesh)
        return _result(folder)


def _check_batch(config: PretrainConfig, images: int, held_out: int) -> None:
    """Raises a `UserError` if the devices cannot share a batch, or the training images do not fill one."""
    batch, parts = config.training.batch_size, config.compute.accumulation_steps
    check_divides(make_mesh(config.compute.mesh), batch, parts)
    if images < batch:
        most = images // parts * parts
        way = f"give --batch-size {most}" if most else "add images"
        rest = f" ({held_out:,} more are held out)" if held_out else ""
        raise UserError(f"--batch-size {batch} is more than the {images:,} training images{rest}; {way}")


def _result(folder: Path) -> PretrainResult:
    result = records.read_json(folder / records.RESULT_FILE)
    return PretrainResult(folder, result["test_knn_accuracy"], result.get("rank_me"))


def _train(config: PretrainConfig, folder: Path, dataset: Dataset, start: VisionTransformer | None) -> bool:
    """Whether the training came to its end, and left its result in the folder."""
    for note in dataset.notes:
        print(f"note: {note}")
    images, side = read_stored(dataset, config)
    if config.dataset.own_statistics:
        mean, std = own_statistics(images)
        config = dataclasses.replace(config, crops=dataclasses.replace(config.crops, mean=mean, std=std))
    monitor = make_monitor(dataset, images, side, config.monitoring.knn_images)
    run = Run(config, folder, dataset, images, monitor, start)
    run.introduce()
    checkpoints = TrainingCheckpoints(folder / CHECKPOINTS, keep_newest=config.monitoring.keep)
    with checkpoints, Stop(config.monitoring.minutes) as stop:
        state = run.train(checkpoints, stop)
        checkpoints.wait()
    if state is not None:
        run.finish(state)
    return state is not None


class Ready(NamedTuple):
    """What the first step needs: the state and its step, images on the device, the compiled steps.

    `evaluation` is that of the state before the first step of a new run.
    """

    state: TrainState
    step: int
    collapse: str | None
    images: jax.Array
    steps: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    evaluation: dict[str, float] | None


class Run:
    """The settings, images and compiled program of a run, and its stages: introduce, train, finish."""

    def __init__(
        self,
        config: PretrainConfig,
        folder: Path,
        dataset: Dataset,
        images: Images,
        monitor: Monitor,
        start: VisionTransformer | None,
    ):
        self.config, self.folder, self.dataset, self.images, self.monitor = config, folder, dataset, images, monitor
        self.sampler = EpochSampler(len(images), config.training.batch_size, config.run.seed)
        self.program: Program = make_program(config, self.sampler.steps_per_epoch, start)
        self.embed: Embed = make_embed(self.program.backbone_graph, config, self.program.mesh)
        self.total_steps = config.training.epochs * self.sampler.steps_per_epoch

    def introduce(self) -> None:
        """Says what will be done; flushed, because the output may go to a file."""
        config, device, mesh = self.config, jax.devices()[0].device_kind, self.program.mesh
        device = device if mesh.size == 1 else f"{mesh.size} × {device} ({mesh_in_words(mesh)})"
        training, model = config.training, config.model
        sizes = [x.size for x in jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: make_networks(config))))]
        crops = config.crops
        print(
            f"{self.dataset.name}: {len(self.images):,} images of {self.images.shape[2]}×{self.images.shape[1]} px, "
            f"{training.epochs} epochs of {self.sampler.steps_per_epoch} steps of {training.batch_size}\n"
            f"{sum(sizes) / 1e6:.1f} M parameters with the head; patches of {model.patch_size} px; "
            f"{crops.global_crops}×{crops.global_size} + {crops.local_crops}×{crops.local_size} px crops; "
            f"{model.prototypes:,} prototypes; {np.dtype(compute_dtype(config) or 'float32')} on {device}\n"
            f"{self.folder}",
            flush=True,
        )

    def train(self, checkpoints: TrainingCheckpoints, stop: Stop) -> TrainState | None:
        """The state after the last step; None if the run was stopped before, with a checkpoint."""
        try:
            with self._bar() as bar:
                bar.set_description("compiling…")
                ready = stop.wait_for(lambda: self._prepare(checkpoints, bar))
                bar.reset()  # the rate is that of the steps alone
                bar.initial = bar.n = bar.last_print_n = ready.step * self.config.training.batch_size
                bar.set_description("")
                with RunLog(self.folder, ready.step, tensorboard=self.config.monitoring.tensorboard) as log:
                    about = (self.config, self.folder, self.program.schedules, self.sampler.steps_per_epoch)
                    reporter = Reporter(*about, log, bar, ready.collapse)
                    state, done = self._loop(ready, reporter, checkpoints, stop)
        except StoppedError:
            print(f"stopped {stop.reason} before the first step; the same command resumes from what is saved")
            stop.raise_interrupt()
            return None
        from experiments.pretraining.curves import save_training_curves

        save_training_curves(
            self.folder / CURVES, read_log(self.folder), self.config.model.prototypes, title=self._title
        )
        if done == self.total_steps:
            return state
        print(f"stopped {stop.reason} at step {done:,} of {self.total_steps:,}; the same command resumes from there")
        stop.raise_interrupt()
        return None

    def _bar(self) -> tqdm:
        total = self.total_steps * self.config.training.batch_size
        return tqdm(total=total, unit="img", unit_scale=True, dynamic_ncols=True, smoothing=0.05)

    def _prepare(self, checkpoints: TrainingCheckpoints, bar: tqdm) -> Ready:
        """Everything before the first step, most of which is compilation."""
        state, start, collapse = self._first_state(checkpoints, bar)
        images, every = self._on_devices(self.images), self.config.monitoring.log_every
        if start == self.total_steps:  # only the result is missing
            return Ready(state, start, collapse, images, self.program.steps, None)
        new = start == 0 and self.config.monitoring.knn_every > 0
        evaluation = self.monitor.evaluate(self.embed, state.teacher["backbone"]) if new else None
        first = next(windows(start, self.config.training.epochs, self.sampler.steps_per_epoch, every))
        batches, count = next(self.sampler.batches(first, self._steps_per_dispatch))
        steps = self.program.steps.lower(state, images, batches, count).compile()
        return Ready(state, start, collapse, images, steps, evaluation)

    def _loop(
        self, ready: Ready, reporter: Reporter, checkpoints: TrainingCheckpoints, stop: Stop
    ) -> tuple[TrainState, int]:
        """The state after the last step or where the run was stopped, and the number of steps done."""
        monitoring, state, done, saved_at = self.config.monitoring, ready.state, ready.step, time.monotonic()
        before = read_log(self.folder)
        if ready.evaluation and not before:
            reporter.write({"step": 0, "epoch": 0, **ready.evaluation})
        reporter.compare_with_start(before or read_log(self.folder))
        steps_per_epoch = self.sampler.steps_per_epoch
        for window in windows(done, self.config.training.epochs, steps_per_epoch, monitoring.log_every):
            parts = []
            for batches, count in self.sampler.batches(window, self._steps_per_dispatch):
                state, metrics = ready.steps(state, ready.images, batches, count)
                parts.append((metrics, count))
            reporter.report_last()  # while the device computes this one
            reporter.last = (window, parts)
            done = window.stop
            evaluated = self._evaluate_epoch(window, state, reporter)
            late = time.monotonic() - saved_at > 60 * monitoring.checkpoint_minutes
            finished = done == self.total_steps
            if stop.wanted or finished or (window.ends_epoch and (late or evaluated)):
                reporter.report_last()
                self._raise_unless_sound(state, done)
                # Without labels there is no score: RankMe may be higher before training than after it.
                score = evaluated.get("knn_accuracy")
                checkpoints.save(done, state, record=self._record(window, reporter.collapse), score=score)
                saved_at = time.monotonic()
            if stop.wanted and not finished:
                checkpoints.wait()
                break
        return state, done

    def _record(self, window: Window, collapse: str | None) -> dict[str, Any]:
        """What a checkpoint keeps beside the state; with `network`, other commands read the networks in it."""
        network = {
            "config": vit_config(self.config).settings(),
            "preprocessing": dataclasses.asdict(preprocessing(self.config)),
            "source": self._source,
        }
        return {"epoch": window.epoch, "collapse": collapse, "total_steps": self.total_steps, "network": network}

    def finish(self, state: TrainState) -> None:
        """Writes the networks and the result; result.json comes last, and marks the run as finished."""
        config, first = self.config, answering_signals(self.program.init)
        first_name = "random_init" if config.start.init is None else "start"
        states = {"teacher": state.teacher, "student": state.student, first_name: first.teacher}
        states = {name: self._on_devices(one) for name, one in states.items()}
        ranks = {name: self.monitor.rank(self.embed, one["backbone"]) for name, one in states.items()}
        models = {name: nnx.merge(self.program.backbone_graph, one["backbone"]) for name, one in states.items()}
        accuracies = None
        if self.dataset.class_names:
            print("k-NN on the test images", flush=True)
            networks = {name: Backbone(model, name, self._source) for name, model in models.items()}
            compute = config.compute
            accuracies = knn_accuracies(networks, self.dataset, config.run.cache_dir, compute.dtype, compute.mesh)
        for name in (TEACHER, STUDENT):
            save(models[name], self.folder / name, source=self._source)
        log = read_log(self.folder)
        last = [record for record in log if "loss" in record][-1]
        result = {
            "test_knn_accuracy": accuracies,
            "rank_me": ranks,
            "monitored_images": len(self.monitor.queries),
            "loss": last["loss"],
            **{name: last[name] for name in ("class_cross_entropy", "patch_cross_entropy") if name in last},
            "uniform_loss": math.log(config.model.prototypes),
            "collapse": last.get("collapse"),
            "steps": self.total_steps,
            "train_seconds": round(sum(record.get("seconds", 0) for record in log), 1),
            "images": len(self.images),
            "image_shape": self.images.shape[1:3],
            "data_fingerprint": self.dataset.train.fingerprint,
            "config": flat(config),
            "environment": records.environment(),
        }
        records.write_json(self.folder / records.RESULT_FILE, result)
        self._print_result(result)

    def _print_result(self, result: dict[str, Any]) -> None:
        if accuracies := result["test_knn_accuracy"]:
            print("test k-NN: " + ", ".join(f"{name} {100 * value:.2f} %" for name, value in accuracies.items()))
        ranks, size = result["rank_me"], min(len(self.monitor.queries), self.config.model.embed_dim)
        where = "training images set apart" if accuracies else "held-out images"
        print(
            f"feature rank (RankMe, at most {size}) on {result['monitored_images']:,} {where}: "
            + ", ".join(f"{name} {rank:.1f}" for name, rank in ranks.items())
            + f"\n{losses_in_words(result)} (uniform: {result['uniform_loss']:.4f})\n{self.folder}"
        )

    def _on_devices(self, tree: Any) -> Any:
        """The same arrays, whole on every device."""
        mesh = self.program.mesh
        return jax.device_put(tree) if mesh.size == 1 else jax.device_put(tree, replicated(mesh))

    @property
    def _source(self) -> dict[str, Any]:
        """The origin of the networks."""
        return {
            "method": f"{self._method}, trained by dinojax",
            "data": self.dataset.name,
            "images": len(self.images),
            "epochs": self.config.training.epochs,
            "seed": self.config.run.seed,
            **({"init": self.config.start.init} if self.config.start.init else {}),
        }

    @property
    def _steps_per_dispatch(self) -> int:
        default = 1 if jax.default_backend() == "cpu" else self.config.monitoring.log_every
        return min(self.config.compute.steps_per_dispatch or default, self.config.monitoring.log_every)

    @property
    def _method(self) -> str:
        return {"dino": "DINO", "dinov2": "DINOv2"}[self.config.objective.method]

    @property
    def _title(self) -> str:
        return f"{self._method} on {self.dataset.name}: {len(self.images):,} images, seed {self.config.run.seed}"

    def _first_state(self, checkpoints: TrainingCheckpoints, bar: tqdm) -> tuple[TrainState, int, str | None]:
        """The state, step and collapse of the newest sound checkpoint, else of a new run."""
        restored = checkpoints.restore(self.program.abstract, step=self.config.run.from_step)
        if restored is None:
            return self.program.init(), 0, None
        with bar.external_write_mode():
            for sentence in restored.skipped:
                print(f"note: {sentence}")
            print(f"resuming at step {restored.step:,} of {self.total_steps:,}", flush=True)
        return restored.state, restored.step, restored.record["collapse"]

    def _raise_unless_sound(self, state: TrainState, step: int) -> None:
        """A diverged state must not become the newest checkpoint."""
        if not is_sound(state):
            raise UserError(f"the parameters overflow after step {step:,}; {WAY_BACK.format(folder=self.folder)}")

    def _evaluate_epoch(self, window: Window, state: TrainState, reporter: Reporter) -> dict[str, float]:
        """Logs k-NN accuracy and feature rank if this epoch is due for them; returns them, or nothing."""
        epoch, every = window.epoch + 1, self.config.monitoring.knn_every
        due = every and (epoch % every == 0 or epoch == self.config.training.epochs)
        if not (due and window.ends_epoch):
            return {}
        reporter.report_last()
        numbers = self.monitor.evaluate(self.embed, state.teacher["backbone"])
        reporter.write({"step": window.stop, "epoch": epoch, **numbers})
        return numbers
