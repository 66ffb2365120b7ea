"""Tracking as a command: its masks against the library's functions, DAVIS's layout, sizes, and how a run resumes."""

import json

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image

import dinojax
from dinojax import Preprocessing, UserError, VisionTransformer, ViTConfig, patches
from experiments.patch_tasks import track, videos
from experiments.patch_tasks.track import TrackConfig, run_track
from experiments.runs.settings import create

TINY = ViTConfig(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
MODEL = VisionTransformer(TINY, rngs=nnx.Rngs(0), preprocessing=Preprocessing(patch_size=4, image_size=16))
SIZE = (33, 47)
tokens = jax.jit(lambda images: MODEL.get_intermediate_layers(images, reshape=True)[0])


def video(folder, masks, number=4, seed=0):
    """Frames with two coloured squares that move, and their masks."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 60, (*SIZE, 3))
    for frame in range(number):
        pixels, mask = noise.copy(), np.zeros(SIZE, np.uint8)
        for name, (colour, top, left) in enumerate(
            [((220, 60, 40), 6, 8 + 3 * frame), ((40, 90, 230), 20, 30 - 3 * frame)], 1
        ):
            pixels[top : top + 9, left : left + 9] = colour
            mask[top : top + 9, left : left + 9] = name
        for where, array in ((folder, pixels.astype(np.uint8)), (masks, mask)):
            where.mkdir(parents=True, exist_ok=True)
            videos.write_indices(where / f"{frame:05d}.png", array) if where == masks else Image.fromarray(array).save(
                where / f"{frame:05d}.png"
            )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("track")
    dinojax.save(MODEL, place / "model")
    video(place / "frames", place / "true")
    for seed, name in enumerate(("swan", "camel")):
        video(place / "davis/JPEGImages/480p" / name, place / "davis/Annotations/480p" / name, seed=seed)
    (place / "davis/ImageSets/2017").mkdir(parents=True)
    (place / "davis/ImageSets/2017/val.txt").write_text("swan\ncamel\n")
    return place


def config(place, folder="frames", **changes):
    settings = {"image_size": 32, "radius": 3, "top_k": 3, "last_frames": 2, **changes}
    return create(TrackConfig, weights=str(place / "model"), folder=place / folder, **settings)


def test_masks_are_those_of_the_library_at_the_size_of_the_frames(place, tmp_path, capsys):
    result = run_track(config(place, mask=place / "true" / "00000.png", truth=place / "true", out=tmp_path / "out"))
    files = sorted((place / "frames").iterdir())
    images = [dinojax.preprocess(file, MODEL, size=32, crop=False) for file in files]
    assert images[0].shape[1:3] == (32, 44)  # 45.6 px are not whole patches
    features = [np.asarray(tokens(one))[0] for one in images]
    first = np.asarray(Image.open(place / "true" / "00000.png"))
    labels = patches.propagate_video(features, patches.one_hot_labels(first, 8, 11), last_frames=2, radius=3, top_k=3)
    folder = tmp_path / "out" / "masks" / "frames"
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "00000.png")), first)
    for file, found in zip(files[1:], labels):
        mask = Image.open(folder / file.name)
        assert mask.mode == "P" and mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        expected = Image.fromarray(patches.index_map(found, 32, 44)).resize(SIZE[::-1], Image.Resampling.NEAREST)
        assert (np.asarray(mask) == np.asarray(expected)).mean() > 0.99
    masks, truth = (np.stack([np.asarray(Image.open(where / file.name)) for file in files])
                    for where in (folder, place / "true"))  # fmt: skip
    scores = patches.video_scores(masks, truth)
    assert [row["J"] for row in result["objects"]] == [scores[number]["J"].mean for number in (1, 2)]
    assert result["J&F"] == pytest.approx((result["J"] + result["F"]) / 2)
    assert "32×46 px are not whole patches" in capsys.readouterr().out.replace("46×32", "32×46")


def test_davis_is_tracked_video_by_video_and_a_run_resumes(place, tmp_path):
    asked = config(place, "davis", out=tmp_path / "out")
    result = run_track(asked)
    assert {row["video"] for row in result["objects"]} == {"swan", "camel"} and len(result["objects"]) == 4
    kept = tmp_path / "out/masks/swan/00002.png"
    for file in (tmp_path / "out/masks/camel").iterdir():
        file.unlink()
    (tmp_path / "out/masks/camel").rmdir()
    before = kept.stat().st_mtime_ns
    assert run_track(asked) == result
    assert kept.stat().st_mtime_ns == before and (tmp_path / "out/masks/camel/00003.png").is_file()
    assert json.loads((tmp_path / "out/result.json").read_text())["J"] == result["J"]
    with pytest.raises(UserError, match="is a run with radius = 3, not 2"):
        run_track(config(place, "davis", out=tmp_path / "out", radius=2))
    one = run_track(config(place, "davis", videos=("camel",), out=tmp_path / "one"))
    assert one["objects"] == [row for row in result["objects"] if row["video"] == "camel"]


def test_frames_as_in_dino_s_script():
    assert track.dino_size(480, 854) == (480, 832) and track.dino_size(1080, 1920) == (480, 832)
    assert track.dino_size(854, 480) == (832, 480)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].double(), (13, 40), mode="bilinear"
    )[0].numpy()
    np.testing.assert_allclose(track.plain_bilinear(pixels, (13, 40)), expected.transpose(1, 2, 0), atol=0.5 + 1e-3)


def test_the_deviation_of_dino_s_script_changes_the_features(place, tmp_path):
    """By the model itself on pixels that are normalised by hand."""
    from experiments.patch_tasks.model import PatchBackbone, PatchModel

    model = PatchModel(create(PatchBackbone, weights=str(place / "model"), image_size=32), seed=0, cache_dir=None)
    photo = model.photo(place / "frames" / "00000.png")
    std = (0.228, 0.224, 0.225)
    images = ((photo.pixels / 255 - np.array(MODEL.preprocessing.mean)) / np.array(std)).astype(np.float32)[None]
    expected = np.asarray(tokens(images))[0]
    np.testing.assert_allclose(model.features(photo, std=std), expected, atol=3e-5)
    assert np.abs(model.features(photo) - expected).max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "is a folder of frames: name the mask of 00000.png with --mask"),
        ({"mask": "none.png"}, "there is no such mask of the first frame, 00000.png"),
        ({"videos": ("swan",)}, "--videos swan chooses among the videos of DAVIS"),
        ({"folder": "davis", "videos": ("dog",)}, "--videos dog is not in ImageSets/2017/val.txt"),
        ({"folder": "davis", "mask": "m.png"}, "has the layout of DAVIS with masks of its own"),
        ({"folder": "nowhere"}, "nowhere is not a folder"),
        ({"folder": "davis", "protocol": "dino"}, "--protocol dino sees frames at 480 px"),
    ],
)
def test_mistakes_are_told_in_a_sentence(place, tmp_path, changes, message):
    changes = {name: place / value if name == "mask" else value for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        run_track(config(place, out=tmp_path / "out", **changes))


def test_masks_that_are_none_are_refused(place, tmp_path):
    Image.fromarray(np.full(SIZE, 90, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "none.png")
    black_and_white = np.zeros(SIZE, np.uint8)
    black_and_white[3:9, 4:8] = 255
    Image.fromarray(black_and_white).save(tmp_path / "bw.png")
    assert set(np.unique(videos.read_indices(tmp_path / "bw.png"))) == {0, 1}
    with pytest.raises(UserError, match="object number 90, and 63 is the largest"):
        run_track(config(place, mask=tmp_path / "grey.png", out=tmp_path / "out"))
    with pytest.raises(UserError, match=r"none\.png marks no object"):
        run_track(config(place, mask=tmp_path / "none.png", out=tmp_path / "out2"))
    Image.fromarray(np.eye(7, dtype=np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match=r"is 7×7 px, and 00000\.png 47×33"):
        run_track(config(place, mask=tmp_path / "small.png", out=tmp_path / "out3"))
    assert not any((tmp_path / name).exists() for name in ("out", "out2", "out3"))
