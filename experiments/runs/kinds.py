"""What a folder is: the run of which command, and what takes it.

Folders are told apart by the files in them, so that a command that does not take one can say what it is.
"""

import enum
import json
from pathlib import Path
from typing import Any

from dinojax.finetune import MODES
from dinojax.models.files import is_model_folder
from experiments.runs.records import CONFIG_FILE, METRICS_FILE, RESULT_FILE, TRACES_OF_TRAINING

NETWORKS = ("teacher", "student")
INDEX_FILE = "classifiers.json"
DENSE_FILE = "dense.json"
_MOST_BYTES = 64 * 2**20  # of a document that is looked into


class Kind(enum.Enum):
    """What a folder is, as messages say it."""

    MODEL = "a model"
    PRETRAINING = "a pretraining"
    UNFINISHED_PRETRAINING = "a pretraining that has not ended"
    PROBE = "a run of `dinojax probe`"
    EVALUATION = "an evaluation"
    TUNING = "a fine-tuning"
    TUNED = "a finished mode of a fine-tuning"
    UNFINISHED_TUNING = "a fine-tuning that has not ended"
    DENSE = "a run of `dinojax dense`"
    FIGURES = "the output of `dinojax visualize`"
    PREDICTIONS = "the output of `dinojax predict`"
    OTHER = "no run"


# Kind → what takes it; "{}" is the folder.
_TAKEN = {
    Kind.MODEL: "`dinojax probe DATA --weights {}` and `dinojax evaluate {} DATA` take it",
    Kind.PRETRAINING: "`dinojax probe DATA --weights {}` and `dinojax evaluate {} DATA` take it",
    Kind.UNFINISHED_PRETRAINING: "repeat its command, which resumes it",
    Kind.PROBE: "`dinojax predict IMAGES --run {}` and `dinojax summarize {}` take it",
    Kind.EVALUATION: "`dinojax summarize {}` takes it",
    Kind.TUNING: "`dinojax summarize {}` takes it",
    Kind.TUNED: "`dinojax predict IMAGES --run {}` and --weights take it",
    Kind.UNFINISHED_TUNING: "repeat its command, which resumes it",
    Kind.DENSE: "`dinojax predict IMAGES --run {}` and `dinojax summarize {}` take it",
    Kind.FIGURES: "its figures are the result",
    Kind.PREDICTIONS: "predictions.csv in it is the result",
    Kind.OTHER: "name the run folder of a command",
}


def kind_of(folder: Path) -> Kind:
    """What a folder is; damaged documents are not complained about here."""
    if is_model_folder(folder):
        return Kind.MODEL
    if any(is_model_folder(folder / network) for network in NETWORKS):
        return Kind.PRETRAINING
    if (mode := kind_of_mode(folder)) is not Kind.OTHER:
        return mode
    if any((folder / trace).exists() for trace in TRACES_OF_TRAINING):
        return Kind.UNFINISHED_PRETRAINING
    if (folder / INDEX_FILE).is_file():
        return Kind.PROBE
    if (folder / DENSE_FILE).is_file():
        return Kind.DENSE
    if "rows" in _document(folder / RESULT_FILE):
        return Kind.EVALUATION
    kinds = {kind_of_mode(folder / mode) for mode in MODES}
    if Kind.TUNED in kinds:
        return Kind.TUNING
    if Kind.UNFINISHED_TUNING in kinds:
        return Kind.UNFINISHED_TUNING
    config = _document(folder / CONFIG_FILE)
    if "foreground" in config and "images" in config:
        return Kind.FIGURES
    return Kind.PREDICTIONS if "run" in config and "image" in config else Kind.OTHER


def kind_of_mode(folder: Path) -> Kind:
    """What the folder of one mode of a fine-tuning is."""
    if _document(folder / CONFIG_FILE).get("mode") not in MODES:
        return Kind.OTHER
    return Kind.TUNED if (folder / METRICS_FILE).is_file() else Kind.UNFINISHED_TUNING


def finished_modes(folder: Path) -> list[Path]:
    """The folders of the finished modes in the run folder of a fine-tuning."""
    return [folder / mode for mode in MODES if kind_of_mode(folder / mode) is Kind.TUNED]


def described(folder: Path, lacking: str) -> str:
    """A sentence: what the folder is, what it holds none of, and what takes it."""
    kind = kind_of(folder)
    return f"{folder} is {kind.value} and holds no {lacking}; {_TAKEN[kind].format(folder, folder)}"


def _document(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none."""
    try:
        content = json.loads(path.read_bytes()) if path.stat().st_size <= _MOST_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
