"""What is evaluated at the end of a pretraining: k-NN on the test images, and every probe that the labels allow."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dinojax.errors import UserError
from dinojax.parallel import make_mesh
from dinojax.probes import knn_predict
from experiments.data.splits import Dataset
from experiments.features.backbones import Backbone
from experiments.features.extractor import FeatureExtractor
from experiments.probing.config import EvaluationConfig, ProbeSettings
from experiments.probing.fitting import HEADLINE_K, check_labels
from experiments.probing.result import run_evaluation
from experiments.runs.settings import DataSettings, Dtype, RunSettings, create


def knn_accuracies(
    backbones: Mapping[str, Backbone],
    dataset: Dataset,
    cache_dir: Path | None,
    dtype: Dtype = "auto",
    mesh: str | None = None,
) -> dict[str, float]:
    """Accuracy (a fraction) on the test images of DINO's weighted k-NN with 20 neighbours, by network.

    All training images vote; with fewer than 20, there are fewer neighbours. Images are resized as in an evaluation, to
    the backbone's `image_size`, and the features are cached: an evaluation of the same networks reads them.

    Args:
        backbones: networks by name; their `weights` and `source` are not used.
        dataset: labelled images.
        cache_dir: folder of cached features, as in `converters.cache.cache_folder`.
        dtype: number type of the model's computation.
        mesh: the devices, as `dinojax.parallel.make_mesh` takes them.
    """
    devices = make_mesh(mesh)
    accuracies, k = {}, min(HEADLINE_K, len(dataset.train))
    for name, backbone in backbones.items():
        extractor = FeatureExtractor(
            backbone.model,
            normalisation=backbone.normalisation,
            image_size=backbone.image_size,
            cache_dir=cache_dir,
            dtype=dtype,
            mesh=devices,
        )
        train, test = (features.vectors() for features in extractor.extract([dataset.train, dataset.test]))
        classes = len(dataset.class_names)
        predicted = knn_predict(train, dataset.train.labels, test, num_classes=classes, ks=(k,), mesh=devices)[k]
        accuracies[name] = float(np.mean(predicted == dataset.test.labels))
    return accuracies


def evaluate_training(
    folder: Path, out: Path, dataset: Dataset, data: DataSettings, run: RunSettings, mesh: str | None = None
) -> None:
    """Evaluates the networks of a training and an untrained one by every probe that the labels allow.

    Args:
        folder: the training's run folder.
        out: folder of the result.
        dataset: labelled images.
        data: the settings that they come from.
        run: the training's seed and cache folder; its own `out` is not used.
        mesh: the devices, as `dinojax.parallel.make_mesh` takes them.
    """
    names = []
    for name in ProbeSettings.available:
        try:
            check_labels([name], dataset, ProbeSettings.shots)
            names.append(name)
        except UserError as error:
            print(f"note: the probe {name} is left out: {error}")
    if not names:
        return
    settings = create(
        EvaluationConfig,
        weights=str(folder),
        data=data.data,
        untrained=True,
        classifiers=",".join(names),
        max_train=data.max_train,
        max_test=data.max_test,
        seed=run.seed,
        out=out,
        cache_dir=run.cache_dir,
        data_dir=data.data_dir,
        mesh=mesh,
    )
    run_evaluation(settings, dataset, command="evaluate")
