"""Tiny-ImageNet's official layout: labels from the table, names from the word list, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from dinojax import UserError
from experiments.harness.datasets import load_dataset

WORDS = {"n2": "goldfish, Carassius", "n1": "crane, bird", "n3": "crane, machine"}


@pytest.fixture
def root(tmp_path):
    """Three classes with two training images each, of which the value tells the class; four validation images."""
    root = tmp_path / "tiny-imagenet-200"
    value = {wnid: 50 * (i + 1) for i, wnid in enumerate(sorted(WORDS))}
    for wnid in WORDS:
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for i in range(2):
            Image.new("L", (64, 64), value[wnid]).save(folder / f"{wnid}_{i}.JPEG")
    (root / "val" / "images").mkdir(parents=True)
    table = [("val_0.JPEG", "n3"), ("val_1.JPEG", "n1"), ("val_2.JPEG", "n3"), ("val_3.JPEG", "n2")]
    for name, wnid in table:
        Image.new("RGB", (64, 64), (value[wnid],) * 3).save(root / "val" / "images" / name)
    (root / "val" / "val_annotations.txt").write_text("".join(f"{n}\t{w}\t0\t0\t63\t63\n" for n, w in table))
    (root / "wnids.txt").write_text("\n".join(WORDS) + "\n")
    (root / "words.txt").write_text("".join(f"{wnid}\t{text}\n" for wnid, text in WORDS.items()) + "n9\tmore\n")
    return root


@pytest.mark.parametrize("by_name", [False, True])
def test_labels_follow_the_images(root, by_name):
    dataset = load_dataset("tiny_imagenet", data_dir=root.parent) if by_name else load_dataset(str(root))
    assert dataset.class_names == ("crane (n1)", "goldfish", "crane (n3)")
    assert (len(dataset.train), len(dataset.test)) == (6, 4)
    for split in (dataset.train, dataset.test):
        values = [split.read(i)[0, 0] for i in range(len(split))]
        np.testing.assert_array_equal(values, 50 * (split.labels[:, None] + 1) * np.ones((1, 3)))
    assert set(dataset.test.ids) == {f"val/images/val_{i}.JPEG" for i in range(4)}


def test_an_absent_folder_names_its_source(tmp_path):
    with pytest.raises(UserError, match=r"tiny-imagenet-200 is not there; extract http://cs231n"):
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
