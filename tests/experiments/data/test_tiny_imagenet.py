"""Tiny-ImageNet's official layout: labels from the table, names from the word list, and what is refused."""

import sys

import pytest

from dinojax import UserError
from experiments.data.load import load_dataset
from tests.support.tiny_imagenet_files import assert_labels_follow_the_images, write_tiny_imagenet


@pytest.fixture
def root(tmp_path):
    return write_tiny_imagenet(tmp_path / "tiny-imagenet-200")


@pytest.mark.parametrize("by_name", [False, True])
def test_labels_follow_the_images(root, by_name):
    dataset = load_dataset("tiny_imagenet", data_dir=root.parent) if by_name else load_dataset(str(root))
    assert_labels_follow_the_images(dataset)
    assert dataset.test.name == "validation"  # the labels of the test images are not published
    assert [path.name for path in root.parent.iterdir()] == [root.name]  # used as it is, nothing is prepared


def test_without_tfds_an_absent_folder_names_its_source(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install 'dinojax\[tfds\]'`; or extract http://cs231n.* as --data"):
        load_dataset("tiny_imagenet", data_dir=tmp_path)


def test_a_table_that_names_no_image_is_refused(root):
    (root / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(UserError, match=r"no such class or image in 'val_2\.JPEG"):
        load_dataset(str(root))


def test_an_empty_class_is_refused(root):
    for file in (root / "train" / "n2" / "images").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"n2.images holds no images"):
        load_dataset(str(root))
