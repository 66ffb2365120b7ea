"""The one DINO training loop: images on the device, compiled steps, log, k-NN, checkpoints, and how a run ends.

The run folder holds config.json, metrics.jsonl, checkpoints/, curves.png and, at the end, the networks teacher/ and
student/ (which every `--weights` takes), result.json, and evaluation/ with the result of every probe. Started again,
the same command goes on from the newest sound checkpoint, and ends with the same numbers, bit for bit, as a run that
was never interrupted.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

from dinojax import save
from dinojax.checkpoint import TrainingCheckpoints
from dinojax.errors import UserError, exit_on_user_error
from dinojax.pretraining.monitors import name_collapse
from dinojax.pretraining.step import TrainState
from experiments.data.load import load_dataset
from experiments.data.splits import Dataset
from experiments.pretraining.config import FREE, PretrainConfig
from experiments.pretraining.data import Images, Order, Window, own_statistics, read_images, windows
from experiments.pretraining.online import Embed, Subset, final_accuracies, make_embed
from experiments.pretraining.program import Program, compute_dtype, make_networks, make_program
from experiments.runs import records
from experiments.runs.host_memory import keep_freed_memory
from experiments.runs.log import RunLog, read_log

CHECKPOINTS, CURVES = "checkpoints", "curves.png"
TEACHER, STUDENT = "teacher", "student"
EVALUATION = "evaluation"


def main(recipes: dict[str, PretrainConfig], description: str, args: Sequence[str] | None = None) -> None:
    """The command line of a file that brings `recipes`: `NAME [--setting value …]`, the first one by default."""
    with exit_on_user_error():
        kind = tyro.extras.subcommand_type_from_defaults(recipes)
        config = tyro.cli(kind, default=next(iter(recipes.values())), description=description, args=args)
        if config.accumulation_steps == 1:  # parts of a batch need little memory and run slower with it
            keep_freed_memory()
        pretrain(config)


def pretrain(config: PretrainConfig) -> Path:
    """Runs, or goes on with, a pretraining; returns the run folder.

    Raises:
        UserError: data or settings that cannot be used, a run folder of other settings, no sound checkpoint in it, or
            a loss that is not finite.
    """
    config.check()
    folder = (config.out or Path("runs", config.command, f"{config.recipe}-seed{config.seed}")).expanduser()
    finished = (folder / records.RESULT_FILE).is_file()
    evaluated = not config.evaluate or (folder / EVALUATION / records.RESULT_FILE).is_file()
    if finished and evaluated:
        records.open_run(folder, config, free=FREE)
        print(f"{folder} is finished: see {folder / records.RESULT_FILE}; name another --out, or --seed, to run anew")
        return folder
    limits = {"max_train": config.max_train, "max_test": config.max_test}
    dataset = load_dataset(config.data, data_dir=config.data_dir, **limits)
    if finished:
        records.open_run(folder, config, free=FREE)
        _evaluate(config, folder, dataset)
        return folder
    if len(dataset.train) < config.batch_size:
        raise UserError(f"--batch-size {config.batch_size} is more than the {len(dataset.train):,} training images")
    records.open_run(folder, config, free=FREE)
    images = read_images(dataset.train, config.image_size)
    if config.own_statistics:
        mean, std = own_statistics(images)
        config = dataclasses.replace(config, crops=dataclasses.replace(config.crops, mean=mean, std=std))
    run = Run(config, folder, dataset, images)
    run.introduce()
    with TrainingCheckpoints(folder / CHECKPOINTS, keep_newest=config.keep) as checkpoints, Stop(config) as stop:
        state = run.train(checkpoints, stop)
        if state is None:
            return folder
        checkpoints.wait()
    run.finish(state)
    if config.evaluate:
        _evaluate(config, folder, dataset)
    return folder


def _evaluate(config: PretrainConfig, folder: Path, dataset: Dataset) -> None:
    """Every probe that the images allow, on the networks of the run and on an untrained one."""
    from experiments.probing.evaluation_config import CLASSIFIERS, EvaluationConfig
    from experiments.probing.evaluation_run import evaluate
    from experiments.probing.fitting import check_labels

    names = []
    for name in CLASSIFIERS:
        try:
            check_labels([name], dataset, EvaluationConfig.shots)
            names.append(name)
        except UserError as error:
            print(f"note: without the probe {name}: {error}")
    if not names:
        return
    settings = EvaluationConfig(
        weights=str(folder),
        data=config.data,
        untrained=True,
        classifiers=",".join(names),
        max_train=config.max_train,
        max_test=config.max_test,
        seed=config.seed,
        out=folder / EVALUATION,
        cache_dir=config.cache_dir,
        data_dir=config.data_dir,
    )
    evaluate(settings, dataset, command="evaluate")


class Run:
    """A run's settings, images and compiled program, and what happens at each of its stations."""

    def __init__(self, config: PretrainConfig, folder: Path, dataset: Dataset, images: Images):
        self.config, self.folder, self.dataset, self.images = config, folder, dataset, images
        self.order = Order(len(images), config.batch_size, config.seed)
        self.program: Program = make_program(config, self.order.steps_per_epoch)
        self.embed: Embed = make_embed(self.program.backbone_graph, config)
        self.subset = Subset.of(dataset, images, config.knn_images) if config.knn_every else None
        self.total_steps = config.epochs * self.order.steps_per_epoch

    def introduce(self) -> None:
        """What will be done, before anything slow; flushed, because logs may be files."""
        config, device = self.config, jax.devices()[0].device_kind
        sizes = [x.size for x in jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: make_networks(config))))]
        crops = config.crops
        for note in self.dataset.notes:
            print(f"note: {note}")
        print(
            f"{self.dataset.name}: {len(self.images):,} images of {self.images.shape[1]}×{self.images.shape[2]} px, "
            f"{config.epochs} epochs of {self.order.steps_per_epoch} steps of {config.batch_size}\n"
            f"{sum(sizes) / 1e6:.1f} M parameters with the head; patches of {config.patch_size} px; "
            f"{crops.global_crops}×{crops.global_size} + {crops.local_crops}×{crops.local_size} px crops; "
            f"{config.prototypes:,} prototypes; {np.dtype(compute_dtype(config) or 'float32')} on {device}\n"
            f"{self.folder}",
            flush=True,
        )

    def train(self, checkpoints: TrainingCheckpoints, stop: "Stop") -> TrainState | None:
        """The loop, to the end; None where it was stopped before, with a checkpoint."""
        config = self.config
        state, start, collapse = self._first_state(checkpoints)
        images = jax.device_put(self.images)
        done, saved_at = start, time.monotonic()
        bar = tqdm(
            total=self.total_steps * config.batch_size, initial=start * config.batch_size,
            unit="img", unit_scale=True, dynamic_ncols=True, smoothing=0.05,
        )  # fmt: skip
        with bar, RunLog(self.folder, start, tensorboard=config.tensorboard) as log:
            reporter = Reporter(self, log, bar, collapse)
            if self.subset and not read_log(self.folder):
                log.write({"step": 0, "epoch": 0, **self.subset.judge(self.embed, state.teacher["backbone"])})
            for window in windows(start, config.epochs, self.order.steps_per_epoch, config.log_every):
                parts = []
                for batches, count in self.order.batches(window, self._steps_per_dispatch):
                    state, metrics = self.program.steps(state, images, batches, count)
                    parts.append((metrics, count))
                reporter.report_last()  # while the device works on this one
                reporter.last = (window, parts)
                done = window.stop
                score = self._judge(window, state, reporter) if window.ends_epoch else None
                late = time.monotonic() - saved_at > 60 * config.checkpoint_minutes
                finished = done == self.total_steps
                if stop.wanted or finished or (window.ends_epoch and (late or score is not None)):
                    reporter.report_last()
                    record = {"epoch": window.epoch, "collapse": reporter.collapse}
                    checkpoints.save(done, state, record=record, score=score)
                    saved_at = time.monotonic()
                if stop.wanted and not finished:
                    checkpoints.wait()
                    break
        from experiments.pretraining.curves import save_training_curves

        save_training_curves(self.folder / CURVES, read_log(self.folder), config.prototypes, title=self._title)
        if done == self.total_steps:
            return state
        print(f"stopped {stop.reason} at step {done:,} of {self.total_steps:,}; the same command goes on from there")
        stop.raise_interrupt()
        return None

    def finish(self, state: TrainState) -> None:
        """The networks and the result; result.json comes last and says that all the rest is there."""
        config = self.config
        print("k-NN of the test images", flush=True)
        backbones = {
            "teacher": state.teacher["backbone"],
            "student": state.student["backbone"],
            "random_init": self.program.init().teacher["backbone"],
        }
        accuracies = final_accuracies(self.embed, backbones, self.dataset, self.images, config)
        source = {
            "method": "DINO, trained by dinojax",
            "data": self.dataset.name,
            "images": len(self.images),
            "epochs": config.epochs,
            "seed": config.seed,
            "image_size": config.crops.global_size,
            "mean": config.crops.mean,
            "std": config.crops.std,
        }
        for name in (TEACHER, STUDENT):
            save(nnx.merge(self.program.backbone_graph, backbones[name]), self.folder / name, source=source)
        log = read_log(self.folder)
        last = [record for record in log if "loss" in record][-1]
        result = {
            "test_knn_accuracy": accuracies,
            "loss": last["loss"],
            "uniform_loss": math.log(config.prototypes),
            "collapse": last.get("collapse"),
            "steps": self.total_steps,
            "train_seconds": round(sum(record.get("seconds", 0) for record in log), 1),
            "images": len(self.images),
            "data_fingerprint": self.dataset.train.fingerprint,
            "config": dataclasses.asdict(config),
            "environment": records.environment(),
        }
        records.write_json(self.folder / records.RESULT_FILE, result)
        shown = ", ".join(f"{name} {100 * accuracy:.2f} %" for name, accuracy in accuracies.items())
        print(f"test k-NN: {shown}\nloss {last['loss']:.4f} (uniform: {result['uniform_loss']:.4f})\n{self.folder}")

    @property
    def _steps_per_dispatch(self) -> int:
        default = 1 if jax.default_backend() == "cpu" else self.config.log_every
        return min(self.config.steps_per_dispatch or default, self.config.log_every)

    @property
    def _title(self) -> str:
        return f"DINO on {self.dataset.name}: {len(self.images):,} images, seed {self.config.seed}"

    def _first_state(self, checkpoints: TrainingCheckpoints) -> tuple[TrainState, int, str | None]:
        """From the newest sound checkpoint, else from the seed; the steps that are done, and a collapse by then."""
        restored = checkpoints.restore(jax.eval_shape(self.program.init))
        if restored is None:
            return self.program.init(), 0, None
        for sentence in restored.skipped:
            print(f"note: {sentence}")
        print(f"going on from step {restored.step:,} of {self.total_steps:,}", flush=True)
        return restored.state, restored.step, restored.record["collapse"]

    def _judge(self, window: Window, state: TrainState, reporter: "Reporter") -> float | None:
        """k-NN and rank where they are due at the end of an epoch; returns the k-NN accuracy."""
        epoch, config = window.epoch + 1, self.config
        if not self.subset or (epoch % config.knn_every and epoch != config.epochs):
            return None
        reporter.report_last()
        numbers = self.subset.judge(self.embed, state.teacher["backbone"])
        reporter.write({"step": window.stop, "epoch": epoch, **numbers})
        return numbers["knn_accuracy"]


class Reporter:
    """Turns the metrics of a window into a line of the log and of the progress bar; stops where they are not finite."""

    def __init__(self, run: Run, log: RunLog, bar: tqdm, collapse: str | None):
        self._run, self._log, self._bar = run, log, bar
        self.last: tuple[Window, list] | None = None
        self.collapse = collapse
        self._since = time.monotonic()
        self._shown: dict[str, str] = {}

    def write(self, record: dict[str, Any]) -> None:
        """A line of its own, which the progress bar shows as well."""
        self._log.write(record)
        if "knn_accuracy" in record:
            self._shown["knn"] = f"{100 * record['knn_accuracy']:.1f}%"
        self._since = time.monotonic()

    def report_last(self) -> None:
        """Waits for the window in `last`, if there is one, and reports it.

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
                f"the loss is {means['loss']} between steps {window.start:,} and {window.stop:,}; earlier checkpoints "
                "are intact; start anew with a lower --learning-rate, a smaller --clip-norm, or --dtype float32"
            )
        now = time.monotonic()
        schedules = {name: float(of(window.stop - 1)) for name, of in self._run.program.schedules.items()}
        record = {
            "step": window.stop,
            "epoch": window.stop / self._run.order.steps_per_epoch,
            **means,
            **schedules,
            "seconds": round(now - self._since, 3),
        }
        self._since = now
        if window.epoch >= max(1, config.warmup_epochs) and window.ends_epoch:
            self._name_collapse(means)
        if self.collapse:
            record["collapse"] = self.collapse
        self._log.write(record)
        self._shown["loss"] = f"{means['loss']:.3f}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update((window.stop - window.start) * config.batch_size)

    def _name_collapse(self, means: dict[str, float]) -> None:
        sentence = name_collapse(means["loss"], means["feature_std"], self._run.config.prototypes)
        if sentence and not self.collapse:
            self._bar.write(f"note: {sentence}")
        self.collapse = sentence


class Stop:
    """Whether the run is to stop at the next opportunity: after --minutes, on SIGTERM, or on Ctrl-C."""

    def __init__(self, config: PretrainConfig):
        self._deadline = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: object) -> None:
        if self._signal == signal.SIGINT == number:  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        self._signal = number
        tqdm.write("saving a checkpoint, then stopping")

    @property
    def wanted(self) -> bool:
        """Whether to save and stop."""
        return self._signal is not None or time.monotonic() > self._deadline

    @property
    def reason(self) -> str:
        """Words that follow "stopped"."""
        return f"by {signal.Signals(self._signal).name}" if self._signal else "after --minutes"

    def raise_interrupt(self) -> None:
        """Ctrl-C ends the command as it ends others; everything else is a clean exit."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt


def _means(parts: Sequence[tuple[dict[str, jax.Array], int]]) -> dict[str, float]:
    """Of each metric over the steps of a window."""
    fetched = [({name: np.asarray(x)[:count] for name, x in metrics.items()}) for metrics, count in parts]
    return {name: float(np.mean(np.concatenate([part[name] for part in fetched]))) for name in fetched[0]}
