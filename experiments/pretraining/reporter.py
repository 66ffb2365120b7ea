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
from dinojax.pretraining.monitors import diagnose_collapse
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

    def write(self, record: dict[str, Any]) -> None:
        """Writes an evaluation to the log and the progress bar."""
        self._log.write(record)
        if "knn_accuracy" in record:
            self._shown["knn"] = f"{100 * record['knn_accuracy']:.1f}%"
        else:
            self._shown["rank"] = f"{record['rank_me']:.1f}"
        self._since = time.monotonic()

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
        sentence = diagnose_collapse(means["loss"], means["feature_std"], self._config.model.prototypes)
        if sentence and not self.collapse:
            self._bar.write(f"note: {sentence}")
        self.collapse = sentence


def _means(parts: Sequence[tuple[dict[str, jax.Array], int]]) -> dict[str, float]:
    """Mean of each metric over the steps of a window."""
    fetched = [({name: np.asarray(x)[:count] for name, x in metrics.items()}) for metrics, count in parts]
    return {name: float(np.mean(np.concatenate([part[name] for part in fetched]))) for name in fetched[0]}
