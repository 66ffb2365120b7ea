"""STL-10 from wherever it lies: the right pixels, the right images in every official fold, one sentence where not."""

import hashlib
import io
import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import dinojax
from dinojax import UserError, VisionTransformer, ViTConfig
from experiments import stl10_transfer
from experiments.data.tfds import read_prepared
from experiments.runs.settings import create
from experiments.stl10_transfer import Config, load_stl10, official_places, read_binary, read_folds

tfds = pytest.importorskip("tensorflow_datasets")
TRAIN, TEST, SIDE = 150, 60, 96
CLASSES = [f"class{i}" for i in range(10)]
SHAPE = ViTConfig(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2)


def pictures(split):
    """Images by number and their classes, in the order of the official files: classes mixed, no two images alike."""
    count, seed = (TRAIN, 0) if split == "train" else (TEST, 1)
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 10)
    small = rng.integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)
    images = [np.asarray(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for one in small]
    return images, labels


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, the official folder, and two folds."""
    place = tmp_path_factory.mktemp("stl10")
    dinojax.save(VisionTransformer(SHAPE, rngs=nnx.Rngs(0)), place / "weights")
    folder = place / "stl10_binary"
    folder.mkdir()
    for split in ("train", "test"):
        images, labels = pictures(split)
        with (folder / f"{split}_X.bin").open("wb") as file:
            for image in images:
                for channel in range(3):  # all red values first; of them, the first column from top to bottom
                    for column in range(SIDE):
                        file.write(bytes(image[:, column, channel]))
        (folder / f"{split}_y.bin").write_bytes(bytes(label + 1 for label in labels.tolist()))
    (folder / "class_names.txt").write_text("\n".join(CLASSES) + "\n")
    rng = np.random.default_rng(2)
    folds = [rng.permutation(TRAIN)[:100] for _ in range(2)]
    (folder / "fold_indices.txt").write_text("".join(" ".join(map(str, fold)) + " \n" for fold in folds))
    return place


def config(place, **changes):
    options = {"data": str(place / "stl10_binary"), "image_size": 32, "epochs": 2, "draws": 2, "figures": False}
    options |= {"out": place / "out", "cache_dir": place / "cache"}
    return create(Config, weights=str(place / "weights"), **{**options, **changes})


def test_the_official_files_are_read(place):
    dataset = load_stl10(config(place))
    assert dataset.class_names == tuple(CLASSES)
    for split in (dataset.train, dataset.test):
        images, labels = pictures(split.name)
        np.testing.assert_array_equal(split.labels, labels)
        assert all((split.read(i) == image).all() for i, image in enumerate(images))
    assert dataset.train.fingerprint != dataset.test.fingerprint
    np.testing.assert_array_equal(official_places(str(place / "stl10_binary"), dataset.train), np.arange(TRAIN))


def test_folds_learn_from_their_images_alone_and_are_all_evaluated_on_the_test_images(place):
    settings = config(place, folds=place / "stl10_binary" / "fold_indices.txt", classifiers="knn5,few_shot")
    folder = stl10_transfer.run(settings).folder
    result = json.loads((folder / "result.json").read_text())
    assert (result["command"], result["data"]["folds"]) == ("stl10_transfer", 2)
    assert (result["image_size"], result["resize"]) == (32, 37)  # 32 · 256 / 224
    model, mean, std = dinojax.load(place / "weights"), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    features, labels = {}, {}
    for split in ("train", "test"):
        images, labels[split] = pictures(split)
        larger = [Image.fromarray(image).resize((37, 37), Image.Resampling.BICUBIC) for image in images]
        pixels = np.stack([np.asarray(image)[2:34, 2:34] for image in larger]) / 255
        features[split] = np.asarray(model(((pixels - mean) / std).astype(np.float32)).cls_token)
    folds = [np.array(line.split(), int) for line in settings.dataset.folds.read_text().splitlines()]
    neighbours = [KNeighborsClassifier(5).fit(features["train"][fold], labels["train"][fold]) for fold in folds]
    expected = [one.score(features["test"], labels["test"]) for one in neighbours]
    rows = {(row["features"], row["probe"]): row for row in result["rows"]}
    row = rows["cls", "knn5"]
    assert row["accuracies"] == pytest.approx(expected) and expected[0] != expected[1]
    assert row["accuracy"] == pytest.approx(np.mean(expected)) and row["interval"] is None
    assert row["deviation"] == pytest.approx(np.std(expected, ddof=1))
    assert len(rows["cls", "5_shot_1nn"]["accuracies"]) == 2


def test_every_probe_can_be_fitted_to_folds(place, capsys):
    settings = config(place, folds=place / "stl10_binary" / "fold_indices.txt", classifiers="knn,crops", epochs=3)
    folder = stl10_transfer.run(settings).folder
    rows = json.loads((folder / "result.json").read_text())["rows"]
    assert {len(row["accuracies"]) for row in rows} == {2}
    assert {row["probe"] for row in rows} == {"knn_10", "knn_20", "knn_100", "knn5_crops", "linear_crops"}
    said = capsys.readouterr().out
    assert "in 2 official folds" in said and "is the deviation over folds" in said and " ± " in said


class Stl10(tfds.core.GeneratorBasedBuilder):
    """As TensorFlow Datasets' own: the number of an image is its key, and the order follows from its hash."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(2, 2, 3)), "label": tfds.features.ClassLabel(names=CLASSES)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in ("train", "test")}

    def _generate_examples(self):
        for number in range(TRAIN):
            file = io.BytesIO()
            Image.new("RGB", (2, 2), (number, 0, 0)).save(file, "PNG")
            yield number, {"image": io.BytesIO(file.getvalue()), "label": number % 10}


def test_official_numbers_are_found_again_in_the_order_of_tfds(tmp_path):
    builder = Stl10(data_dir=tmp_path)
    builder.download_and_prepare(file_format="array_record")
    train = read_prepared("stl10", builder).train
    numbers = [int(train.read(i)[0, 0, 0]) for i in range(TRAIN)]
    assert numbers != sorted(numbers)
    places = official_places("stl10", train)
    assert [numbers[place] for place in places] == list(range(TRAIN))


def test_a_folder_of_images_tells_their_numbers_by_their_names(tmp_path):
    for split in ("train", "test"):
        for number in range(30):
            folder = tmp_path / split / f"class{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{number:03}.png")
    train = load_stl10(create(Config, weights="", data=str(tmp_path))).train
    places = official_places(str(tmp_path), train)
    assert [train.read(place)[0, 0, 0] for place in places] == list(range(30))
    (tmp_path / "train" / "class0" / "003.png").rename(tmp_path / "train" / "class0" / "cat.png")
    with pytest.raises(UserError, match=r"the training images in .* are not named 0 to 29, so the official"):
        official_places(str(tmp_path), load_stl10(create(Config, weights="", data=str(tmp_path))).train)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "folds.txt is not a list of image numbers"),
        ("a b\nc d", "folds.txt is not a list of image numbers"),
        ("1 2 3", "folds.txt holds 1 lines; it needs one for each of several folds"),
        ("1 2\n3 3", "folds.txt: line 2 does not name different images among 0 to 9"),
        ("0 10\n1 2", "folds.txt: line 1 does not name different images among 0 to 9"),
        ("-1 2\n1 2", "folds.txt: line 1 does not name different images among 0 to 9"),
    ],
)
def test_other_files_are_no_folds(tmp_path, text, message):
    if text is not None:
        (tmp_path / "folds.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_folds(tmp_path / "folds.txt", 10)


def test_the_official_layout_of_folds_is_read(tmp_path):
    folds = [np.random.default_rng(i).permutation(5000)[:1000] for i in range(10)]
    (tmp_path / "fold_indices.txt").write_text("".join(" ".join(map(str, fold)) + " \n" for fold in folds))
    np.testing.assert_array_equal(read_folds(tmp_path / "fold_indices.txt", 5000), folds)


def test_a_cut_off_file_is_named(place, tmp_path):
    for file in (place / "stl10_binary").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "train_X.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=r"train_X\.bin and train_y\.bin are not complete STL-10 files"):
        read_binary(tmp_path, "train")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data stl10 is not prepared in"),
        (["--data", "missing/folder"], "--data missing/folder: there is no such folder"),
        (["--folds", "folds.txt", "--max-train", "9"], "--max-train 9 leaves out images of the folds"),
        (
            ["--data", "BINARY", "--max-test", "9"],
            "--max-train, --max-test and --val-fraction do not apply to the official folder",
        ),
        (["--data", "BINARY", "--folds", "folds.txt"], "--folds folds.txt is not a list of image numbers"),
        (["--draws", "0"], "--draws 0 is not a positive number"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(place, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr("experiments.data.tfds.reachable", lambda *_: False)
    monkeypatch.chdir(tmp_path)
    flags = [str(place / "stl10_binary") if flag == "BINARY" else flag for flag in flags]
    with pytest.raises(SystemExit) as stop:
        stl10_transfer.main([str(place / "weights"), "--data-dir", "tfds", "--out", "out", *flags])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    if not flags:
        assert lines[0].endswith("and pass its stl10_binary as --data")
    assert not list(tmp_path.iterdir())


def test_the_hash_is_the_one_of_tfds():
    assert tfds.core.hashing.Hasher("train").hash_key(17) == int(hashlib.md5(b"train17").hexdigest(), 16)
