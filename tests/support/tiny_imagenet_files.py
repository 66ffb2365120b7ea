"""A tiny Tiny-ImageNet in the official layout."""

from pathlib import Path

import numpy as np
from PIL import Image

WORDS = {"n2": "goldfish, Carassius", "n1": "crane, bird", "n3": "crane, machine"}


def write_tiny_imagenet(root: Path) -> Path:
    """Three classes of 3, 2 and 1 training images, of which the value tells the class; four validation images."""
    value = {wnid: 50 * (i + 1) for i, wnid in enumerate(sorted(WORDS))}
    for i, wnid in enumerate(WORDS):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        (folder.parent / f"{wnid}_boxes.txt").write_text("no image")
        for image in range(3 - i):
            Image.new("L", (64, 64), value[wnid]).save(folder / f"{wnid}_{image}.JPEG")
    table = [("val_0.JPEG", "n3"), ("val_1.JPEG", "n1"), ("val_2.JPEG", "n3"), ("val_3.JPEG", "n2")]
    for split, names in (("val", [name for name, _ in table]), ("test", ["test_0.JPEG"])):
        (root / split / "images").mkdir(parents=True)
        for name in names:
            Image.new("RGB", (64, 64), (value[dict(table).get(name, "n1")],) * 3).save(root / split / "images" / name)
    (root / "val" / "val_annotations.txt").write_text("".join(f"{n}\t{w}\t0\t0\t63\t63\n" for n, w in table))
    (root / "wnids.txt").write_text("\n".join(WORDS) + "\n")
    (root / "words.txt").write_text("".join(f"{wnid}\t{text}\n" for wnid, text in WORDS.items()) + "n9\tmore\n")
    return root


def assert_labels_follow_the_images(dataset):
    assert dataset.class_names == ("crane (n1)", "goldfish", "crane (n3)")
    assert (len(dataset.train), len(dataset.test)) == (6, 4)
    for split in (dataset.train, dataset.test):
        values = [split.read(i)[0, 0] for i in range(len(split))]
        np.testing.assert_array_equal(values, 50 * (split.labels[:, None] + 1) * np.ones((1, 3)))
    assert set(dataset.test.ids) == {f"val/images/val_{i}.JPEG" for i in range(4)}
