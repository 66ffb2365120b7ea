"""Photos to a file of embeddings: the model's own numbers, whatever lies in the folder and however often it starts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dinojax
from dinojax import UserError, VisionTransformer, ViTConfig
from experiments import embed
from experiments.data.splits import digest
from experiments.embedding.table import read_table
from experiments.runs.settings import create

REPOSITORY = Path(__file__).parents[2]
TINY = ViTConfig(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2)
SHAPES = {"z.png": (20, 31), "a/2.png": (16, 16), "a/10.jpg": (40, 17), "a/b/c/deep.webp": (9, 50), "B/x.PNG": (33, 30)}
HALF = {"rtol": 2**-11, "atol": 2e-6}  # float16 keeps 11 bits; 1e-6 is what float32 leaves
ORDER = ["B/x.PNG", "a/10.jpg", "a/2.png", "a/b/c/deep.webp", "z.png"]


def save(path, shape, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    model = VisionTransformer(TINY, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), nnx.state(model, nnx.Param))
    nnx.update(model, noisy)
    return str(dinojax.save(model, tmp_path_factory.mktemp("weights") / "tiny"))


@pytest.fixture
def photos(tmp_path):
    for seed, (name, shape) in enumerate(SHAPES.items()):
        save(tmp_path / "photos" / name, shape, seed)
    for hidden in (".hidden.png", ".folder/h.png", "__MACOSX/m.png"):
        save(tmp_path / "photos" / hidden, (8, 8))
    (tmp_path / "photos" / "notes.txt").write_text("mine")
    return tmp_path / "photos"


def make(weights, images, out, **changes):
    options = {"image_size": 16, "cache_dir": out.parent / "cache", "weights": weights, **changes}
    return embed.run(create(embed.Config, images=tuple(images), out=out, **options))


def by_hand(weights, file, size=16):
    """CLS of each block, the last one first, and the patches of the last, of the library alone."""
    model = dinojax.load(weights)
    pixels = dinojax.preprocess(file, model, size=size)
    layers = model.get_intermediate_layers(pixels, n=TINY.depth, return_class_token=True)
    return [np.asarray(cls)[0] for _, cls in layers[::-1]], np.asarray(layers[-1][0])[0]


@pytest.mark.parametrize("suffix", [".parquet", ".npz", ".safetensors"])
def test_the_numbers_are_the_models(weights, photos, tmp_path, suffix, capsys):
    options = {"layers": 3, "patches": True, "dense": True}
    result = make(weights, [photos], tmp_path / f"out{suffix}", **options)
    table = read_table(result.file)
    assert list(table.paths) == ORDER and table.root == str(photos)
    assert table.sizes.tolist() == [list(SHAPES[name]) for name in ORDER]
    assert list(table.arrays) == ["cls", "cls_2", "cls_3", "mean_patch", "dense"]
    for row, name in enumerate(ORDER):
        cls, patches = by_hand(weights, photos / name)
        for block, array in enumerate(("cls", "cls_2", "cls_3")):
            np.testing.assert_allclose(table.arrays[array][row], cls[block], atol=1e-6, rtol=0)
        np.testing.assert_allclose(table.arrays["mean_patch"][row], patches.mean(axis=0), atol=1e-6, rtol=0)
        maps = table.arrays["dense"][row]
        assert (maps.shape, maps.dtype) == ((4, 4, 24), np.float16)
        np.testing.assert_allclose(maps.reshape(16, 24), patches, **HALF)
    said = capsys.readouterr().out
    assert "5 images in" in said and f"out{suffix}: 5 images, cls, cls_2, cls_3, mean_patch, dense of 24" in said
    assert not list(tmp_path.glob(".*"))


def test_by_default_a_row_is_the_last_cls(weights, photos, tmp_path):
    result = make(weights, [photos], tmp_path / "out", image_size=None)
    table = read_table(tmp_path / "out.parquet")
    assert result == embed.Result(tmp_path / "out.parquet", 5, 24, {})
    assert list(table.arrays) == ["cls"]
    np.testing.assert_allclose(table.arrays["cls"][0], by_hand(weights, photos / ORDER[0])[0][0], atol=1e-6, rtol=0)
    images = table.meta.pop("images")
    assert table.meta == {
        "weights": weights,
        "patch_size": 4,
        "weights_fingerprint": table.meta["weights_fingerprint"],
        "image_size": 16,
        "normalisation": [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]],
        "dtype": "float32",
        "resize": "shorter side, bicubic, antialiased, centre crop",
        "grid": [4, 4],
        "dinojax": dinojax.__version__,
        "skipped": [],
    }
    photos.rename(tmp_path / "moved")
    os.utime(tmp_path / "moved" / "z.png", (1, 1))
    make(weights, [tmp_path / "moved"], tmp_path / "out")
    assert read_table(tmp_path / "out").meta["images"] == images != digest()
    save(tmp_path / "moved" / "z.png", (20, 31), seed=9)
    make(weights, [tmp_path / "moved"], tmp_path / "out")
    assert read_table(tmp_path / "out").meta["images"] != images


def test_several_folders_and_files_have_one_root(weights, photos, tmp_path, monkeypatch):
    make(weights, [photos / "a" / "b", photos / "B", photos / "z.png", photos / "z.png"], tmp_path / "out")
    table = read_table(tmp_path / "out")
    assert (table.root, table.paths) == (str(photos), ("B/x.PNG", "a/b/c/deep.webp", "z.png"))
    monkeypatch.chdir(photos)
    make(weights, [Path("a/2.png")], tmp_path / "one")
    assert (read_table(tmp_path / "one").root, read_table(tmp_path / "one").paths) == (str(photos / "a"), ("2.png",))


def test_unreadable_files_are_listed_and_skipped(weights, photos, tmp_path, capsys):
    (photos / "a" / "1 broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (photos / "cut.png").write_bytes((photos / "z.png").read_bytes()[:200])
    (photos / "gone.png").symlink_to(photos / "nowhere")
    broken = ["a/1 broken.jpg", "cut.png", "gone.png"]
    for _ in range(2):  # also where everything is in the cache
        result = make(weights, [photos], tmp_path / "out")
        table, said = read_table(result.file), capsys.readouterr().out
        assert list(table.paths) == ORDER and table.meta["skipped"] == broken == list(result.skipped)
        assert [line.split(" (")[0] for line in said.splitlines() if line.startswith("skipped: ")] == [
            "skipped: a/1 broken.jpg is not a readable image",
            "skipped: cut.png is not a readable image",
            "skipped: gone.png cannot be read",
        ]
        assert "5 images, 3 skipped" in said
        np.testing.assert_allclose(table.arrays["cls"][4], by_hand(weights, photos / "z.png")[0][0], atol=1e-6, rtol=0)
    assert "all 8 images from the cache" in said
    for cache in ("cache", "another"):
        with pytest.raises(UserError, match=r"^a/1 broken\.jpg is not a readable image .*; replace or remove it$"):
            make(weights, [photos], tmp_path / "strict", strict=True, cache_dir=tmp_path / cache)
    assert not list(tmp_path.glob("*strict*"))


def test_what_holds_nothing_readable_is_refused(weights, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("no image")
    for dense in (False, True):
        with pytest.raises(UserError, match=r"^x\.png is not a readable image"):
            make(weights, [tmp_path / "bad"], tmp_path / "out", dense=dense)
    assert not list(tmp_path.glob("out*"))


def test_warm_and_cold_caches_give_the_same_file(weights, photos, tmp_path, capsys):
    options = {"cache_dir": tmp_path / "cache", "layers": 2}
    cold = make(weights, [photos], tmp_path / "cold.npz", **options).file
    capsys.readouterr()
    warm = make(weights, [photos], tmp_path / "warm.npz", patches=True, **options).file
    assert "all 5 images from the cache" in capsys.readouterr().out
    assert read_table(warm).arrays.keys() == {"cls", "cls_2", "mean_patch"}
    make(weights, [photos], warm, **options)
    assert cold.read_bytes() == warm.read_bytes()
    (block,) = (tmp_path / "cache" / "features").rglob("*.safetensors")
    block.write_bytes(block.read_bytes()[:-9])  # a damaged block is computed again
    assert make(weights, [photos], warm, **options).file.read_bytes() == cold.read_bytes()
    assert "from the cache" not in capsys.readouterr().out.splitlines()[-2]


def test_a_changed_or_new_photo_is_computed_again(weights, photos, tmp_path):
    make(weights, [photos], tmp_path / "out")
    for seed, name in enumerate(("z.png", "a/new.png")):
        save(photos / name, (20, 31), seed=77 + seed)
        table = read_table(make(weights, [photos], tmp_path / "out").file)
        row = table.paths.index(name)
        expected = by_hand(weights, photos / name)[0][0]
        np.testing.assert_allclose(table.arrays["cls"][row], expected, atol=1e-6, rtol=0)
    assert table.paths[4:] == ("a/new.png", "z.png")


def test_batches_of_any_size_give_the_same_numbers(weights, photos, tmp_path):
    tables = [
        read_table(make(weights, [photos], tmp_path / f"{size}", batch_size=size, cache_dir=tmp_path / f"c{size}").file)
        for size in (1, 2, 64)
    ]
    for table in tables[1:]:
        np.testing.assert_allclose(table.arrays["cls"], tables[0].arrays["cls"], atol=1e-6, rtol=0)
        assert table.paths == tables[0].paths


def test_patch_maps_of_many_blocks_are_in_order(weights, tmp_path, monkeypatch):
    """Blocks of one or two images, one of them without a readable image."""
    from experiments.embedding import pipeline

    monkeypatch.setattr(pipeline, "_BLOCK_BYTES", 2 * 16 * 24)
    for i in range(6):
        save(tmp_path / "photos" / f"{i}.png", (16, 16), seed=i)
    (tmp_path / "photos" / "3.png").write_text("no image")
    table = read_table(make(weights, [tmp_path / "photos"], tmp_path / "out", dense=True).file)
    assert table.paths == ("0.png", "1.png", "2.png", "4.png", "5.png")
    for row, name in enumerate(table.paths):
        patches = by_hand(weights, tmp_path / "photos" / name)[1]
        np.testing.assert_allclose(table.arrays["dense"][row].reshape(16, 24), patches, **HALF)


def test_blocks_that_an_error_leaves_are_used_under_the_same_settings_alone(weights, tmp_path, monkeypatch):
    from experiments.embedding import pipeline

    monkeypatch.setattr(pipeline, "_BLOCK_BYTES", 2 * 16 * 24)
    for i in range(4):
        save(tmp_path / "photos" / f"{i}.png", (16, 16), seed=i)
    (tmp_path / "photos" / "4.png").write_text("no image")
    with pytest.raises(UserError, match=r"4\.png is not a readable image"):
        make(weights, [tmp_path / "photos"], tmp_path / "out", dense=True, strict=True)
    assert len(list((tmp_path / ".out.parquet.partial").glob("*.safetensors"))) >= 2
    table = read_table(make(weights, [tmp_path / "photos"], tmp_path / "out", dense=True, layers=2).file)
    for row, name in enumerate(table.paths):
        cls = by_hand(weights, tmp_path / "photos" / name)[0]
        np.testing.assert_allclose(table.arrays["cls_2"][row], cls[1], atol=1e-6, rtol=0)
    assert len(table) == 4 and not list(tmp_path.glob(".*"))


def test_patch_maps_that_the_disk_has_no_room_for_are_refused(weights, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(embed.shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    with pytest.raises(UserError, match=r"--dense needs 0\.0 GB of disk for 5 images, and 0\.0 GB are free"):
        make(weights, [photos], tmp_path / "out", dense=True)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("dense", [False, True], ids=["cls", "dense"])
@pytest.mark.slow  # kills a command among 1,200 images, and runs it again
def test_killed_and_resumed_it_writes_the_same_bytes(weights, tmp_path, dense):
    """SIGKILL, which no program can answer, after the first block."""
    count = 1200  # three blocks
    image = tmp_path / "image.png"
    save(image, (8, 8))
    (tmp_path / "photos").mkdir()
    for i in range(count):
        (tmp_path / "photos" / f"{i:04}.png").symlink_to(image)
    out = tmp_path / "killed.parquet"
    arguments = [sys.executable, "-m", "experiments.embed", str(tmp_path / "photos"), "--weights", weights,
                 "--batch-size", "1", "--out", str(out), *(["--dense"] if dense else [])]  # fmt: skip
    folder = tmp_path / ".killed.parquet.partial" if dense else tmp_path / "cache" / "features"
    process = subprocess.Popen(
        [*arguments, "--cache-dir", str(tmp_path / "cache")], cwd=REPOSITORY, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while process.poll() is None and not list(folder.rglob("*.safetensors")):
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    assert process.returncode == -signal.SIGKILL and 1 <= len(kept) < 3 and not out.exists()
    options = {"batch_size": 1, "dense": dense, "image_size": None}
    make(weights, [tmp_path / "photos"], out, **options)
    if not dense:
        assert kept.items() <= {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}.items()
    whole = make(weights, [tmp_path / "photos"], tmp_path / "whole.parquet", cache_dir=tmp_path / "new", **options)
    assert whole.rows == count and whole.file.read_bytes() == out.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_an_embedding_file_is_replaced_whole_and_other_files_are_kept(weights, photos, tmp_path):
    out = make(weights, [photos], tmp_path / "out.parquet").file
    (photos / "z.png").unlink()
    make(weights, [photos], out)
    assert len(read_table(out)) == 4
    before = out.read_bytes()
    (photos / "broken.png").write_text("no image")
    with pytest.raises(UserError, match="is not a readable image"):
        make(weights, [photos], out, strict=True)
    assert out.read_bytes() == before
    mine = tmp_path / "mine.parquet"
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"--out .*mine\.parquet exists and is not an embedding file; name another"):
        make(weights, [photos], mine)
    assert mine.read_text() == "mine"


def test_two_processes_do_not_write_one_file(weights, photos, tmp_path):
    from experiments.embedding.pipeline import work_folder

    with work_folder(tmp_path / "out.parquet"), pytest.raises(UserError, match="is in use by process"):
        make(weights, [photos], tmp_path / "out.parquet")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["missing"], "missing: there is no such image or folder"),
        (["empty"], "empty holds no images (AVIF"),
        ([], "no images were given; name folders or image files"),
        (["photo.png", "--out", "x.csv"], "x.csv does not end with .parquet, .npz or .safetensors; name it so"),
        (["photo.png", "--out", "empty"], "--out empty is a folder; name a file in it"),
        (["photo.png", "--out", "photo.png/x"], "--out photo.png/x.parquet cannot be written"),
        (["photo.png", "--layers", "4"], "--layers 4 is more than the 3 blocks of"),
        (["photo.png", "--layers", "0"], "--layers 0 is not a positive number"),
        (["photo.png", "--image-size", "3"], "--image-size 3 is smaller than one patch"),
        (["photo.png", "--weights", "nowhere/x.pth"], "there is no such file or folder of weights"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(weights, tmp_path, monkeypatch, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "photo.png", (9, 9))
    monkeypatch.chdir(tmp_path)
    flags = [*flags, *(["--out", "out.npz"] if "--out" not in flags else [])]
    flags += ["--weights", weights] if "--weights" not in flags else []
    if "empty" in flags:
        (tmp_path / "empty" / ".hidden.png").write_text("")
    with pytest.raises(SystemExit) as stop:
        embed.main([*flags, "--cache-dir", str(tmp_path / "cache")])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "photo.png"]


def test_the_command_line_and_what_it_teaches(weights, photos, tmp_path, capsys):
    embed.main([str(photos), "--weights", weights, "--out", str(tmp_path / "out.npz"), "--layers", "2", "--patches",
                "--image-size", "12", "--cache-dir", str(tmp_path)])  # fmt: skip
    with np.load(tmp_path / "out.npz") as npz:
        assert npz["paths"].tolist() == ORDER and npz["cls_2"].shape == npz["mean_patch"].shape == (5, 24)
        assert json.loads(str(npz["dinojax"]))["meta"]["grid"] == [3, 3]
    with pytest.raises(SystemExit):
        embed.main(["--help"])
    said = capsys.readouterr().out
    for word in ("--out", "--dense", "--strict", "--layers", "read_table", "pyarrow.parquet"):
        assert word in said
