"""Images without labels: when a folder has labels, which images are held out, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from dinojax import UserError
from experiments.data.unlabelled import NO_LABEL, held_out_count, load_images


def write(folder, names, seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).save(path)
    return str(folder)


def names(count, *, below=""):
    return [f"{below}{i:03}" for i in range(count)]


@pytest.mark.parametrize(
    ("images", "expected"),
    [(2, 1), (4, 1), (5, 1), (30, 6), (159, 31), (160, 32), (641, 32), (700, 35), (50_000, 2_000)],
)
def test_the_held_out_share(images, expected):
    """A twentieth, at least 32, but no more than a fifth and 2,000."""
    assert held_out_count(images) == expected


def test_a_flat_and_a_nested_folder_of_the_same_images_are_the_same_training(tmp_path):
    flat = load_images(write(tmp_path / "flat", names(40)))
    nested = load_images(write(tmp_path / "nested", [f"{i // 10}/deep/{i:03}" for i in range(40)]))
    for one, other in ((flat.train, nested.train), (flat.test, nested.test)):
        assert [name.rpartition("/")[2] for name in other.ids] == list(one.ids)
        for i in range(len(one)):
            np.testing.assert_array_equal(one.read(i), other.read(i))
        assert one.identity != other.identity  # the names of the files are part of what a run records
    assert flat.class_names == nested.class_names == ()


def test_held_out_images_are_apart_and_the_same_every_time(tmp_path):
    folder = write(tmp_path / "photos", names(40))
    first, second = load_images(folder), load_images(folder)
    assert list(first.train.ids) == list(second.train.ids) and list(first.test.ids) == list(second.test.ids)
    assert len(first.train) == 32 and len(first.test) == 8 and not set(first.train.ids) & set(first.test.ids)
    assert set(first.train.labels) == set(first.test.labels) == {NO_LABEL}
    assert first.test.ids != sorted(first.train.ids + first.test.ids)[-8:]  # drawn, not the last ones
    assert "32 images train, 8 are held out" in first.notes[0]
    few = load_images(folder, max_train=5, max_test=3)
    assert set(few.train.ids) < set(first.train.ids) and set(few.test.ids) < set(first.test.ids)
    assert (len(few.train), len(few.test)) == (5, 3) and list(few.train.ids) == sorted(few.train.ids)


def classes(*splits):
    return [f"{split}/{name}/{i}" for split in splits for name in ("cat", "dog") for i in range(3)]


@pytest.mark.parametrize(
    ("images", "labelled", "held_out"),
    [
        (classes("train", "test"), True, None),
        (classes("Training", "val"), True, None),
        (classes("train"), False, None),  # nothing to evaluate on
        (classes("."), False, None),  # class folders alone
        ([f"{split}/{i}" for split in ("train", "test") for i in range(5)], False, "test/"),
        ([f"{split}/all/{i}" for split in ("train", "val") for i in range(5)], False, "val/"),  # one class
    ],
    ids=["splits", "names", "no test", "classes", "flat splits", "one class"],
)
def test_when_a_folder_has_labels(images, labelled, held_out, tmp_path):
    found = load_images(write(tmp_path / "data", images))
    assert bool(found.class_names) is labelled
    if held_out:  # a folder called test is never trained on
        assert all(name.startswith(held_out) for name in found.test.ids)
        assert not any(name.startswith(held_out) for name in found.train.ids)
        assert len(found.train) == len(found.test) == 5
    elif not labelled:
        assert len(found.train) + len(found.test) == len(images)


def test_the_digits_have_labels():
    assert len(load_images("digits", max_train=20, max_test=10).class_names) == 10


@pytest.mark.parametrize(
    ("images", "sentence"),
    [([], "holds no images"), (["one"], "holds one image, one.png, which leaves none to hold out; add images")],
)
def test_too_few_images_are_refused(images, sentence, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=sentence):
        load_images(write(tmp_path / "data", images))
    with pytest.raises(UserError, match="there is no such folder"):
        load_images(str(tmp_path / "missing"))


def test_a_fault_of_a_labelled_folder_names_the_way_without_labels(tmp_path):
    folder = write(tmp_path / "data", [*classes("train", "test"), "test/bird/0"])
    with pytest.raises(UserError, match=r"of class 'bird'.*data/train alone is read without labels"):
        load_images(folder)
