"""From files to augmented batches: order, sizes, errors, and pixels equal to Pillow's step by step."""

import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import PIL
import pytest
from PIL import Image

from dinojax import UserError
from dinojax.images.decode import decode_rgb
from dinojax.images.resize import resize_centre_crop, resize_square
from experiments.data.folder import load_image_folder
from experiments.data.loader import make_loader
from experiments.data.splits import Split
from experiments.data.squares import reduced
from experiments.finetuning.views import draw_crops, plain_views, training_views
from tests.support import pillow_reference as reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# 60 images of three classes, the rarest a tenth of them; image i is of brightness i.
LABELS = np.repeat([0, 1, 2], [36, 18, 6])


def brightness(index):
    time.sleep(0.004 if index % 7 == 0 else 0)  # some images take longer than the next ones
    return np.full((5, 4, 3), index, np.uint8)


SPLIT = Split("train", [str(i) for i in range(60)], LABELS, brightness, "")


def epoch_of(split=SPLIT, **options):
    defaults = {"batch_size": 8, "prepare": partial(resize_square, side=2), "shuffle_seed": 0, "epoch": 0}
    return list(make_loader(split, **{**defaults, "threads": 2, **options}))


def rows_of(**options):
    return np.concatenate([batch.rows for batch in epoch_of(**options)])


def assert_threads_end():
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("grain-prefetch") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


def test_every_image_comes_once_with_its_label_and_the_last_batch_is_filled_up():
    batches = epoch_of()
    assert len(batches) == 8
    for batch in batches:
        assert (batch.images.shape, batch.images.dtype) == ((8, 2, 2, 3), np.uint8)
        assert (batch.labels.dtype, batch.rows.dtype, batch.ids.dtype) == (np.int32, np.int64, np.int32)
    images, labels, rows, ids = (np.concatenate(field) for field in zip(*batches))
    assert sorted(rows[:60]) == list(range(60))
    assert rows[60:].tolist() == labels[60:].tolist() == ids[60:].tolist() == [-1] * 4
    assert not images[60:].any()
    np.testing.assert_array_equal(labels[:60], LABELS[rows[:60]])
    np.testing.assert_array_equal(images[:60, 1, 1, 2], rows[:60])
    np.testing.assert_array_equal(ids, rows)


def test_the_order_follows_from_seed_and_epoch_whatever_the_threads():
    order = rows_of(threads=1).tolist()
    assert rows_of(threads=5).tolist() == order
    assert rows_of(batch_size=60).tolist() == order[:60]
    different = [rows_of(shuffle_seed=1).tolist(), rows_of(epoch=1).tolist(), rows_of(shuffle_seed=None).tolist()]
    assert all(other != order for other in different)
    assert different[0] != different[1]
    assert different[2] == [*range(60), *[-1] * 4]


def test_balanced_sampling_draws_every_class_equally_often_and_no_view_twice():
    seen = np.zeros(60, int)
    for epoch in range(40):
        batches = epoch_of(balanced=True, epoch=epoch, batch_size=60)
        ((_, labels, rows, ids),) = batches
        assert np.bincount(labels).tolist() == [20, 20, 20]
        assert len(set(ids.tolist())) == 60
        np.testing.assert_array_equal(ids % 60, rows)
        seen += np.bincount(rows, minlength=60)
    expected = 40 * 20 / np.bincount(LABELS)[LABELS]
    # A Poisson-like count lies within five deviations of what is expected.
    assert (np.abs(seen - expected) < 5 * np.sqrt(expected)).all()
    first, second = (np.concatenate([batch.labels for batch in epoch_of(balanced=True, threads=n)]) for n in (1, 3))
    np.testing.assert_array_equal(first, second)
    assert len(set(first[:20].tolist())) == 3  # mixed, not class by class


def test_an_unreadable_image_is_one_sentence_and_no_thread_remains(tmp_path):
    for name in ("cat", "dog"):
        for i in range(20):
            path = tmp_path / "train" / name / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((6, 6, 3), i, np.uint8)).save(path)
    (tmp_path / "val").symlink_to(tmp_path / "train", target_is_directory=True)
    broken = tmp_path / "train" / "dog" / "03.png"
    broken.write_bytes(broken.read_bytes()[:40])
    split = load_image_folder(tmp_path).train
    loader = make_loader(
        split,
        batch_size=4,
        prepare=partial(resize_square, side=4),
        shuffle_seed=None,
        epoch=0,
        threads=3,
    )
    assert [next(loader).rows[0] for _ in range(5)] == [0, 4, 8, 12, 16]
    with pytest.raises(UserError, match=r"train/dog/03\.png is not a readable image .*; replace or remove it") as error:
        next(loader)
    assert "\n" not in str(error.value)
    assert_threads_end()


def test_threads_end_when_nobody_asks_for_more():
    loader = make_loader(
        SPLIT, batch_size=4, prepare=partial(resize_square, side=4), shuffle_seed=0, epoch=0, threads=3
    )
    next(loader)
    del loader
    assert_threads_end()


def test_images_of_every_mode_and_size_become_squares(tmp_path):
    """Each file shows the same two halves, red above blue, once it is upright RGB."""
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20], upright[20:] = (200, 30, 40), (50, 70, 240)
    image = Image.fromarray(upright)
    grey = np.repeat(np.repeat(np.array([[51], [204]], np.uint16) * 257, 20, 0), 60, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "0.png")
    image.convert("RGBA").save(tmp_path / "1.png")
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "2.gif")
    image.convert("CMYK").save(tmp_path / "3.jpg", quality=95)
    image.rotate(90, expand=True).save(tmp_path / "4.png", exif=exif)
    Image.fromarray(grey).save(tmp_path / "5.png")
    image.convert("L").save(tmp_path / "6.png")
    image.resize((61, 200), Image.Resampling.NEAREST).save(tmp_path / "7.webp", lossless=True)
    files = sorted(tmp_path.iterdir())
    split = Split("train", [f.name for f in files], np.zeros(8, int), lambda i: decode_rgb(files[i], files[i].name), "")
    (batch,) = epoch_of(split, prepare=partial(resize_square, side=10), shuffle_seed=None)
    luma = [[82] * 3, [83] * 3]  # 0.299 red + 0.587 green + 0.114 blue
    expected = np.stack([upright[[0, -1], 0]] * 8).astype(int)
    expected[5], expected[6] = [[51] * 3, [204] * 3], luma
    np.testing.assert_allclose(batch.images[:, [1, 8], 5], expected, atol=4)


# Height and width, of the image; resize and crop; height and width after the resize; top and left of the crop.
# torchvision's formulas: int(resize * longer / shorter) is the longer side, int(round((side - crop) / 2.0)) an offset.
CROPS = [
    ((300, 400), (256, 224), (256, 341), (16, 58)),  # 341.33 is truncated; 58.5 rounds to the even 58
    ((400, 300), (256, 224), (341, 256), (58, 16)),
    ((100, 173), (256, 224), (256, 442), (16, 109)),  # 442.88 is truncated, not rounded
    ((480, 640), (30, 23), (30, 40), (4, 8)),  # 3.5 rounds to 4, 8.5 to 8
    ((90, 90), (90, 90), (90, 90), (0, 0)),
]


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize(("shape", "sizes", "resized", "offset"), CROPS)
def test_centre_crops_are_torchvision_s(shape, sizes, resized, offset, resample):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    whole = np.asarray(Image.fromarray(pixels).resize(resized[::-1], resample))
    expected = whole[offset[0] : offset[0] + sizes[1], offset[1] : offset[1] + sizes[1]]
    options = {} if resample == Image.Resampling.BILINEAR else {"resample": resample}
    np.testing.assert_array_equal(resize_centre_crop(pixels, *sizes, **options), expected)


def test_a_crop_larger_than_the_image_is_a_mistake():
    with pytest.raises(ValueError, match="centre crop of 65 px does not fit a shorter side of 64 px"):
        resize_centre_crop(np.zeros((9, 9, 3), np.uint8), 64, 65)


def test_resizing_to_a_square_is_bilinear_and_antialiased():
    """A row 0, 0, 0, 100 to half its width: a triangle four pixels wide, cut at the edges, weights 3 3 1 and 1 3 3."""
    row = np.array([0, 0, 0, 100], np.uint8)
    halved = resize_square(np.broadcast_to(row[None, :, None], (2, 4, 3)).copy(), 2)
    assert halved[0, :, 0].tolist() == [0, 43]  # 300 / 7


def test_large_photographs_may_be_decoded_at_a_part_of_their_size(tmp_path):
    """A photograph turned by the camera, and a file that is not a JPEG, which is decoded whole."""
    photo = Image.fromarray(reference.photo_like(72, 96)[0]).resize((1120, 800), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    photo.save(tmp_path / "photo.png")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "photo.jpg").read_bytes()[:5000])
    ids = ["photo.jpg", "photo.png", "broken.jpg"]
    files = [tmp_path / name for name in ids]
    split = Split("train", ids, np.zeros(3, int), lambda i: decode_rgb(files[i], ids[i]), "key", files=files)
    small = reduced(split, 64)
    assert small.fingerprint != split.fingerprint
    assert split.read(0).shape == (1120, 800, 3)
    assert small.read(0).shape == (280, 200, 3)  # a quarter: 100 px would be below 2 · 64
    error = np.abs(resize_square(small.read(0), 64).astype(int) - resize_square(split.read(0), 64))
    assert error.mean() < 0.5 and error.max() <= 5
    np.testing.assert_array_equal(small.read(1), split.read(1))
    with pytest.raises(UserError, match=r"broken\.jpg is not a readable image"):
        small.read(2)


PIXELS = reference.photo_like(72, 72)
IDS = np.arange(100, 100 + len(PIXELS), dtype=np.int32)
KEY = jax.random.key(3)
crops = jax.jit(draw_crops, static_argnums=(2, 3, 4))
views = jax.jit(partial(training_views, size=32, mean=MEAN, std=STD), static_argnames=("scale", "interpolation"))


@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow before 13 always takes the horizontal pass first"
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.02, 0.1)])  # reduced and enlarged
def test_training_views_are_pillow_s_of_the_boxes_drawn(interpolation, scale):
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    images, ids = np.concatenate([PIXELS] * 4), np.arange(4 * len(PIXELS), dtype=np.int32)
    found = np.asarray(views(KEY, images, ids, scale=scale, interpolation=interpolation))
    boxes, flips = (np.asarray(x) for x in crops(KEY, ids, 72, scale, 0.5))
    assert 0 < flips.sum() < len(flips)
    errors = []
    for pixels, (top, left, height, width), flip, view in zip(images, boxes.tolist(), flips, found):
        crop = Image.fromarray(pixels).crop((left, top, left + width, top + height))
        expected = np.asarray(crop.resize((32, 32), filters[interpolation]), np.float64)
        expected = expected[:, ::-1] if flip else expected
        errors.append(np.abs((view * STD + MEAN) * 255 - expected))
    # Where a sum ends halfway between two values, Pillow's fixed-point weights may round it the other way. Triangles
    # make small fractions, so that one value in a hundred is such a tie; without these nothing differs.
    errors = np.array(errors)
    assert errors.max() < 2.01
    assert np.mean(errors < 1.01) > 0.9999
    photographs = np.arange(len(images)) % len(PIXELS) < 4
    assert np.mean(errors[photographs] < 0.01) > {"bilinear": 0.996, "bicubic": 0.999}[interpolation]


def test_a_view_follows_from_key_and_id_alone():
    boxes, flips = crops(KEY, IDS, 72, (0.08, 1.0), 0.5)
    alone = crops(KEY, IDS[3:4], 72, (0.08, 1.0), 0.5)
    assert (boxes[3:4] == alone[0]).all() and flips[3] == alone[1][0]
    together = np.asarray(views(KEY, PIXELS, IDS))
    np.testing.assert_array_equal(together, views(KEY, PIXELS[::-1].copy(), IDS[::-1].copy())[::-1])
    # Sums of another batch size may add up in another order and round to the next of the 256 values.
    steps = np.abs(together[3:4] - views(KEY, PIXELS[3:4], IDS[3:4])) * STD * 255
    assert steps.max() < 1.01 and np.mean(steps > 0.01) < 0.005
    assert np.abs(together - views(jax.random.fold_in(KEY, 1), PIXELS, IDS)).mean() > 0.1
    assert np.abs(together - views(KEY, PIXELS, IDS + 1)).mean() > 0.1


def test_crops_and_flips_are_as_often_as_asked():
    """Areas are uniform between the bounds; the tests of DINO's augmentation go into the boxes."""
    boxes, flips = crops(KEY, np.arange(4000, dtype=np.int32), 1000, (0.1, 0.3), 0.25)
    area = np.asarray(boxes[:, 2] * boxes[:, 3]) / 1000**2
    assert abs(area.mean() - 0.2) < 5 * 0.2 / np.sqrt(12 * 4000)
    assert area.min() > 0.099 and area.max() < 0.301
    assert abs(np.mean(flips) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 4000)


def test_plain_views_are_normalised_and_nothing_else():
    expected = (PIXELS / 255 - MEAN) / STD
    np.testing.assert_allclose(plain_views(jnp.asarray(PIXELS), MEAN, STD), expected, atol=1e-6)
