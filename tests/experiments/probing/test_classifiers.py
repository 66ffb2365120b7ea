"""Classifiers on cached features: equal to scikit-learn, the same when loaded from files, and a test set read last."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from dinojax import UserError
from dinojax.probes import fit_sgd_linear
from experiments.data.splits import Dataset, Split
from experiments.features.parts import FeatureParts
from experiments.probing import fitting, pipeline
from experiments.probing.classifiers import TITLES, load_classifiers, save_classifiers
from experiments.probing.config import ClassifierConfig, ClassifierSettings
from experiments.probing.data import SealedTest, TrainingFeatures, UnseenFeatures
from experiments.probing.fitting import ON_HELDOUT, TrainingData, check_labels, selected_on
from experiments.runs.settings import create

FAST = ClassifierSettings(epochs=2, mlp_epochs=2, sweep_steps=20)
CHOOSING = ("linear", "sweep", "logistic", "mlp", "mlp_shuffled")


def make_images(count, classes=3, seed=0, dim=6):
    """Features [count, 3, dim] that overlap: nothing classifies them without mistakes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    centres = np.random.default_rng(99).normal(size=(classes, 3, dim))
    return parts((centres[labels] + rng.normal(size=(count, 3, dim))).astype(np.float32)), labels


def parts(tokens):
    """CLS tokens of two blocks and the mean patch, in a row, as features."""
    return FeatureParts(cls=tokens[:, :2], mean_patch=tokens[:, 2])


def fit(name, data, settings):
    return fitting.fit(name, data, settings, 0)


def make_data(count=90, classes=3, **changes):
    features, labels = make_images(count, classes)
    held = np.arange(count) % 5 == 0
    return TrainingData(features, labels, classes, np.flatnonzero(~held), np.flatnonzero(held), **changes)


@pytest.fixture(scope="module")
def fitted():
    return {name: fit(name, make_data(), FAST) for name in TITLES}


def arrays_of(found):
    return {name: dict(one.classifier.arrays) for name, one in found.items()}


def same(one, other):
    return all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_svc_predicts_from_its_arrays_as_scikit_learn_does(classes, standardise):
    data = make_data(200, classes)
    # Scales that differ, so that standardising matters.
    scale = np.array([1, 2, 9, 0.1, 5, 1], np.float32)
    data = dataclasses.replace(data, features=parts(data.features.tokens * scale + 3))
    features, _ = make_images(2500, classes, seed=1)  # more than one block of rows
    features = parts(features.tokens * scale + 3)
    found = fit("svc", data, dataclasses.replace(FAST, svc_standardise=standardise)).classifier.predict(features)
    train, test = (x.cls[:, -1].astype(np.float64) for x in (data.features, features))
    if standardise:
        scaler = StandardScaler().fit(train)
        train, test = scaler.transform(train), scaler.transform(test)
    svc = SVC(gamma="scale").fit(train, data.labels)
    np.testing.assert_array_equal(found.classes, svc.predict(test))
    if classes > 2:
        np.testing.assert_allclose(found.scores, svc.decision_function(test), atol=1e-9)
    assert np.isnan(found.confidence).all()


def test_euclidean_neighbours_vote_as_scikit_learn_does(fitted):
    data, (features, _) = make_data(), make_images(200, seed=2)
    found = fitted["knn5"].classifier.predict(features)
    reference = KNeighborsClassifier(n_neighbors=5).fit(data.features.vectors(), data.labels)
    np.testing.assert_array_equal(found.classes, reference.predict(features.vectors()))
    np.testing.assert_allclose(found.scores, reference.predict_proba(features.vectors()))


def test_vectors_are_concatenated_in_order():
    tokens = np.arange(2 * 4 * 2, dtype=np.float32).reshape(2, 4, 2)  # three CLS tokens and the mean patch
    features = FeatureParts.of_tokens(tokens)
    np.testing.assert_array_equal(features.tokens, tokens)
    np.testing.assert_array_equal(features.vectors()[0], [4, 5])
    np.testing.assert_array_equal(features.vectors("mean_patch")[1], [14, 15])
    np.testing.assert_array_equal(features.vectors(mean_patch=True)[0], [4, 5, 6, 7])
    np.testing.assert_array_equal(features.vectors(blocks=3)[1], [8, 9, 10, 11, 12, 13])
    np.testing.assert_array_equal(features.vectors(blocks=3, mean_patch=True)[0], np.arange(8))
    np.testing.assert_array_equal(features[np.array([1])].vectors(), [[12, 13]])


def test_a_classifier_looks_at_the_part_that_it_was_fitted_to(tmp_path):
    data, (features, _) = make_data(part="mean_patch"), make_images(200, seed=2)
    fitted = fit("knn5", data, FAST).classifier
    save_classifiers(tmp_path, [fitted], {})
    reference = KNeighborsClassifier(n_neighbors=5).fit(data.features.mean_patch, data.labels)
    for classifier in (fitted, *load_classifiers(tmp_path)):
        assert classifier.part == "mean_patch"
        np.testing.assert_array_equal(classifier.predict(features).classes, reference.predict(features.mean_patch))


def test_raw_pixels_have_one_part():
    pixels = np.random.default_rng(0).random((30, 12), np.float32)
    features, labels = FeatureParts(pixels=pixels), np.arange(30) % 2
    data = TrainingData(features, labels, 2, np.arange(20), np.arange(20, 30), part="pixels")
    found = fit("knn5", data, FAST).classifier.predict(features)
    np.testing.assert_array_equal(found.classes, KNeighborsClassifier(5).fit(pixels, labels).predict(pixels))


@pytest.mark.parametrize("name", TITLES)
def test_everything_learns(fitted, name):
    features, labels = make_images(300, seed=3)
    found = fit(name, make_data(), ClassifierSettings(epochs=20, mlp_epochs=25, sweep_steps=300)).classifier.predict(
        features
    )
    assert np.mean(found.classes == labels) > 0.6
    if found.are_probabilities:
        np.testing.assert_allclose(found.scores.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_array_equal(found.scores.argmax(axis=1), found.classes)
        np.testing.assert_array_equal(found.scores.max(axis=1), found.confidence)


def test_saved_classifiers_predict_the_same_and_share_the_training_features(fitted, tmp_path):
    save_classifiers(tmp_path, [one.classifier for one in fitted.values()], {"dtype": "float32"})
    features, _ = make_images(50, seed=4)
    loaded = load_classifiers(tmp_path)
    assert [classifier.name for classifier in loaded] == list(TITLES)
    for classifier in loaded:
        before, after = (one.predict(features) for one in (fitted[classifier.name].classifier, classifier))
        np.testing.assert_array_equal(before.scores, after.scores)
        np.testing.assert_array_equal(before.classes, after.classes)
        assert before.by_k.keys() == after.by_k.keys()
    assert len(list(tmp_path.iterdir())) == len(TITLES) - 1 + 1  # both k-NN share one file; and the index


def test_what_cannot_be_loaded_is_one_sentence(fitted, tmp_path):
    with pytest.raises(UserError, match=r"classifiers\.json is missing or damaged"):
        load_classifiers(tmp_path)
    save_classifiers(tmp_path, [fitted["linear"].classifier], {})
    with pytest.raises(UserError, match=r"--classifiers svc is not among those of .*: linear"):
        load_classifiers(tmp_path, ["svc"])
    (tmp_path / "linear.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"linear\.safetensors is damaged .*; repeat that run"):
        load_classifiers(tmp_path)
    for content in ("{", "{}"):
        (tmp_path / "classifiers.json").write_text(content)
        with pytest.raises(UserError, match=r"classifiers\.json is (missing or )?damaged"):
            load_classifiers(tmp_path)


def test_a_damaged_byte_of_classifiers_is_refused_or_changes_nothing(fitted, tmp_path):
    save_classifiers(tmp_path, [fitted["linear"].classifier, fitted["knn"].classifier], {"normalisation": [[0.5]]})
    sound = load_classifiers(tmp_path)
    rng = np.random.default_rng(0)
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        places = range(len(content)) if path.suffix == ".json" else rng.integers(0, len(content), 200)
        for place in places:
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.integers(8)]) + content[place + 1 :])
            try:
                found = load_classifiers(tmp_path)
            except UserError as error:
                assert "\n" not in str(error)
                continue
            for one, other in zip(sound, found, strict=True):
                assert (one.name, one.settings, one.part) == (other.name, other.settings, other.part)
                assert same(one.arrays, other.arrays)
        path.write_bytes(content)
    load_classifiers(tmp_path)


def test_classifiers_of_an_earlier_version_are_read(fitted, tmp_path):
    """Their index has no hashes."""
    save_classifiers(tmp_path, [fitted["linear"].classifier], {})
    index = json.loads((tmp_path / "classifiers.json").read_text())
    del index["files_sha256"], index["document_sha256"]
    (tmp_path / "classifiers.json").write_text(json.dumps(index))
    assert same(load_classifiers(tmp_path)[0].arrays, fitted["linear"].classifier.arrays)
    (tmp_path / "linear.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"linear\.safetensors is missing or damaged"):
        load_classifiers(tmp_path)


def make_dataset(train_labels, test_labels, class_names=("a", "b", "c")):
    train, test = (
        Split(name, [str(i) for i in range(len(labels))], np.asarray(labels), lambda i: None, name)
        for name, labels in (("train", train_labels), ("test", test_labels))
    )
    return Dataset("made", class_names, train, test)


def config_of(names, **settings):
    options = {"epochs": 2, "mlp_epochs": 2, "sweep_steps": 20, **settings}
    return create(ClassifierConfig, data="made", weights="made", classifiers=",".join(names), **options)


def fitted_with(test_seed, protocol, names):
    features, labels = make_images(90)
    test_features, test_labels = make_images(40, seed=test_seed)
    dataset = make_dataset(labels, test_labels)
    # Labels that disagree with the features, so that selecting on them would select otherwise.
    shuffled = np.random.default_rng(test_seed).permutation(test_labels)
    sealed = SealedTest(UnseenFeatures(test_features, shuffled))
    config = config_of(names, epochs=8, mlp_epochs=8, sweep_steps=60, protocol=protocol)
    _, probes, _ = pipeline.Pipeline(config, dataset).evaluate_features("model", TrainingFeatures(features), sealed)
    return {one.probe: one.fits[0] for one in probes}


def test_no_test_image_has_a_say_in_what_is_fitted():
    """Other test images and labels: the classifiers are the same to the last bit, unless the protocol looks."""
    one, other = (fitted_with(seed, "heldout", tuple(TITLES)) for seed in (5, 6))
    for name in TITLES:
        assert same(one[name].classifier.arrays, other[name].classifier.arrays), name
        assert one[name].details == other[name].details
        assert one[name].selection == (ON_HELDOUT if name in CHOOSING else "nothing to select")
    names = ("svc", "linear", "sweep", "logistic", "mlp")
    one, other = (fitted_with(seed, "reported", names) for seed in (5, 6))
    for name in names:
        looks = name in ("linear", "sweep", "mlp")
        assert (one[name].details == other[name].details) != looks, name
        assert (one[name].selection == selected_on("test") == "selected on the test set") == looks


def test_the_test_set_is_opened_once_after_all_fits(monkeypatch):
    order = []

    class Watched(SealedTest):
        def open(self):
            order.append("opened")
            return super().open()

    real = pipeline.fit
    monkeypatch.setattr(pipeline, "fit", lambda name, *rest: (order.append(name), real(name, *rest))[1])
    (features, labels), (test_features, test_labels) = make_images(90), make_images(40, seed=5)
    dataset = make_dataset(labels, test_labels)
    sealed = Watched(UnseenFeatures(test_features, test_labels))
    one = pipeline.Pipeline(config_of((*TITLES, "few_shot")), dataset)
    one.evaluate_features("model", TrainingFeatures(features), sealed)
    assert sorted(order[:-1]) == sorted(TITLES) and order[-1] == "opened"
    with pytest.raises(RuntimeError, match="was opened before"):
        sealed.open()


def test_logistic_regression_is_refitted_on_all_training_images():
    data = make_data()
    found = fit("logistic", data, FAST)
    kernel = found.classifier.arrays["kernel"]
    distance = {}
    for name, rows in (("all", slice(None)), ("kept", data.kept)):
        reference = LogisticRegression(C=found.details["best"]["C"], max_iter=10_000, tol=1e-8)
        reference.fit(data.features[rows].vectors(), data.labels[rows])
        distance[name] = np.abs(reference.coef_.T - kernel).max()
    assert distance["all"] < 0.01 * np.abs(kernel).max() < distance["kept"]


def test_the_best_head_of_the_sweep_is_refitted_on_all_training_images():
    data = make_data()
    found = fit("sweep", data, FAST)
    best = found.details["best"]
    assert best["accuracy"] == max(point["accuracy"] for point in found.details["grid"])
    assert len(found.details["grid"]) == 13 * 4
    inputs = data.features.vectors(blocks=best["blocks"], mean_patch=best["mean_patch"])
    heads = [
        fit_sgd_linear(
            inputs[rows], data.labels[rows], num_classes=3, key=jax.random.key(0), steps=20,
            learning_rate=best["learning_rate"],
        )
        for rows in (slice(None), data.kept)
    ]  # fmt: skip
    np.testing.assert_allclose(found.classifier.arrays["kernel"], heads[0].kernel, rtol=1e-4, atol=1e-6)
    assert np.abs(heads[0].kernel - heads[1].kernel).max() > 1e-3


def test_an_early_stopped_head_does_not_see_heldout_images():
    """Held-out features change nothing when there is one epoch to choose from."""
    data = make_data()
    tokens = data.features.tokens
    tokens[data.heldout] += 3
    features = parts(tokens)
    settings = dataclasses.replace(FAST, epochs=1, mlp_epochs=1)
    for name in ("linear", "mlp", "mlp_shuffled"):
        one, other = (
            fit(name, d, settings).classifier.arrays for d in (data, dataclasses.replace(data, features=features))
        )
        assert same(one, other), name


def test_views_of_heldout_images_are_not_learnt_from():
    data = make_data()
    tokens = data.features.tokens
    views = tokens + np.random.default_rng(1).normal(size=tokens.shape).astype(np.float32)
    of_heldout, of_kept = views.copy(), views.copy()
    of_heldout[data.heldout] += 5
    of_kept[data.kept] += 5
    for name in ("linear", "mlp"):
        settings = dataclasses.replace(FAST, epochs=1, mlp_epochs=1)
        plain, with_views, heldout_changed, kept_changed = (
            fit(name, dataclasses.replace(data, views=[parts(x) for x in v]), settings).classifier.arrays
            for v in ([], [views], [of_heldout], [of_kept])
        )
        assert same(with_views, heldout_changed), name
        assert not same(with_views, plain) and not same(with_views, kept_changed), name
    for name in ("knn", "svc", "logistic"):
        plain, with_views = (
            fit(name, dataclasses.replace(data, views=[parts(x) for x in v]), FAST).classifier.arrays
            for v in ([], [views])
        )
        assert same(plain, with_views), name


def test_files_sorted_by_class_are_mixed_for_the_mlp_in_file_order():
    data = make_data()
    assert fit("mlp", data, FAST).details["order"] == "of the files, the same in every epoch"
    order = np.argsort(data.labels, kind="stable")
    ordered = dataclasses.replace(data, features=data.features[order], labels=data.labels[order])
    settings = dataclasses.replace(FAST, mlp_epochs=25)
    found = fit("mlp", ordered, settings)
    assert found.details["order"].startswith("random, the same in every epoch")
    features, labels = make_images(300, seed=3)
    assert np.mean(found.classifier.predict(features).classes == labels) > 0.6


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0] * 30, [0], "all training images are of one class, 'a'; add others"),
        ([0, 1] * 20, [0, 2], "class 'c' has test images and no training image; add some"),
        ([0, 1] * 20, [0, 3], "labels go beyond its 3 classes"),
        ([0, 1] * 9, [0], "knn needs at least k = 20 training images and there are 18"),
        ([0] * 30 + [1] * 4, [0], "few_shot needs --shots 5 training images of every class and 'b' has 4"),
    ],
)
def test_labels_that_nothing_can_be_learnt_from_are_one_sentence(train, test, message):
    with pytest.raises(UserError, match=message):
        check_labels((*TITLES, "few_shot"), make_dataset(train, test), 5)


def test_other_limits_belong_to_the_classifiers_asked_for():
    check_labels(("linear",), make_dataset([0, 1] * 9, [0]), 5)
    with pytest.raises(UserError, match="knn5 needs at least k = 5 training images and there are 4"):
        check_labels(("knn5",), make_dataset([0, 1] * 2, [0]), 5)
    with pytest.raises(UserError, match="one training image in each of 3 classes leaves none to hold out"):
        check_labels(("linear",), make_dataset([0, 1, 2], [0]), 5)


@pytest.mark.parametrize("name", TITLES)
def test_features_that_are_not_finite_are_one_sentence(name):
    data = make_data()
    data.features.cls[7, 1, 2] = np.nan
    with pytest.raises(UserError, match="image 7 are not finite"):
        fit(name, data, FAST)
