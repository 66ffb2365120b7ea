"""Fitted classifiers: named arrays and settings that predict classes, kept in files without pickle.

A classifier takes all parts of the features and looks at those that it was fitted to.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save

from dinojax.documents import read_document, write_document, write_whole
from dinojax.errors import UserError
from experiments.features.parts import CLS, FeatureParts
from experiments.runs.kinds import INDEX_FILE, described, finished_modes

if TYPE_CHECKING:
    from jax.sharding import Mesh

TITLES = {
    "knn": "k-NN, weighted cosine",
    "knn5": "k-NN, Euclidean",
    "linear": "linear probe",
    "sweep": "linear, 52 heads",
    "logistic": "logistic regression",
    "mlp": "MLP, file order",
    "mlp_shuffled": "MLP, shuffled",
    "svc": "SVC, RBF",
}
FINETUNED = "finetuned"  # what `finetune_folder` leaves: a head on the backbone it was trained with
_REMEDY = "repeat that run"
_ROWS = 2048  # images compared with all support vectors at once
_NEIGHBOURS_FILE = "training_features.safetensors"  # shared by both k-NN classifiers

Vectors = Float[np.ndarray, "images width"]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a classifier says of images.

    Attributes:
        classes: the predicted class of each.
        scores: of every class, higher is likelier.
        are_probabilities: whether the scores are (shares of votes count as such); an SVC has none.
        by_k: the classes by other numbers of neighbours, where the classifier is k-NN.
    """

    classes: Int[np.ndarray, " images"]
    scores: Float[np.ndarray, "images classes"]
    are_probabilities: bool = True
    by_k: Mapping[int, Int[np.ndarray, " images"]] = dataclasses.field(default_factory=dict)

    @property
    def confidence(self) -> Float[np.ndarray, " images"]:
        """The probability of the predicted class; not a number where there is none."""
        if not self.are_probabilities:
            return np.full(len(self.classes), np.nan)
        return np.take_along_axis(self.scores, self.classes[:, None], axis=1)[:, 0]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A fitted classifier.

    Attributes:
        name: one of `TITLES`.
        arrays: what was learnt, by name.
        settings: JSON; "kind" says how to predict, "classes" how many there are.
        part: of the features, the one it was fitted to.
    """

    name: str
    arrays: Mapping[str, np.ndarray]
    settings: Mapping[str, Any]
    part: str = CLS

    def predict(self, features: FeatureParts, mesh: "Mesh | None" = None) -> Prediction:
        """Classifies images by their features; the devices of a mesh share the search of neighbours."""
        inputs = {name: self.settings[name] for name in ("blocks", "mean_patch") if name in self.settings}
        shared = {"mesh": mesh} if self.settings["kind"] in _SEARCHES else {}
        return _PREDICTORS[self.settings["kind"]](self, features.vectors(self.part, **inputs), **shared)


def save_classifiers(folder: Path, classifiers: Sequence[Classifier], description: Mapping[str, Any]) -> None:
    """Writes one safetensors file per classifier (one for both k-NN), and an index with their hashes and its own.

    Args:
        folder: exists.
        classifiers: fitted on features of the same backbone.
        description: JSON, what the features are; stored in the index.
    """
    files = {classifier.name: _file(classifier) for classifier in classifiers}
    contents = {files[classifier.name]: classifier.arrays for classifier in classifiers}
    for file, arrays in contents.items():
        write_whole(folder / file, save({name: np.ascontiguousarray(a) for name, a in arrays.items()}))
    index = {c.name: {"file": files[c.name], "settings": dict(c.settings), "part": c.part} for c in classifiers}
    write_document(folder / INDEX_FILE, {**description, "classifiers": index}, files=contents)


def run_with_classifiers(folder: Path) -> Path:
    """The folder itself, or that of the only finished mode in the run folder of a fine-tuning.

    Raises:
        UserError: the folder holds no classifiers, or those of several modes.
    """
    if not folder.is_dir():
        raise UserError(f"--run {folder}: there is no such folder; name a run of `dinojax probe` or `dinojax finetune`")
    if (folder / INDEX_FILE).exists():
        return folder
    modes = finished_modes(folder)
    if len(modes) > 1:
        raise UserError(
            f"--run {folder} is a fine-tuning with several modes; name one of them: {', '.join(map(str, modes))}"
        )
    if not modes:
        raise UserError(f"--run {described(folder, 'classifiers')}")
    return modes[0]


def read_index(folder: Path) -> dict[str, Any]:
    """What `save_classifiers` wrote beside the arrays.

    Raises:
        UserError: the index is missing or damaged.
    """
    path = folder / INDEX_FILE
    index = read_document(path, files=[], remedy=_REMEDY)
    if not isinstance(index.get("classifiers"), dict):
        raise UserError(f"{path} is damaged (it lists no classifiers); {_REMEDY}")
    return index


def load_classifiers(folder: Path, names: Sequence[str] | None = None) -> list[Classifier]:
    """Classifiers that `save_classifiers` wrote; None is all of them.

    Raises:
        UserError: a classifier that is not there, or a damaged file.
    """
    index = read_index(folder)["classifiers"]
    missing = [name for name in names or () if name not in index]
    if missing:
        raise UserError(f"--classifiers {missing[0]} is not among those of {folder}: {', '.join(index)}")
    files = {name: Path(index[name]["file"]).name for name in names or index}
    read_document(folder / INDEX_FILE, files=sorted(set(files.values())), remedy=_REMEDY)
    loaded: dict[str, Mapping[str, np.ndarray]] = {}
    for name, file in files.items():
        try:
            loaded[name] = load_file(folder / file)
        except (safetensors.SafetensorError, OSError) as error:  # in folders of releases before 0.2: no hashes
            raise UserError(f"{folder / file} is missing or damaged ({error}); {_REMEDY}") from error
    return [
        Classifier(name, arrays, index[name]["settings"], index[name].get("part", CLS))
        for name, arrays in loaded.items()
    ]


def _file(classifier: Classifier) -> str:
    return _NEIGHBOURS_FILE if classifier.settings["kind"] in _SEARCHES else f"{classifier.name}.safetensors"


def _predict_knn(classifier: Classifier, inputs: Vectors, mesh: "Mesh | None") -> Prediction:
    from dinojax.probes import knn_votes, nearest_neighbours

    settings, arrays = classifier.settings, classifier.arrays
    ks = [settings["k"], *settings["other_ks"]]
    similarities, indices = nearest_neighbours(arrays["features"], inputs, max(ks), mesh=mesh)
    neighbour_labels = arrays["labels"][indices]
    votes = {
        k: knn_votes(
            similarities, neighbour_labels, num_classes=settings["classes"], k=k, temperature=settings["temperature"]
        )
        for k in ks
    }
    scores = votes[settings["k"]]
    by_k = {k: given.argmax(axis=1) for k, given in votes.items()}
    return Prediction(by_k[settings["k"]], scores / scores.sum(axis=1, keepdims=True), by_k=by_k)


def _predict_euclidean(classifier: Classifier, inputs: Vectors, mesh: "Mesh | None") -> Prediction:
    from dinojax.probes import euclidean_neighbours, knn_votes

    settings, arrays = classifier.settings, classifier.arrays
    distances, indices = euclidean_neighbours(arrays["features"], inputs, settings["k"], mesh=mesh)
    equal = np.zeros_like(distances)  # every neighbour has one vote
    votes = knn_votes(equal, arrays["labels"][indices], num_classes=settings["classes"], k=settings["k"])
    return Prediction(votes.argmax(axis=1), votes / settings["k"])


def _predict_linear(classifier: Classifier, inputs: Vectors) -> Prediction:
    from dinojax.probes import LinearHead, linear_logits

    return _softmax(linear_logits(LinearHead(**classifier.arrays), inputs))


def _predict_mlp(classifier: Classifier, inputs: Vectors) -> Prediction:
    from dinojax.probes import MlpHead, mlp_logits

    return _softmax(mlp_logits(MlpHead(**classifier.arrays), inputs))


def _softmax(logits: Any) -> Prediction:
    from scipy.special import softmax

    scores = np.asarray(logits, np.float64)
    return Prediction(scores.argmax(axis=1), softmax(scores, axis=1))


def _predict_svc(classifier: Classifier, inputs: Vectors) -> Prediction:
    """One-vs-one votes of an RBF SVC from its arrays, ties to the lower class, as scikit-learn's `predict`.

    The scores are scikit-learn's one-vs-rest `decision_function`: votes, and summed confidences that break ties.
    """
    arrays = classifier.arrays
    classes, blocks = arrays["classes"], range(0, len(inputs), _ROWS)
    decided = [svc_decisions(arrays, classifier.settings["gamma"], inputs[start : start + _ROWS]) for start in blocks]
    votes, confidences = (np.concatenate(parts) for parts in zip(*decided))
    scores = np.full((len(inputs), classifier.settings["classes"]), -np.inf)
    scores[:, classes] = votes + confidences / (3 * (np.abs(confidences) + 1))
    return Prediction(classes[votes.argmax(axis=1)], scores, are_probabilities=False)


def svc_decisions(
    arrays: Mapping[str, np.ndarray], gamma: float, inputs: Float[np.ndarray, "images dim"]
) -> tuple[Float[np.ndarray, "images classes"], Float[np.ndarray, "images classes"]]:
    """Votes and summed decision values of every class in the one-vs-one scheme.

    Args:
        arrays: `support_vectors` [n, dim] by class, `dual_coef` [classes - 1, n], `intercept` of every pair,
            `n_support` of every class, `mean` and `scale` of the standardisation, `classes`.
        gamma: of the kernel exp(-gamma · squared distance).
        inputs: raw features.

    Source: Chang and Lin, LIBSVM (2011), section 7; scikit-learn `SVC.dual_coef_`.
    """
    from sklearn.metrics.pairwise import rbf_kernel

    queries, vectors = (
        (raw.astype(np.float64) - arrays["mean"]) / arrays["scale"] for raw in (inputs, arrays["support_vectors"])
    )
    kernel = rbf_kernel(queries, vectors, gamma=gamma)
    ends = np.cumsum(arrays["n_support"])
    parts = [slice(end - count, end) for end, count in zip(ends, arrays["n_support"])]
    # against[i][:, j - (j > i)]: what the support vectors of class i say in the duel of i and j.
    against = [kernel[:, part] @ arrays["dual_coef"][:, part].T for part in parts]
    votes, confidences = np.zeros((2, len(inputs), len(parts)))
    pairs = [(i, j) for i in range(len(parts)) for j in range(i + 1, len(parts))]
    for (i, j), intercept in zip(pairs, arrays["intercept"]):
        decision = against[i][:, j - 1] + against[j][:, i] + intercept
        votes[:, i] += decision > 0
        votes[:, j] += decision <= 0
        confidences[:, i] += decision
        confidences[:, j] -= decision
    return votes, confidences


_SEARCHES = ("knn", "euclidean")
_PREDICTORS: dict[str, Callable[..., Prediction]] = {
    "knn": _predict_knn,
    "euclidean": _predict_euclidean,
    "linear": _predict_linear,
    "mlp": _predict_mlp,
    "svc": _predict_svc,
}
