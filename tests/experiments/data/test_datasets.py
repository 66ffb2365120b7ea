"""Images by name: what is read, and the sentence that the user gets where it cannot be."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dinojax import UserError
from dinojax.images.decode import decode_rgb
from experiments.data.folder import load_image_folder
from experiments.data.load import load_dataset

COLOURS = np.array([[[200, 30, 40], [10, 220, 60], [50, 70, 240]], [[0, 0, 0], [128, 128, 128], [255, 255, 255]]])


def write(path, pixels=COLOURS, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        for name, count in (("cat", 6), ("Yellow dog", 4)):
            for i in range(count):
                write(tmp_path / split / name / f"{i}.png", COLOURS + i // 10)
    return tmp_path


def test_digits_are_all_of_them_split_by_class():
    digits = load_dataset("digits")
    scans = load_digits()
    assert len(digits.train) + len(digits.test) == 1797
    assert set(digits.train.ids).isdisjoint(digits.test.ids)
    share = np.bincount(digits.test.labels) / np.bincount(scans.target)
    # A fifth of each class but for rounding to whole images, of which the smallest class has 174: 0.0023 measured.
    np.testing.assert_allclose(share, 0.2, atol=0.5 / 174)
    image = digits.test.read(5)
    scan = int(digits.test.ids[5])
    assert image.shape == (8, 8, 3)
    np.testing.assert_array_equal(image[..., 1], np.rint(scans.images[scan] * (255 / 16)))
    assert digits.test.labels[5] == scans.target[scan]


def test_folder_is_read_with_nested_files_other_names_and_spaces(folder):
    (folder / "train").rename(folder / "training")
    (folder / "test").rename(folder / "val")
    write(folder / "training" / "cat" / "images" / "deep.JPEG", 0 * COLOURS, format="JPEG")
    (folder / "training" / "cat" / "notes.txt").write_text("no image")
    (folder / "training" / ".hidden").mkdir()
    dataset = load_dataset(str(folder))
    assert dataset.class_names == ("Yellow dog", "cat")
    assert np.bincount(dataset.train.labels).tolist() == [4, 7]
    assert dataset.train.ids[0] == "training/Yellow dog/0.png"
    np.testing.assert_array_equal(dataset.train.read(0), COLOURS)
    assert dataset.train.read(dataset.train.ids.index("training/cat/images/deep.JPEG")).max() == 0


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"), [("L", "png", 1), ("RGBA", "png", 0), ("CMYK", "tif", 1), ("P", "gif", 60)]
)
def test_modes_become_rgb(tmp_path, mode, suffix, tolerance):
    pixels = decode_rgb(write(tmp_path / f"image.{suffix}", mode=mode), "image")
    grey = COLOURS @ [0.299, 0.587, 0.114]
    expected = grey[..., None].repeat(3, 2) if mode == "L" else COLOURS
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels, expected, atol=tolerance)


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    flat = np.full((16, 16, 3), [200, 30, 40])
    np.testing.assert_allclose(decode_rgb(write(tmp_path / "a.jpg", flat, "CMYK"), "a"), flat, atol=4)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 25700, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert decode_rgb(tmp_path / "deep.png", "deep")[0, :, 0].tolist() == [0, 100, 255]


def test_palette_with_transparency_is_read_without_a_warning(tmp_path):
    Image.fromarray(COLOURS.astype(np.uint8)).convert("P").save(tmp_path / "t.png", transparency=b"\x00\x80\xff")
    assert decode_rgb(tmp_path / "t.png", "t").shape == (2, 3, 3)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90° clockwise to see the image upright
    write(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(decode_rgb(tmp_path / "turned.png", "turned"), np.rot90(COLOURS, -1))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>" + b])
def test_a_corrupt_image_is_named(folder, damage):
    path = write(folder / "train" / "cat" / "broken one.jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3)))
    path.write_bytes(damage(path.read_bytes()))
    train = load_dataset(str(folder)).train
    with pytest.raises(UserError, match=r"train/cat/broken one\.jpg is not a readable image"):
        train.read(train.ids.index("train/cat/broken one.jpg"))


def remove_images(folder, pattern):
    for path in folder.glob(pattern):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "test").rename(f / "more"),
            r"holds no folder test, testing, val, valid or validation, only more, train: images belong",
        ),
        (lambda f: (f / "train").rename(f / "more"), "holds no folder train or training, only more, test: images"),
        (lambda f: (f / "Training").mkdir(), "holds Training and train, which mean the same; remove or rename one"),
        (lambda f: remove_images(f, "train/cat/*"), r"train/cat holds no images \(.*BMP, .*remove the empty class"),
        (lambda f: remove_images(f, "test/*/*"), r"test/Yellow dog holds no images \(.*BMP, "),
        (lambda f: write(f / "test" / "cow" / "0.png"), "1 test image of class 'cow', but no training images"),
        (
            lambda f: [(f / s / "cat").rename(f / f"{s}-cat") for s in ("train", "test")],
            "one class, 'Yellow dog', leaves nothing to tell apart",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_dataset(str(folder))


def test_loose_images_are_no_classes(tmp_path):
    write(tmp_path / "train" / "0.png")
    write(tmp_path / "test" / "cat" / "0.png")
    with pytest.raises(UserError, match="holds no class folders"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["TEST", "testing", "val", "valid", "Validation"])
def test_test_images_are_found_by_every_usual_name_and_validation_images_called_so(folder, name):
    (folder / "test").rename(folder / name)
    found = load_dataset(str(folder)).test
    assert found.ids[0] == f"{name}/Yellow dog/0.png"
    assert found.name == ("test" if name.lower().startswith("test") else "validation")


def test_validation_images_are_the_test_images_only_where_there_are_no_others(folder):
    for name in ("val", "validation"):
        write(folder / name / "cat" / "0.png")
    assert load_dataset(str(folder)).test.ids[0] == "test/Yellow dog/0.png"
    shutil.rmtree(folder / "test")
    with pytest.raises(UserError, match="holds val and validation, which mean the same; remove or rename one"):
        load_dataset(str(folder))


def test_a_folder_of_classes_alone_is_divided_class_by_class(folder):
    for split in ("test", "train"):
        shutil.rmtree(folder / split)
    for name, count in (("cat", 10), ("dog", 4), ("hen", 2)):
        for i in range(count):
            write(folder / name / f"{i}.png", COLOURS // (i + 1))
    found = load_dataset(str(folder), val_fraction=0.3)
    assert found.class_names == ("cat", "dog", "hen") and found.test.name == "validation"
    assert np.bincount(found.test.labels).tolist() == [3, 1, 1]
    assert np.bincount(found.train.labels).tolist() == [7, 3, 1]
    assert set(found.train.ids).isdisjoint(found.test.ids)
    fine_tuned = load_image_folder(folder, val_fraction=0.3)
    assert (found.train.ids, found.test.ids) == (fine_tuned.train.ids, fine_tuned.validation.ids)
    limited = load_dataset(str(folder), val_fraction=0.3, max_train=5, max_test=3)
    assert (len(limited.train), len(limited.test)) == (5, 3)
    with pytest.raises(UserError, match="--max-test 2 is fewer than one image for each of the 3 classes"):
        load_dataset(str(folder), val_fraction=0.3, max_test=2)
    with pytest.raises(UserError, match=r"test/<class>/, or in <class>/ with --val-fraction 0\.2$"):
        load_dataset(str(folder), dividable=True)
    with pytest.raises(UserError, match=r"images belong in train/<class>/ and test/<class>/$"):
        load_dataset(str(folder))  # for a command without the flag


def test_training_images_alone_are_divided_too(folder):
    shutil.rmtree(folder / "test")
    found = load_dataset(str(folder), val_fraction=0.5)
    assert np.bincount(found.train.labels).tolist() == np.bincount(found.test.labels).tolist() == [2, 3]


@pytest.mark.parametrize(("name", "called"), [("test", "test"), ("val", "validation")])
def test_a_fraction_beside_other_images_is_refused(folder, name, called):
    (folder / "test").rename(folder / name)
    with pytest.raises(UserError, match=f"--val-fraction 0.2: .* has {called} images already, in {name}; leave the"):
        load_dataset(str(folder), val_fraction=0.2)
    with pytest.raises(UserError, match=r"--val-fraction 0\.2: digits has test images already; leave the flag out"):
        load_dataset("digits", val_fraction=0.2)


def test_a_test_image_that_was_trained_on_is_noted(tmp_path):
    images = {"train/cat/0.png": 1, "test/cat/1.png": 2, "train/dog/seen.png": 7, "test/dog/copy.png": 7}
    for name, divisor in images.items():
        write(tmp_path / name, COLOURS // divisor)
    assert load_dataset(str(tmp_path)).notes == (
        "1 test image is also among the training images (for example test/dog/copy.png = train/dog/seen.png): "
        "the accuracy on such images is too high; remove one of each",
    )


def test_a_class_without_test_images_is_noted(folder):
    write(folder / "train" / "cow" / "0.png")
    dataset = load_dataset(str(folder))
    assert "no test images of 'cow'" in dataset.notes[0]
    assert len(dataset.class_names) == 3


@pytest.mark.parametrize("name", ["./missing", "missing/folder", "~/missing"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(UserError, match=f"--data {name}: there is no such folder"):
        load_dataset(name)


def test_limits_draw_every_class_the_same_way_each_time(folder):
    limited = load_dataset(str(folder), max_train=5, max_test=100, seed=1)
    assert np.bincount(limited.train.labels).tolist() == [2, 3]
    assert limited.train.ids == load_dataset(str(folder), max_train=5, seed=1).train.ids
    assert len(limited.test) == 10
    full = load_dataset(str(folder)).train
    for position, name in enumerate(limited.train.ids):
        i = full.ids.index(name)
        assert limited.train.labels[position] == full.labels[i]
        np.testing.assert_array_equal(limited.train.read(position), full.read(i))
    with pytest.raises(UserError, match="--max-test 1 is fewer than one image for each of the 2 classes"):
        load_dataset(str(folder), max_test=1)


def test_fingerprint_follows_the_images(folder):
    def fingerprint(**options):
        return load_dataset(str(folder), **options).train.fingerprint

    before = fingerprint()
    assert fingerprint() == before
    assert fingerprint(max_train=5) != before
    assert fingerprint(max_train=5, seed=1) != fingerprint(max_train=5, seed=2)
    write(folder / "train" / "cat" / "0.png", 255 - COLOURS)
    changed = fingerprint()
    assert changed != before
    (folder / "train" / "cat" / "0.png").rename(folder / "train" / "cat" / "00.png")
    assert fingerprint() not in (before, changed)


tfds = pytest.importorskip("tensorflow_datasets")


class TinyShapes(tfds.core.GeneratorBasedBuilder):
    """Encoded images, so that preparing it needs no TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(2, 3, 3)), "label": tfds.features.ClassLabel(names=["a", "b"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "validation": self._generate_examples(6)}

    def _generate_examples(self, count):
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full((2, 3, 3), 10 * i, np.uint8)).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 2}


def test_a_prepared_tfds_set_is_read_without_tensorflow(tmp_path):
    TinyShapes(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    dataset = load_dataset("tiny_shapes", data_dir=tmp_path)
    assert dataset.class_names == ("a", "b")
    assert (len(dataset.train), len(dataset.test)) == (20, 6)
    values = [int(dataset.train.read(i)[0, 0, 0]) // 10 for i in range(20)]
    assert sorted(values) == list(range(20))
    np.testing.assert_array_equal(dataset.train.labels, np.array(values) % 2)
    assert dataset.train.fingerprint != dataset.test.fingerprint


def test_a_set_that_is_not_prepared_and_out_of_reach_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.data.tfds.reachable", lambda *_: False)
    ways = "cannot be reached.*--data DIR.*--weights FILE.*make demo"
    with pytest.raises(UserError, match=f"cifar10 is not prepared in {tmp_path} and .*{ways}"):
        load_dataset("cifar10", data_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "hint"),
    [("cifar11", "did you mean cifar10"), ("digit", "did you mean digits"), ("cifar10:9.9.9", "at version 9.9.9")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, hint):
    with pytest.raises(UserError, match=f"--data {name} is neither a folder nor a TensorFlow Datasets name.*{hint}"):
        load_dataset(name)
