"""What a pretraining says of its steps, in the log and on the progress bar."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dinojax.errors import UserError
from dinojax.pretraining.monitors import diagnose_collapse, diagnose_dinov2_collapse
from dinojax.pretraining.schedules import Schedule
from experiments.pretraining.config import PretrainConfig
from experiments.pretraining.data import Window
from experiments.runs.log import RunLog

WAY_BACK = (
    "training has diverged, and earlier checkpoints are intact: go back with --from-step N, one of the steps in "
    "{folder}/checkpoints, and a lower --learning-rate, a smaller --clip-norm or --dtype float32"
)


class Reporter:
    """Writes the metrics of each window to the log and the progress bar; stops the run if the loss is not finite."""

    def __init__(
        self,
        config: PretrainConfig,
        folder: Path,
        schedules: Mapping[str, Schedule],
        steps_per_epoch: int,
        log: RunLog,
        bar: tqdm,
        collapse: str | None,
    ):
        self._config, self._folder, self._log, self._bar = config, folder, log, bar
        self._schedules, self._steps_per_epoch = schedules, steps_per_epoch
        self.last: tuple[Window, list] | None = None
        self.collapse = collapse
        self._since = time.monotonic()
        self._shown: dict[str, str] = {}
        self._start: Mapping[str, float] = {}
        self._lost = False

    def compare_with_start(self, log: Sequence[Mapping[str, Any]]) -> None:
        """From now on, says at once if an evaluation is worse than the one before the first step, with `--init`."""
        if self._config.start.init is not None:
            self._start = next((record for record in log if record["step"] == 0), {})

    def write(self, record: dict[str, Any]) -> None:
        """Writes an evaluation to the log and the progress bar."""
        self._log.write(record)
        if "knn_accuracy" in record:
            self._shown["knn"] = f"{100 * record['knn_accuracy']:.1f}%"
        else:
            self._shown["rank"] = f"{record['rank_me']:.1f}"
        self._say_what_is_lost(record)
        self._since = time.monotonic()

    def _say_what_is_lost(self, record: Mapping[str, Any]) -> None:
        """A note, once until it is made up for, where an evaluation lost more than `--most-lost` of the start's."""
        name = next((one for one in ("knn_accuracy", "rank_me") if one in record and one in self._start), None)
        if name is None:
            return
        first, now, scale = self._start[name], record[name], {"knn_accuracy": 100.0, "rank_me": 1.0}[name]
        lost = now < (1 - self._config.start.most_lost) * first
        if lost and not self._lost:
            what = {"knn_accuracy": "k-NN accuracy in %", "rank_me": "feature rank"}[name]
            self._bar.write(
                f"note: the {what} has fallen from {scale * first:.1f} at the start to {scale * now:.1f} in epoch "
                f"{record['epoch']}; lower --learning-rate, or raise --teacher-momentum or --heads-warmup"
            )
        self._lost = lost

    def report_last(self) -> None:
        """Waits for the window in `last`, if there is one, and writes its metrics.

        Raises:
            UserError: its loss is not finite.
        """
        if self.last is None:
            return
        window, parts = self.last
        self.last, config = None, self._config
        means = _means(parts)
        if not math.isfinite(means["loss"]):
            raise UserError(
                f"the loss is {means['loss']} between steps {window.start:,} and {window.stop:,}; "
                f"{WAY_BACK.format(folder=self._folder)}"
            )
        now = time.monotonic()
        schedules = {name: float(of(window.stop - 1)) for name, of in self._schedules.items()}
        record = {
            "step": window.stop,
            "epoch": window.stop / self._steps_per_epoch,
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
        prototypes = self._config.model.prototypes
        if self._config.objective.method == "dinov2":
            patch_prototypes = self._config.objective.patch_prototypes or prototypes
            sentence = diagnose_dinov2_collapse(means, prototypes, patch_prototypes)
        else:
            sentence = diagnose_collapse(means["loss"], means["feature_std"], prototypes)
        if sentence and not self.collapse:
            self._bar.write(f"note: {sentence}")
        self.collapse = sentence


def losses_in_words(record: Mapping[str, Any]) -> str:
    """The losses whose largest useful value is log K: of class tokens and, for DINOv2, of masked patches."""
    if "class_cross_entropy" not in record:
        return f"loss {record['loss']:.4f}"
    return f"loss of class tokens {record['class_cross_entropy']:.4f}, of patches {record['patch_cross_entropy']:.4f}"


def _means(parts: Sequence[tuple[dict[str, jax.Array], int]]) -> dict[str, float]:
    """Mean of each metric over the steps of a window."""
    fetched = [({name: np.asarray(x)[:count] for name, x in metrics.items()}) for metrics, count in parts]
    return {name: float(np.mean(np.concatenate([part[name] for part in fetched]))) for name in fetched[0]}
