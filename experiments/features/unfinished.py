"""The networks of a training that has not ended, read from a checkpoint.

A network in a checkpoint is named RUN/checkpoints/step_N/teacher; there is no such folder. Checkpoints appear whole and
are hashed, so that they are read without the lock of the run, also while the training continues.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinojax import Preprocessing, UserError, VisionTransformer, ViTConfig
from dinojax.checkpoint import Restored, TrainingCheckpoints
from dinojax.models.files import abstract_model, with_parameters
from experiments.runs.kinds import NETWORKS

CHECKPOINTS = "checkpoints"
_PLACE = re.compile(rf"(.+/{CHECKPOINTS})/step_(\d+)/({'|'.join(NETWORKS)})")
_BACKBONE = "{}.backbone."
_VALUE = ".value"  # ends the dotted path of each parameter of a state


def find_in_checkpoints(run: Path) -> dict[str, str]:
    """Network → its name in the newest sound checkpoint of a run folder.

    Raises:
        UserError: there is no checkpoint yet, it holds no networks of this kind, or all are damaged.
    """
    found = _read(run / CHECKPOINTS, NETWORKS, None)
    if found is None:
        raise UserError(
            f"{run} is the run of a training that has not ended and holds no checkpoint yet; wait for the first one, "
            "or repeat the training's command, which resumes it"
        )
    _architecture(run, found)
    for sentence in found.skipped:
        print(f"note: {sentence}")
    return {name: str(run / CHECKPOINTS / f"step_{found.step}" / name) for name in NETWORKS}


def place_in_checkpoint(weights: str) -> tuple[Path, int, str] | None:
    """The folder of checkpoints, the step and the network that `weights` names; None if it names something else."""
    match = _PLACE.fullmatch(str(Path(weights).expanduser()))
    return (Path(match[1]), int(match[2]), match[3]) if match and Path(match[1]).is_dir() else None


def load_from_checkpoint(weights: str) -> tuple[VisionTransformer, str, Mapping[str, Any]]:
    """A network in a checkpoint, `weights`, and the origin of the weights; it says how far the training has come.

    Raises:
        UserError: there is no such checkpoint, it holds no networks of this kind, or it is damaged.
    """
    folder, step, name = place_in_checkpoint(weights) or (Path(weights), 0, NETWORKS[0])
    found = _read(folder, (name,), step)
    if found is None:
        raise UserError(f"{weights}: there is no such checkpoint")
    network, total = _architecture(folder.parent, found), found.record["total_steps"]
    prefix = _BACKBONE.format(name)
    arrays = {path.removeprefix(prefix).removesuffix(_VALUE): array for path, array in found.state.items()}
    model = with_parameters(abstract_model(ViTConfig(**network["config"])), arrays)
    model.preprocessing = Preprocessing(**network["preprocessing"])
    if step < total:
        print(f"note: the training of {folder.parent} has not ended: {name} of step {step:,} of {total:,}", flush=True)
    return model, weights, {**network["source"], "step": step, "steps": total}


def _read(folder: Path, networks: tuple[str, ...], step: int | None) -> Restored | None:
    with TrainingCheckpoints(folder) as checkpoints:
        return checkpoints.read(tuple(map(_BACKBONE.format, networks)), step=step)


def _architecture(run: Path, found: Restored) -> dict[str, Any]:
    """What the checkpoint records of its networks."""
    network = found.record.get("network")
    if network is None:
        raise UserError(
            f"{run} is the run of a training that has not ended, and its checkpoints name no network (it tunes a "
            "classifier, or an earlier version wrote them); repeat the training's command, which resumes it"
        )
    return network
