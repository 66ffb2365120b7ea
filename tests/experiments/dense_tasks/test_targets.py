"""Masks and depth maps on disk: what is read, and the sentence about what cannot be."""

import json

import numpy as np
import pytest
from PIL import Image

from dinojax import UserError
from dinojax.dense import VOID
from experiments.dense_tasks.pairs import find_pairs
from experiments.dense_tasks.targets import TargetReader, read_table

SIZE = (6, 5)
INDICES = np.random.default_rng(0).integers(0, 3, SIZE).astype(np.uint8)
INDICES[0, :2] = 255
COLOURS = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 10]], np.uint8)


def truth():
    return np.where(INDICES == 255, VOID, INDICES)


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_indices_are_read_from_every_mode_of_one_channel(tmp_path, mode):
    image = Image.fromarray(INDICES.astype(np.uint16) if mode == "I;16" else INDICES)
    if mode == "P":
        image.putpalette([7] * 768)  # colours that say nothing
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(TargetReader("segmentation").read(tmp_path / "a.png", SIZE), truth())


@pytest.mark.parametrize("table", ["csv", "json", "heading"])
def test_colours_are_looked_up(tmp_path, table):
    """The void colour is in the table too."""
    names, every = ("road", "wall", "tree, old"), np.concatenate([COLOURS, [[1, 2, 3]]]).astype(np.uint8)
    Image.fromarray(every[np.where(INDICES == 255, 3, INDICES)]).save(tmp_path / "a.png")
    path = tmp_path / f"t.{'json' if table == 'json' else 'csv'}"
    if table == "json":
        rows = [{"name": name, "color": colour} for name, colour in zip((*names, "void"), every.tolist())]
        path.write_text(json.dumps(rows))
    else:
        rows = [f'"{name}",{",".join(map(str, colour))}' for name, colour in zip((*names, "void"), every)]
        path.write_text("\n".join((["name,r,g,b"] if table == "heading" else []) + rows))
    found = read_table(path)
    assert found.names == names
    np.testing.assert_array_equal(TargetReader("segmentation", found).read(tmp_path / "a.png", SIZE), truth())


def test_another_void_index(tmp_path):
    Image.fromarray(np.where(INDICES == 255, 9, INDICES)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(TargetReader("segmentation", void=9).read(tmp_path / "a.png", SIZE), truth())


def test_depth_is_metres_whatever_the_file(tmp_path):
    metres = np.random.default_rng(0).integers(0, 20_000, SIZE).astype(np.uint16)
    Image.fromarray(metres).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", metres / 256.0)
    reader = TargetReader("depth", depth_scale=256, most=50)
    expected = np.where(metres / 256 <= 50, metres / 256, 0).astype(np.float32)
    for name in ("a.png", "a.npy"):
        np.testing.assert_array_equal(reader.read(tmp_path / name, SIZE), expected)
    np.save(tmp_path / "a.npy", np.full(SIZE, np.nan))
    assert not reader.read(tmp_path / "a.npy", SIZE).any()


TABLES = {
    "red\nred\n": "gives the name red twice",
    "a,1,2,3\nb,1,2,3\n": "gives the colour",
    "a,1,2,3\nb\n": "gives colours for some classes only",
    "a,1,2\nb,1,2\n": "three whole numbers",
    "a,1,2,300\n": "three whole numbers",
    "a,red\n": "is not name or name,r,g,b",
    "one\n": "names 1 classes",
}


@pytest.mark.parametrize("text", TABLES)
def test_what_is_wrong_with_a_table_is_said(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=TABLES[text]):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("text", ['{"a": 1}', "[[[[", '[{"colour": [1, 2, 3]}]', "[1, 2]"])
def test_json_that_is_no_table_is_one_sentence(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match="is not a table of classes"):
        read_table(tmp_path / "t.json")


class Hostile:
    def __reduce__(self):
        return print, ("a pickle was run",)


def test_what_cannot_be_read_is_named(tmp_path, capsys):
    a, npy = tmp_path / "a.png", tmp_path / "a.npy"
    plain, table = TargetReader("segmentation"), read_table_of(tmp_path, "x,1,2,3\ny,4,5,6\n")

    def refused(reader, file, words, size=SIZE):
        with pytest.raises(UserError, match=words) as caught:
            reader.read(file, size)
        assert str(file) in str(caught.value)

    Image.fromarray(INDICES).save(a)
    refused(plain, a, "is 5×6 px, and its photo 6×5 px", SIZE[::-1])
    refused(TargetReader("segmentation", table), a, r"holds the index 2 \(\d+ pixels\), and the table .* 2 classes")
    Image.fromarray(INDICES.astype(np.uint16) + 300).save(a)
    refused(plain, a, r"holds the index 555 \(2 pixels\), and a mask may hold 255 classes")
    Image.fromarray(np.full((*SIZE, 3), 9, np.uint8)).save(a)
    refused(plain, a, "holds colours; say with --classes")
    refused(TargetReader("segmentation", table), a, r"holds the colour 9,9,9 \(30 pixels\)")
    Image.fromarray(INDICES).save(tmp_path / "a.jpg")
    refused(plain, tmp_path / "a.jpg", "is a JPEG, which changes the numbers")
    a.write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    refused(plain, a, "not a readable image")
    np.save(npy, np.array([Hostile()], object), allow_pickle=True)
    refused(TargetReader("depth"), npy, "not a readable .npy file")
    assert "a pickle was run" not in capsys.readouterr().out
    np.save(npy, np.zeros((2, 3, 4)))
    refused(TargetReader("depth"), npy, "where metres of height × width were expected")
    npy.write_bytes(npy.read_bytes()[:90])
    refused(TargetReader("depth"), npy, "not a readable .npy file")


def read_table_of(folder, text):
    (folder / "table.csv").write_text(text)
    return read_table(folder / "table.csv")


def files(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 255, (4, 4, 3), np.uint8)).save(path)


LAYOUTS = {
    "divided": ["images/{}.png", "masks/{}.png"],
    "splits outside": ["{s}/images/{}.png", "{s}/masks/{}.png"],
    "splits inside": ["images/{s}/{}.png", "annotations/{s}/{}.png"],
    "suffix": ["images/{}.png", "labels/{}_mask.png"],
    "nested": ["images/x/{}.png", "masks/x/{}.png"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_found_in_every_layout(tmp_path, layout):
    names = [str(i) for i in range(10)]
    splits = {"training": names[:7], "val": names[7:]} if "splits" in layout else {"": names}
    files(tmp_path, [place.format(name, s=split) for split, own in splits.items() for name in own
                     for place in LAYOUTS[layout]])  # fmt: skip
    found = find_pairs(tmp_path, "segmentation", target_suffix="_mask" if layout == "suffix" else "")
    counts = {"train": 7, "validation": 3} if "splits" in layout else {"train": 8, "validation": 2}
    assert {name: len(pairs) for name, pairs in found.splits.items()} == counts
    stems = []
    for pairs in found.splits.values():
        for photo, target in zip(pairs.photos.files, pairs.targets.files):
            assert photo.stem == target.stem.removesuffix("_mask")
            stems.append(photo.stem)
    assert sorted(stems) == names


def test_what_has_no_partner_is_noted_and_copies_are(tmp_path):
    files(tmp_path, ["train/images/a.png", "train/masks/a.png", "train/images/alone.png", "train/masks/lost.png",
                     "val/images/b.png", "val/masks/b.png"])  # fmt: skip
    (tmp_path / "val" / "images" / "b.png").write_bytes((tmp_path / "train" / "images" / "a.png").read_bytes())
    notes = "\n".join(find_pairs(tmp_path, "segmentation").notes)
    assert "no mask for alone" in notes and "no photo for lost" in notes
    assert "1 validation image is also among the training images" in notes


FAULTS = {
    "nothing": ([], "holds no images/ beside masks/"),
    "no masks": (["train/images/a.png", "val/images/a.png"], "train holds no images/ beside masks/"),
    "other names": (["images/a.png", "masks/b.png"], "has the name of a photo"),
    "one pair": (["images/a.png", "masks/a.png"], "cannot be divided"),
    "two files": (["images/a.png", "images/a.jpg", "masks/a.png"], "have the same name"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_layouts_are_refused(tmp_path, fault):
    names, words = FAULTS[fault]
    files(tmp_path, names)
    with pytest.raises(UserError, match=words):
        find_pairs(tmp_path, "segmentation")


def test_a_fraction_beside_validation_images_is_refused(tmp_path):
    files(tmp_path, [f"{split}/{part}/a.png" for split in ("train", "val") for part in ("images", "masks")])
    with pytest.raises(UserError, match="has validation images already"):
        find_pairs(tmp_path, "segmentation", val_fraction=0.5)
