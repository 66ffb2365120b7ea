"""A folder of class folders: what is taken for what, and the sentence about everything that is wrong with it.

The files hold a few bytes that are no image: finding and dividing them never decodes any.
"""

import unicodedata

import numpy as np
import pytest

from dinojax import UserError
from experiments.data.folder import load_image_folder


def write(root, path, content=None):
    """A file of its own content and size, unless `content` says otherwise."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(path.encode() if content is None else content)


def fill(root, split, **classes):
    for name, count in classes.items():
        for i in range(count):
            write(root, f"{split}/{name}/{i}.jpg")


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path, "training", cat=6, dog=4)
    fill(tmp_path, "validation", cat=2, dog=2)
    return tmp_path


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [("train", "val", "test"), ("training", "valid", "testing"), ("Train", "Validation", "TEST"), ("a", "b c", "d/e")],
)
def test_splits_are_found_by_their_usual_names_or_by_the_names_given(tmp_path, train, validation, test):
    for split, count in ((train, 3), (validation, 2), (test, 1)):
        fill(tmp_path, split, cat=count, dog=count)
    named = {"train_split": train, "val_split": validation, "test_split": test} if train == "a" else {}
    found = load_image_folder(tmp_path, **named)
    assert (len(found.train), len(found.validation), len(found.test)) == (6, 4, 2)
    assert (found.train.name, found.validation.name, found.test.name) == ("train", "validation", "test")
    assert found.train.ids[3] == f"{train}/dog/0.jpg"
    assert found.name == tmp_path.name
    assert found.notes == ()


def test_a_name_given_comes_before_the_usual_one(folder):
    fill(folder, "holdout", cat=1, dog=1)
    assert len(load_image_folder(folder, val_split="holdout").validation) == 2
    fill(folder, "val", cat=1, dog=1)
    assert len(load_image_folder(folder, val_split="validation").validation) == 4
    fill(folder, "test", cat=1, dog=2)
    found = load_image_folder(folder, val_split="test")
    assert len(found.validation) == 3 and found.test is None


def test_classes_may_be_nested_with_spaces_and_accents(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Blättchen é") for form in ("NFC", "NFD"))
    write(tmp_path, f"train/{composed}/2021/june/deep.JPEG")
    write(tmp_path, "train/Yellowish Leaf/a photo.png")
    write(tmp_path, f"val/{decomposed}/0.webp")
    for ignored in (
        "train/.hidden/0.jpg",
        "train/__MACOSX/0.jpg",
        f"train/{composed}/.0.jpg",
        "train/Yellowish Leaf/a.txt",
    ):
        write(tmp_path, ignored)
    found = load_image_folder(tmp_path)
    assert found.class_names == (composed, "Yellowish Leaf")
    assert found.train.ids == [f"train/{composed}/2021/june/deep.JPEG", "train/Yellowish Leaf/a photo.png"]
    assert found.validation.labels.tolist() == [0]
    assert found.notes == (f"{tmp_path.name}: no validation images of 'Yellowish Leaf'",)


def test_an_unreadable_image_is_named_when_it_is_decoded_and_not_before(folder):
    with pytest.raises(UserError, match=r"training/dog/0\.jpg is not a readable image .*replace or remove it"):
        load_image_folder(folder).train.read(6)


def test_one_folder_is_divided_class_by_class(tmp_path):
    for name, count in (("few", 2), ("some", 10), ("many", 41)):
        fill(tmp_path, ".", **{name: count})
    found = load_image_folder(tmp_path, val_fraction=0.2)
    assert found.class_names == ("few", "many", "some")
    assert np.bincount(found.validation.labels).tolist() == [1, 8, 2]
    assert np.bincount(found.train.labels).tolist() == [1, 33, 8]
    assert set(found.train.ids).isdisjoint(found.validation.ids)
    again, other = (load_image_folder(tmp_path, val_fraction=0.2, seed=seed) for seed in (0, 1))
    assert again.validation.ids == found.validation.ids != other.validation.ids
    assert found.test is None
    nearly_all = load_image_folder(tmp_path, val_fraction=0.99)
    assert np.bincount(nearly_all.train.labels).tolist() == [1, 1, 1]


def test_a_vehicle_called_train_is_a_class(tmp_path):
    fill(tmp_path, ".", car=5, plane=5, train=5)
    assert load_image_folder(tmp_path, val_fraction=0.2).class_names == ("car", "plane", "train")


def test_test_images_choose_the_epoch_only_where_nothing_else_can(tmp_path):
    fill(tmp_path, "train", cat=10, dog=10)
    fill(tmp_path, "test", cat=2, dog=3)
    biased = load_image_folder(tmp_path)
    assert biased.test is None
    assert biased.validation.ids[0] == "test/cat/0.jpg"
    assert len(biased.notes) == 1
    assert "the best epoch is chosen on the test images, so their accuracy is biased upwards" in biased.notes[0]
    apart = load_image_folder(tmp_path, val_fraction=0.3)
    assert [len(split) for split in (apart.train, apart.validation, apart.test)] == [14, 6, 5]
    assert apart.notes == ()


def test_limits_draw_from_every_class(folder):
    limited = load_image_folder(folder, max_train=5, max_val=100, seed=1)
    assert np.bincount(limited.train.labels).tolist() == [3, 2]
    assert len(limited.validation) == 4
    assert limited.train.ids == load_image_folder(folder, max_train=5, seed=1).train.ids
    with pytest.raises(UserError, match="--max-val 1 is fewer than one image for each of the 2 classes"):
        load_image_folder(folder, max_val=1)


def test_copies_are_counted_by_where_they_are(folder):
    """Three training images in the other splits, a content under two classes, and one that is there four times."""
    fill(folder, "test", cat=1, dog=1)
    for i in range(2):
        write(folder, f"training/cat/seen {i}.jpg", b"seen in validation %d" % i)
        write(folder, f"validation/cat/copy {i}.jpg", b"seen in validation %d" % i)
    write(folder, "test/dog/copy.jpg", b"training/dog/0.jpg")
    write(folder, "training/cat/both.jpg", b"both")
    write(folder, "training/dog/both.jpg", b"both")
    for name in "abcd":
        write(folder, f"validation/dog/{name}.jpg", b"four times")
    assert load_image_folder(folder).notes == (
        "2 validation images are also among the training images (for example validation/cat/copy 0.jpg = training/cat/"
        "seen 0.jpg): the accuracy on such images is too high; remove one of each",
        "1 test image is also among the training images (for example test/dog/copy.jpg = training/dog/0.jpg): "
        "the accuracy on such images is too high; remove one of each",
        "2 training images are also in another class (for example training/cat/both.jpg = training/dog/both.jpg): "
        "keep the right one of each",
        "3 validation images are a second time in the same class (for example validation/dog/b.jpg = "
        "validation/dog/a.jpg): remove it",
    )


def test_files_of_one_size_that_differ_anywhere_are_no_copies(folder):
    for i, position in enumerate((0, 10_000, 19_999)):
        content = bytearray(20_000)
        content[position] = 1
        write(folder, f"training/cat/same size {i}.jpg", bytes(content))
    assert load_image_folder(folder).notes == ()


def test_images_outside_of_a_class_are_noted(folder):
    write(folder, "training/loose.jpg")
    write(folder, "training/loose too.png")
    write(folder, "training/._hidden.png")
    note = f"{folder}/training: images beside the class folders are not used: loose too.png and 1 more"
    assert load_image_folder(folder).notes == (note,)


@pytest.mark.parametrize("place", ["training/cow", "validation/cow"])
def test_a_class_folder_that_is_a_link_to_nowhere_is_named(folder, place):
    """It is a class that was meant to be there: leaving it out would train on other classes than the user thinks."""
    (folder / place).symlink_to(folder / "nowhere")
    with pytest.raises(UserError, match=rf"{place} is a link to .*nowhere, which does not exist; mend or remove it"):
        load_image_folder(folder)


def remove(root, pattern):
    for path in sorted(root.glob(pattern), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda f: f.rename(f.parent / "gone"), {}, "there is no such folder"),
        (lambda f: remove(f, "**/*"), {}, "is empty: images belong in training/<class>/"),
        (lambda f: [remove(f, "**/*"), write(f, "a.jpg")], {}, r"holds no folders, only a\.jpg: images belong in"),
        (lambda f: (f / "training").rename(f / "images"), {}, "holds validation but no folder train or training"),
        (
            lambda f: [(f / "training").rename(f / "images"), (f / "validation").rename(f / "more")],
            {},
            r"has no validation images \(it holds images, more\): add validation/<class>/.*--val-fraction 0\.2",
        ),
        (lambda f: fill(f, "train", cat=1, dog=1), {}, "holds train and training, which mean the same.*--train-split"),
        (lambda f: None, {"val_split": "dev"}, "--val-split dev: there is no such folder in .* training, validation"),
        (lambda f: remove(f, "training/*/*"), {}, r"training/cat holds no images \(.*BMP, .*remove the empty class"),
        (lambda f: remove(f, "validation/dog/*"), {}, "validation/dog holds no images"),
        (lambda f: [remove(f, "training/**/*"), write(f, "training/0.jpg")], {}, r"no class folders, only 0\.jpg"),
        (
            lambda f: [remove(f, "training/**/*"), write(f, "training/0.jpg"), fill(f, "more", cat=2)],
            {"val_fraction": 0.2},
            r"training holds no class folders, only 0\.jpg",
        ),
        (lambda f: fill(f, "validation", cow=3), {}, "3 validation images of class 'cow', but no training images"),
        (lambda f: fill(f, "test", cow=1, emu=2), {}, "3 test images of classes 'cow', 'emu', but no training images"),
        (lambda f: remove(f, "training/**/*"), {}, "training is empty: images belong in training/<class>/"),
        (lambda f: [remove(f, "*/cat/*"), remove(f, "*/cat")], {}, "one class, 'dog', leaves nothing to tell apart"),
        (lambda f: None, {"val_fraction": 0.2}, "--val-fraction 0.2: .* has validation images already, in validation"),
        (lambda f: None, {"val_fraction": 0.0}, "--val-fraction 0.0 is not between 0 and 1"),
        (lambda f: None, {"val_fraction": float("nan")}, "--val-fraction nan is not between 0 and 1"),
        (
            lambda f: [remove(f, "validation/**/*"), remove(f, "validation")],
            {},
            r"no validation images \(it holds train",
        ),
        (
            lambda f: [remove(f, "validation/**/*"), remove(f, "validation"), fill(f, "training", cow=1)],
            {"val_fraction": 0.5},
            "class 'cow' has a single image, too few to divide",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(folder, damage, options, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load_image_folder(folder, **options)
    assert "\n" not in str(error.value)
