"""The one place that opens images: what is read, what is refused, and that nothing else is started."""

import io
import os
import re
import threading

import numpy as np
import pytest
from PIL import Image, ImageOps

from dinojax import UserError
from dinojax.images import decode
from dinojax.images.decode import decode_rgb, image_size
from tests.support.house import ROOT

RAMP = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3


def encoded(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright_as_pillow_does(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image"
    path.write_bytes(encoded(Image.fromarray(RAMP), kind, exif=exif).getvalue())
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(decode_rgb(path, "image"), expected)
    assert image_size(path, "image") == expected.shape[:2]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb_as_pillow_converts_it(mode):
    image = Image.fromarray(RAMP).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    with Image.open(encoded(image, kind)) as stored:
        expected = np.asarray(stored.convert("RGBA").convert("RGB") if mode == "P" else stored.convert("RGB"))
    np.testing.assert_array_equal(decode_rgb(encoded(image, kind), "image"), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_divided_by_256(kind):
    values = (np.arange(24, dtype=np.uint16) * 2700).reshape(6, 4)
    found = decode_rgb(encoded(Image.fromarray(values), kind), "image")
    np.testing.assert_array_equal(found, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=-1))


@pytest.mark.parametrize(("dtype", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_pixels_of_unknown_range_are_refused(dtype, mode):
    file = encoded(Image.fromarray(RAMP[..., 0].astype(dtype)), "TIFF")
    sentence = f"image has {mode} pixels (32 bits), whose range is not known; store it with 8 or 16 bits"
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        decode_rgb(file, "image")


def test_a_photo_with_a_badly_typed_tag_is_read():
    """Pillow cannot write such a block again, and `ImageOps.exif_transpose` would."""
    exif = Image.Exif()
    exif[0x0112], exif[0x8769] = 6, {0x9000: b"0232"}
    photo = encoded(Image.fromarray(RAMP), "JPEG", exif=exif.tobytes()).getvalue()
    entry = photo.index(b"\x90\x00\x00\x07")  # ExifVersion, declared as bytes
    broken = photo[:entry] + b"\x90\x00\x00\x0b" + photo[entry + 4 :]  # and now as a float
    expected = decode_rgb(io.BytesIO(photo), "image")
    np.testing.assert_array_equal(decode_rgb(io.BytesIO(broken), "image"), expected)
    assert expected.shape == (4, 6, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so
def test_a_photo_whose_metadata_is_rubbish_is_read_as_it_is():
    photo = encoded(Image.fromarray(RAMP), "JPEG", exif=b"Exif\0\0MM\0*" + bytes(range(40, 90))).getvalue()
    assert decode_rgb(io.BytesIO(photo), "image").shape == (6, 4, 3)


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    """Pillow would run `gs`, whatever the file is called."""
    program, trace = tmp_path / "gs", tmp_path / "trace"
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = tmp_path / "x.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError, match=f"^{path} is not a readable image"):
        decode_rgb(path, str(path))
    assert not trace.exists()


@pytest.mark.parametrize("reader", [decode_rgb, image_size])
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path, reader):
    pipe, missing = tmp_path / "pipe.jpg", tmp_path / "missing.jpg"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=r"pipe\.jpg is not a regular file"):
        reader(pipe, "pipe.jpg")
    with pytest.raises(UserError, match=r"missing.jpg cannot be read \(No such file or directory\)"):
        reader(missing, "missing.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM"])
def test_damaged_images_are_refused_in_one_sentence(kind):
    content = encoded(Image.fromarray(np.tile(RAMP, (4, 4, 1))), kind).getvalue()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(100):
        damaged = bytearray(content[: rng.integers(1, len(content) + 1)])
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = rng.integers(256)
        try:
            decode_rgb(io.BytesIO(damaged), "image")
        except UserError as error:
            refused += 1
            assert str(error).startswith("image ")
            assert "\n" not in str(error)
    assert refused


def test_a_draft_is_at_least_as_large_as_asked():
    image = Image.fromarray(np.tile(RAMP, (40, 60, 1)))  # 240 rows, 240 columns
    assert decode_rgb(encoded(image, "JPEG"), "image", draft=60).shape == (60, 60, 3)
    assert decode_rgb(encoded(image, "JPEG"), "image", draft=61).shape == (120, 120, 3)
    assert decode_rgb(encoded(image, "PNG"), "image", draft=60).shape == (240, 240, 3)


def test_only_one_thread_at_a_time_has_a_large_image(monkeypatch):
    """Also while it is used. Small images do not wait."""
    monkeypatch.setattr(decode, "_LARGE_PIXELS", 10)
    monkeypatch.setattr(decode, "_STRIP_PIXELS", 10)
    large, done = encoded(Image.fromarray(RAMP), "PNG").getvalue(), threading.Event()
    small = encoded(Image.fromarray(RAMP[:2]), "PNG").getvalue()

    def second() -> None:
        decode_rgb(io.BytesIO(large), "image")
        done.set()

    thread = threading.Thread(target=second)
    with decode.one_large_image():
        for _ in range(2):  # the same thread may take several
            np.testing.assert_array_equal(decode_rgb(io.BytesIO(large), "image"), RAMP)
        thread.start()
        decode_rgb(io.BytesIO(small), "image")
        assert not done.wait(0.2)
    assert done.wait(10)
    thread.join()
    with pytest.raises(UserError), decode.one_large_image():
        decode_rgb(io.BytesIO(large[:50]), "image")
    second()  # the failure left nothing locked


def test_nothing_else_opens_images():
    """Pillow's `Image.open` would try every format that it knows, also those it starts programs for."""
    files = [path for package in ("dinojax", "converters", "experiments") for path in (ROOT / package).rglob("*.py")]
    assert [file.name for file in files if "Image.open(" in file.read_text()] == ["decode.py"]
