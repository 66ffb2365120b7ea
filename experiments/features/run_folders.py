"""Run folders that are given as weights: which network they stand for."""

from pathlib import Path
from typing import Any

from dinojax.documents import read_document
from dinojax.errors import UserError
from dinojax.models.files import is_model_folder
from dinojax.models.vit import VisionTransformer
from experiments.features.fingerprints import fingerprint
from experiments.runs.kinds import INDEX_FILE, Kind, described, finished_modes, kind_of
from experiments.runs.records import RESULT_FILE

TUNED_MODEL = "model"  # folder of the tuned backbone in that of its mode
_REMEDY = "repeat the run that wrote it"
_WITHOUT_NETWORK = (
    *(Kind.PROBE, Kind.EVALUATION, Kind.DENSE, Kind.FIGURES, Kind.PREDICTIONS),
    Kind.UNFINISHED_TUNING,
)


def backbone_of_run(weights: str) -> str:
    """The backbone of a finished fine-tuning: its tuned model or, where only a head was trained, the one below it.

    Other `weights` are returned unchanged.

    Raises:
        UserError: the run folder holds no network, or those of several modes.
    """
    folder = Path(weights).expanduser()
    kind = kind_of(folder)
    if kind in (Kind.TUNING, Kind.TUNED):
        return _tuned(_mode(folder, kind))
    if kind in _WITHOUT_NETWORK:
        below = _probed(folder, kind)
        hint = f", and its network was {below}" if below else ""
        raise UserError(f"{described(folder, 'network')}{hint}")
    return weights


def check_unchanged(given: str, weights: str, model: VisionTransformer) -> None:
    """Raises a `UserError` if a model is not the one that the fine-tuning in the folder `given` put its head on."""
    folder = Path(given).expanduser()
    index = read_document(_mode(folder, kind_of(folder)) / INDEX_FILE, files=[], remedy=_REMEDY)
    if index.get("weights_fingerprint") != fingerprint(model):
        raise UserError(f"{given} trained a head on {weights}, whose parameters have changed since; give other weights")


def _mode(folder: Path, kind: Kind) -> Path:
    """The folder of a mode, or of the only mode of a run."""
    modes = finished_modes(folder) if kind is Kind.TUNING else [folder]
    if len(modes) > 1:
        raise UserError(f"{folder} is a fine-tuning with several modes; name one: {', '.join(map(str, modes))}")
    return modes[0]


def _tuned(folder: Path) -> str:
    """The backbone of one mode."""
    if is_model_folder(folder / TUNED_MODEL):
        return str(folder / TUNED_MODEL)
    index = read_document(folder / INDEX_FILE, files=[], remedy=_REMEDY)
    below = str(index.get("weights"))
    if below.partition(":")[0] == "random":
        raise UserError(
            f"{folder} is a head on random weights, and holds no network; give {below} --seed {index.get('seed')}"
        )
    return below


def _probed(folder: Path, kind: Kind) -> str | None:
    """The weights that an evaluation has recorded."""
    files = {Kind.PROBE: INDEX_FILE, Kind.EVALUATION: RESULT_FILE, Kind.DENSE: RESULT_FILE}
    if kind not in files:
        return None
    document: dict[str, Any] = read_document(folder / files[kind], files=[], remedy=_REMEDY)
    return document.get("weights")
