"""k-NN against the official numbers, scikit-learn and plain sorting."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from dinojax import UserError
from dinojax.probes import neighbours
from tests.support import reference_files


def random_features(images, dim, seed):
    return np.random.default_rng(seed).standard_normal((images, dim)).astype(np.float32)


@pytest.mark.reference
@pytest.mark.parametrize("name", reference_files.names("*knn*"))
def test_knn_equals_the_official_classifier(name):
    reference = reference_files.read(name)
    arrays, settings = reference.arrays, reference.config
    train_labels, test_labels = arrays["in/train_labels"], arrays["in/test_labels"]
    ks = [int(k) for k in arrays["in_k"]]
    train, test = arrays["in/train_features"], arrays["in/test_features"]
    similarities, indices = neighbours.nearest_neighbours(train, test, max(ks))
    options = {"num_classes": settings["classes"], "temperature": settings["T"]}
    predictions = neighbours.knn_predict(train, train_labels, test, ks=ks, **options)
    for position, k in enumerate(ks):
        votes = neighbours.knn_votes(similarities, train_labels[indices], k=k, **options)
        np.testing.assert_allclose(votes, arrays[f"out/k{k}/class_votes"], rtol=1e-5, atol=0)
        np.testing.assert_array_equal(predictions[k], arrays[f"out/k{k}/predicted_class"])
        percent = 100 * np.mean(predictions[k] == test_labels)
        assert percent == arrays[f"out/top1_percent_num_classes_{settings['classes']}"][position]
    if "out/neighbour_similarities" in arrays:
        expected = arrays["out/neighbour_similarities"]
        shared = min(expected.shape[1], max(ks))
        np.testing.assert_allclose(similarities[:, :shared], expected[:, :shared], atol=1e-6)


@pytest.mark.parametrize(("train_rows", "test_rows"), [(7, 5), (64, 3), (1000, 1000)])
def test_neighbours_do_not_depend_on_the_chunks_and_ties_go_to_the_lower_index(monkeypatch, train_rows, test_rows):
    monkeypatch.setattr(neighbours, "_TRAIN_ROWS", train_rows)
    monkeypatch.setattr(neighbours, "_TEST_ROWS", test_rows)
    rng = np.random.default_rng(3)
    # Unit vectors along axes: similarities are exactly 0, 1 or -1, so nearly everything ties.
    train = (np.eye(6)[rng.integers(0, 6, 100)] * rng.choice([-1, 1], (100, 1))).astype(np.float32)
    test = np.eye(6)[rng.integers(0, 6, 23)].astype(np.float32)
    similarities, indices = neighbours.nearest_neighbours(train, test, 40)
    expected = np.argsort(-(test @ train.T), axis=1, kind="stable")[:, :40]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(similarities, np.take_along_axis(test @ train.T, expected, axis=1))


def test_neighbours_are_by_angle_not_by_length():
    train = np.array([[10, 10], [0.1, 0]], np.float32)
    _, indices = neighbours.nearest_neighbours(train, np.array([[3, 0.1]], np.float32), 1)
    assert indices[0, 0] == 1


@pytest.mark.parametrize("k", [0, 11])
def test_impossible_k_is_refused(k):
    with pytest.raises(ValueError, match=f"k={k} is not between 1 and the 10 training images"):
        neighbours.nearest_neighbours(random_features(10, 4, 0), random_features(2, 4, 1), k)


@pytest.mark.parametrize(("dim", "offset"), [(3, 0), (48, 0), (48, 300)])
@pytest.mark.parametrize("k", [1, 4, 5])
def test_euclidean_majority_equals_scikit_learn(dim, offset, k):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 700)
    # Far from the origin the product form of the distance has no digits left in float32.
    features = (random_features(700, dim, 2) + 0.3 * labels[:, None] + offset).astype(np.float32)
    train, test = features[:500], features[500:]
    expected = KNeighborsClassifier(k).fit(train.astype(np.float64), labels[:500]).predict(test.astype(np.float64))
    found = neighbours.euclidean_knn_predict(train, labels[:500], test, num_classes=4, k=k)
    np.testing.assert_array_equal(found, expected)


def test_euclidean_majority_equals_scikit_learn_on_duplicated_points():
    rng = np.random.default_rng(2)
    points, labels = random_features(80, 20, 3), rng.integers(0, 3, 80)
    # Each point five times, with one label: at any k all that tie for the last place agree.
    train, train_labels = np.repeat(points, 5, axis=0), np.repeat(labels, 5)
    order = rng.permutation(400)
    train, train_labels = train[order], train_labels[order]
    test = np.concatenate([points, random_features(50, 20, 4)])
    expected = KNeighborsClassifier(8).fit(train, train_labels).predict(test)
    found = neighbours.euclidean_knn_predict(train, train_labels, test, num_classes=3, k=8)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("train_rows", "test_rows"), [(7, 5), (1000, 1000)])
def test_euclidean_ties_go_to_the_lower_index_then_to_the_lower_class(monkeypatch, train_rows, test_rows):
    monkeypatch.setattr(neighbours, "_TRAIN_ROWS", train_rows)
    monkeypatch.setattr(neighbours, "_TEST_ROWS", test_rows)
    rng = np.random.default_rng(5)
    train, test = (rng.integers(0, 3, (n, 2)).astype(np.float32) for n in (14, 23))  # on a grid: nearly all ties
    distances, indices = neighbours.euclidean_neighbours(train, test, 4)
    exact = np.linalg.norm(test[:, None].astype(np.float64) - train, axis=2)
    expected = np.argsort(exact, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(distances, np.take_along_axis(exact, expected, axis=1), atol=1e-12)
    labels = rng.integers(0, 3, 14)
    counts = np.stack([(labels[expected] == c).sum(axis=1) for c in range(3)], axis=1)
    found = neighbours.euclidean_knn_predict(train, labels, test, num_classes=3, k=4)
    np.testing.assert_array_equal(found, counts.argmax(axis=1))


@pytest.mark.parametrize("predict", [neighbours.knn_predict, neighbours.euclidean_knn_predict])
def test_what_no_neighbour_can_answer_is_refused(predict):
    train, test, labels = random_features(30, 4, 0), random_features(3, 4, 1), np.arange(30) % 3
    number = {"ks": [31]} if predict is neighbours.knn_predict else {"k": 31}
    with pytest.raises(UserError, match="k=31 is not between 1 and the 30 training images"):
        predict(train, labels, test, num_classes=3, **number)
    number = {"ks": [3]} if predict is neighbours.knn_predict else {"k": 3}
    with pytest.raises(UserError, match="all 30 training images are of class 2"):
        predict(train, np.full(30, 2), test, num_classes=3, **number)
    with pytest.raises(UserError, match="label 2 of image 2 is not between 0 and 1"):
        predict(train, labels, test, num_classes=2, **number)
    broken = train.copy()
    broken[17, 2] = np.nan
    with pytest.raises(UserError, match=r"image 17 are not finite \(nan\)"):
        predict(broken, labels, test, num_classes=3, **number)
    with pytest.raises(UserError, match=r"image 1 are not finite \(inf\)"):
        predict(train, labels, np.where(np.arange(3)[:, None] == 1, np.float32(np.inf), test), num_classes=3, **number)
