"""The results in the folders of evaluations and trainings, in one form."""

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from dinojax.documents import sha256_of_file
from dinojax.errors import UserError
from dinojax.models.config import ViTConfig
from dinojax.models.files import CONFIG_FILE, WEIGHTS_FILE, abstract_model
from experiments.pretraining.config import PretrainConfig
from experiments.probing.config import REPORTED, ClassifierConfig
from experiments.probing.fitting import selected_on
from experiments.runs.kinds import INDEX_FILE, Kind, described, kind_of
from experiments.runs.records import METRICS_FILE, RESULT_FILE, read_json, with_new_names
from experiments.runs.settings import unimportant

# Settings that change a number no more than a seed does; data sets are identified by their names and sizes.
_FREE_OF_TRAINING = unimportant(PretrainConfig) | {"seed", "data", "max_test", "knn_every"}
_FREE_OF_EVALUATION = unimportant(ClassifierConfig) | {
    *("seed", "data", "weights", "network", "untrained", "classifiers", "batch_size", "folds"),
}

Key = tuple[str, str, str]  # network, features, probe


@dataclasses.dataclass(frozen=True)
class EvaluatedRun:
    """One evaluation, or the k-NN at the end of one training.

    Attributes:
        folder: where it was read.
        same: what the runs of one line have in common, as JSON.
        weights: identifies the trained weights.
        trained_on: name of the data set that the weights were trained on; "" where it is not known.
        evaluated_on: name of the data set, image size, and what is unusual about the evaluation.
        about: model, images, parameters and epochs of the training.
        seconds: time of the training.
        device: "GPU", "TPU" or "CPU".
        accuracies: fractions by network, features and probe.
        intervals: 95 % intervals over the test images, where there are any.
        balanced: balanced accuracies, where classes are unlike.
    """

    folder: Path
    same: str
    weights: str
    trained_on: str
    evaluated_on: str
    about: Mapping[str, Any]
    seconds: float | None
    device: str
    accuracies: Mapping[Key, float]
    intervals: Mapping[Key, tuple[float, float]]
    balanced: Mapping[Key, float] = dataclasses.field(default_factory=dict)


def read_runs(paths: Iterable[Path], *, others: Collection[Path] = ()) -> list[EvaluatedRun]:
    """All runs in the folders and below. Only `others`, which hold results of another kind, may have none.

    Raises:
        UserError: a folder without any, or a damaged file.
    """
    found: dict[Path, EvaluatedRun] = {}
    for path in (path.expanduser() for path in paths):
        if not path.is_dir():
            raise UserError(f"{path}: there is no such folder; name output folders of evaluations or trainings")
        results = [path / RESULT_FILE] if (path / RESULT_FILE).is_file() else sorted(path.rglob(RESULT_FILE))
        runs = {file.parent.resolve(): run for file in results if (run := _read(file))}
        if not runs and path not in others:
            raise UserError(f"{path} {_why_none(path)}")
        found |= runs
    if not found and not others:
        raise UserError("no runs were given; name output folders of evaluations or trainings")
    return list(found.values())


def _why_none(path: Path) -> str:
    """Why there is no run in a folder, and what to do."""
    if (path / METRICS_FILE).is_file() and (path / INDEX_FILE).is_file():
        return f"is of an earlier version of cifar10_probe, which wrote no {RESULT_FILE}; repeat that run"
    if kind_of(path) is not Kind.OTHER:
        return described(path, "results").removeprefix(f"{path} ")
    return f"holds no {RESULT_FILE} of a run; name output folders of evaluations or finished trainings"


def _read(file: Path) -> EvaluatedRun | None:
    result = read_json(file)
    if "rows" in result:
        return _evaluation(file.parent, result)
    # Another command's, or a training without labels.
    return _training(file.parent, result) if result.get("test_knn_accuracy") else None


def _evaluation(folder: Path, result: Mapping[str, Any]) -> EvaluatedRun:
    training, first = result["pretraining"], next(iter(result["networks"].values()))
    config = with_new_names(result["config"])
    # Settings that earlier versions did not have are None where they are not used.
    settings = {name: value for name, value in config.items() if name not in _FREE_OF_EVALUATION and value is not None}
    settings |= {name: result[name] for name in ("image_size", "resize", "feature_dtype")}
    data = {name: value for name, value in result["data"].items() if not name.endswith("fingerprint")}
    evaluated, unlike = data.pop("evaluated_on", "test"), data.pop("unlike_classes", False)
    known = _trained_as(training["config"]) if training.get("config") else {"weights": result["weights"]}
    about = {"model": _shape(first["architecture"], training), "parameters": result["parameters"],
             "images": training.get("images"), "epochs": training.get("epochs"),
             "weights": None if training.get("config") else Path(result["weights"]).name}  # fmt: skip
    rows = {(row["network"], row["features"], row["probe"]): row for row in result["rows"]}
    same = [result["command"], settings, data, known, *(training.get(name) for name in ("data", "images", "backend"))]
    return EvaluatedRun(
        folder,
        json.dumps(same, sort_keys=True),
        "+".join(network["fingerprint"] for name, network in result["networks"].items() if name != "untrained"),
        training.get("data", ""),
        f"{data['name']}, {result['image_size']} px"
        + (f", {evaluated} images" if evaluated != "test" else "")
        + (f", {data['folds']} folds" if data["folds"] > 1 else "")
        + (", by cifar10_probe" if result["command"] == "cifar10_probe" else "")
        + (f", {selected_on(evaluated)}" if config.get("protocol") == REPORTED else ""),
        about,
        training.get("train_seconds"),
        _device(training.get("backend")),
        {key: row["accuracy"] for key, row in rows.items()},
        {key: tuple(row["interval"]) for key, row in rows.items() if row["interval"]},
        {key: row["balanced_accuracy"] for key, row in rows.items()} if unlike else {},
    )


def _training(folder: Path, result: Mapping[str, Any]) -> EvaluatedRun:
    document = read_json(folder / "teacher" / CONFIG_FILE)
    source, architecture = document["source"], document["config"]
    names = {"random_init": "untrained"}
    model = nnx.state(abstract_model(ViTConfig(**architecture)), nnx.Param)
    sizes = [math.prod(array.shape) for array in jax.tree.leaves(model)]
    about = {"model": _shape(architecture, source), "parameters": sum(sizes), "images": result["images"],
             "epochs": source["epochs"], "weights": None}  # fmt: skip
    same = ["training", _trained_as(result["config"]), source["data"], result["images"], result["config"]["max_test"]]
    return EvaluatedRun(
        folder,
        json.dumps(same, sort_keys=True),
        document.get("sha256") or sha256_of_file(folder / "teacher" / WEIGHTS_FILE),
        source["data"],
        f"{source['data']}, {document.get('preprocessing', source)['image_size']} px, at the end of training",
        about,
        result["train_seconds"],
        _device(result["environment"]["backend"]),
        {(names.get(k, k), "cls", "knn_20"): v for k, v in result["test_knn_accuracy"].items()},
        {},
    )


def _trained_as(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in with_new_names(config).items() if name not in _FREE_OF_TRAINING}


def _shape(architecture: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    """The size and patch of a model, and DINOv2 where that is how it was trained here."""
    widths = {192: "ViT-Tiny", 384: "ViT-S", 768: "ViT-B", 1024: "ViT-L", 1536: "ViT-g"}
    dim, depth, patch = (architecture[name] for name in ("embed_dim", "depth", "patch_size"))
    usual = depth == {"ViT-L": 24, "ViT-g": 40}.get(widths.get(dim), 12)
    shape = f"{widths[dim]}/{patch}" if dim in widths and usual else f"ViT {dim}×{depth}/{patch}"
    return shape + (" by DINOv2" if str(source.get("method", "")).startswith("DINOv2") else "")


def _device(backend: str | None) -> str:
    return {"gpu": "GPU", "cuda": "GPU", "rocm": "GPU"}.get(backend or "", (backend or "").upper())
