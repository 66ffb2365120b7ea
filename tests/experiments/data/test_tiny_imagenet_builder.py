"""Tiny-ImageNet as a TFDS set: the same data set as the extracted folder, and only from the official zip."""

import zipfile

import numpy as np
import pytest

from dinojax import UserError
from dinojax.documents import sha256_of_file
from experiments.data.load import load_dataset
from experiments.data.tiny_imagenet import Archive
from tests.support.http_files import serving
from tests.support.tiny_imagenet_files import assert_labels_follow_the_images, write_tiny_imagenet

pytest.importorskip("tensorflow_datasets")
from experiments.data import tiny_imagenet_builder
from experiments.data.tiny_imagenet_builder import TinyImagenet

NOWHERE = "http://127.0.0.1:9/tiny-imagenet-200.zip"


@pytest.fixture
def folder(tmp_path):
    return write_tiny_imagenet(tmp_path / "extracted" / "tiny-imagenet-200")


@pytest.fixture
def zipped(folder, tmp_path, monkeypatch):
    """A zip in the official layout, which takes the place of the official one; its address is out of reach."""
    path = tmp_path / "official.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, f"{folder.name}/{file.relative_to(folder)}")
    publish(monkeypatch, path, NOWHERE)
    return path


@pytest.fixture
def data_dir(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    return path


def publish(monkeypatch, path, url):
    archive = Archive(url, path.stat().st_size, sha256_of_file(path))
    monkeypatch.setattr(tiny_imagenet_builder, "ARCHIVE", archive)


def found(path):
    return sorted(file.name for file in path.iterdir())


def assert_same(dataset, other):
    assert dataset.class_names == other.class_names
    for a, b in ((dataset.train, other.train), (dataset.test, other.test)):
        assert list(a.ids) == list(b.ids)
        np.testing.assert_array_equal(a.labels, b.labels)
        for i in range(len(a)):
            np.testing.assert_array_equal(a.read(i), b.read(i))


def test_it_is_downloaded_and_prepared_once_and_equals_the_folder(zipped, folder, data_dir, monkeypatch):
    with serving() as server:
        server.files["tiny.zip"] = zipped.read_bytes()
        publish(monkeypatch, zipped, f"{server.url}/tiny.zip")
        dataset = load_dataset("tiny_imagenet", data_dir=data_dir)
        assert server.served == [(0, zipped.stat().st_size)]
    assert_labels_follow_the_images(dataset)
    assert_same(dataset, load_dataset(str(folder)))
    (data_dir / "tiny-imagenet-200.zip").unlink()
    again = load_dataset("tiny_imagenet", data_dir=data_dir)
    assert_same(again, dataset)
    assert again.train.fingerprint == dataset.train.fingerprint != dataset.test.fingerprint


def test_a_limited_set_holds_the_same_images_both_ways(zipped, folder, data_dir):
    zipped.rename(data_dir / "tiny-imagenet-200.zip")
    limits = {"max_train": 4, "max_test": 3, "seed": 3}
    assert_same(load_dataset("tiny_imagenet", data_dir=data_dir, **limits), load_dataset(str(folder), **limits))


def test_the_builder_takes_an_extracted_folder(folder):
    builder = TinyImagenet(data_dir=folder.parent)
    builder.download_and_prepare(file_format="array_record")
    assert builder.info.features["label"].names == ["crane (n1)", "goldfish", "crane (n3)"]
    folder.rename(folder.with_name("elsewhere"))
    assert_same(load_dataset("tiny_imagenet", data_dir=folder.parent), load_dataset(str(folder.with_name("elsewhere"))))


def test_examples_carry_the_bytes_of_the_files(zipped, folder):
    images = [("val/images/val_2.JPEG", 2), ("train/n2/images/n2_1.JPEG", 1)]
    builder = TinyImagenet(data_dir=folder.parent)
    examples = list(builder._generate_examples(zipped, images))
    assert [key for key, _ in examples] == [0, 1]
    for (name, label), (_, example) in zip(images, examples):
        assert (example["id"], example["label"]) == (name, label)
        assert example["image"].read() == (folder / name).read_bytes()


def damaged(content):
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


def test_a_corrupt_download_leaves_nothing(zipped, data_dir, monkeypatch):
    with serving() as server:
        server.files["tiny.zip"] = damaged(zipped.read_bytes())
        publish(monkeypatch, zipped, f"{server.url}/tiny.zip")
        with pytest.raises(UserError, match=r"its download failed: .*/tiny\.zip arrived damaged or is another file"):
            load_dataset("tiny_imagenet", data_dir=data_dir)
    assert found(data_dir) == []


def test_another_zip_is_refused_and_stays(zipped, data_dir):
    given = data_dir / "tiny-imagenet-200.zip"
    given.write_bytes(damaged(zipped.read_bytes()))
    with pytest.raises(UserError, match=r"data/tiny-imagenet-200\.zip is damaged or not the official file .*remove it"):
        load_dataset("tiny_imagenet", data_dir=data_dir)
    assert found(data_dir) == [given.name]


def test_out_of_reach_is_one_sentence_with_ways_on(zipped, data_dir):
    ways = "cannot be reached.* put it into .*, or extract it and pass its folder as --data"
    with pytest.raises(UserError, match=f"tiny_imagenet is not in {data_dir}, and its download failed: .*{ways}"):
        load_dataset("tiny_imagenet", data_dir=data_dir)
    assert found(data_dir) == []


def test_a_zip_that_lacks_a_listed_image_leaves_nothing_prepared(zipped, folder, data_dir, monkeypatch):
    given = data_dir / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(zipped) as whole, zipfile.ZipFile(given, "w") as archive:
        for name in whole.namelist():
            if not name.endswith("val_1.JPEG"):
                archive.writestr(name, whole.read(name))
    publish(monkeypatch, given, NOWHERE)
    with pytest.raises(UserError, match=r"no such class or image in 'val_1\.JPEG"):
        load_dataset("tiny_imagenet", data_dir=data_dir)
    assert not [path for path in data_dir.rglob("*") if path.is_file() and path != given]


def test_tensorflow_reads_it_too(zipped, data_dir):
    pytest.importorskip("tensorflow")
    zipped.rename(data_dir / "tiny-imagenet-200.zip")
    builder = TinyImagenet(data_dir=data_dir)
    builder.download_and_prepare(file_format="tfrecord")
    for split, count in (("train", 6), ("validation", 4)):
        examples = list(builder.as_dataset(split=split).as_numpy_iterator())
        assert len(examples) == count
        for example in examples:
            assert example["image"].shape == (64, 64, 3)
            assert (example["image"] == 50 * (example["label"] + 1)).all()
    with pytest.raises(UserError, match="in a format without random access"):
        load_dataset("tiny_imagenet", data_dir=data_dir)
