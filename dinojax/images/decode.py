"""The one place that opens images: formats by name, upright, RGB, in bounded memory, whatever is in the file."""

import contextlib
import io
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image

from dinojax.errors import UserError

# Pillow reads these by itself. It starts Ghostscript for EPS, and leaves WMF, GRIB and HDF5 to other programs.
_SAFE = (
    *("AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA"),
    *("TIFF", "WEBP"),
)
Image.init()
# Blocks above 32 MiB go back to the system at once; smaller ones of large images would stay with each thread.
Image.core.set_block_size(2**26)
FORMATS = tuple(name for name in _SAFE if name in Image.OPEN)
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)

# The EXIF orientation → what turns the pixels upright. Source: Exif 2.32, tag 0x0112.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LARGE_PIXELS = 2**25  # 33 megapixels: larger images are decoded one after the other, however many threads there are
_STRIP_PIXELS = 2**20
_ONE_LARGE, _thread = threading.Lock(), threading.local()

Pixels = UInt8[np.ndarray, "height width 3"]


@contextlib.contextmanager
def one_large_image() -> Iterator[None]:
    """A block in which an image is decoded and used up: of several threads, only one at a time has a large image.

    The first large image that is decoded in the block makes other threads wait with theirs until the block ends. Blocks
    may be nested; `decode_rgb` is one by itself.
    """
    outermost = not getattr(_thread, "inside", False)
    _thread.inside = True
    try:
        yield
    finally:
        if outermost:
            _thread.inside = False
            if getattr(_thread, "waited", False):
                _thread.waited = False
                _ONE_LARGE.release()


def decode_rgb(file: Path | io.BytesIO, name: str, *, draft: int | None = None) -> Pixels:
    """Reads an image of any mode as RGB, turned upright by its EXIF tag.

    Greyscale, palette and CMYK images are converted, alpha is dropped (as `PIL.Image.convert("RGB")`, which upstream
    uses), 16-bit values are divided by 256. Metadata that cannot be read is ignored.

    Args:
        file: a regular file, or its bytes.
        name: of the image, for messages.
        draft: decode a JPEG at a half, a quarter or an eighth of its size, no side below this many pixels.

    Raises:
        UserError: the file is not a whole image of a format in `FORMATS`, or has 32-bit or floating-point pixels, whose
            range is not known.
    """
    if isinstance(file, Path):
        _check_regular(file, name)
    try:
        with one_large_image(), Image.open(file, formats=FORMATS) as image:
            if draft is not None and image.format == "JPEG":
                image.draft(None, (draft, draft))
            if image.width * image.height > _LARGE_PIXELS and not getattr(_thread, "waited", False):
                _ONE_LARGE.acquire()
                _thread.waited = True
            return to_rgb(image, name)
    except UserError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file makes them raise
        raise UserError(f"{name} is not a readable image ({_reason(error, name)}); replace or remove it") from error


def decode_values(file: Path, name: str) -> UInt8[np.ndarray, "height width"] | UInt16[np.ndarray, "height width"]:
    """The numbers of an image with one channel, as they are stored: class indices of a mask, or depth.

    Of a palette image these are the indices of the palette. Nothing is turned by an EXIF tag.

    Raises:
        UserError: the file is not a whole image of a format in `FORMATS`, or has several channels or 32-bit pixels.
    """
    _check_regular(file, name)
    try:
        with one_large_image(), Image.open(file, formats=FORMATS) as image:
            mode = image.mode
            if mode in ("1", "L", "P"):
                return np.asarray(image).astype(np.uint8)
            if mode.startswith("I;16") or (
                mode == "I" and image.format in ("PNG", "PPM")
            ):  # which hold 16 bits at most
                return np.asarray(image).astype(np.uint16)
    except Exception as error:  # decoders raise whatever a damaged file makes them raise
        raise UserError(f"{name} is not a readable image ({_reason(error, name)}); replace or remove it") from error
    raise UserError(f"{name} has {mode} pixels, where one channel of 8 or 16 bits was expected; store it as such a PNG")


def has_colours(file: Path, name: str) -> bool:
    """Whether an image has several channels, from its header alone; a palette counts as one.

    Raises:
        UserError: as `image_size`.
    """
    _check_regular(file, name)
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.mode != "P" and len(image.getbands()) > 1
    except Exception as error:
        raise UserError(f"{name} is not a readable image ({_reason(error, name)}); replace or remove it") from error


def image_size(file: Path, name: str) -> tuple[int, int]:
    """Height and width of an image as `decode_rgb` returns it, from its header alone.

    Raises:
        UserError: as `decode_rgb`, as far as the header tells.
    """
    _check_regular(file, name)
    try:
        with Image.open(file, formats=FORMATS) as image:
            turned = _orientation(image) in (5, 6, 7, 8) and image.format != "TIFF"  # its size is turned already
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:
        raise UserError(f"{name} is not a readable image ({_reason(error, name)}); replace or remove it") from error


def to_rgb(image: Image.Image, name: str) -> Pixels:
    """An opened image of any mode as `decode_rgb` returns it; `name` is for messages.

    Raises:
        UserError: it has 32-bit or floating-point pixels, whose range is not known.
    """
    image.load()  # Pillow turns TIFF files itself, and then forgets their orientation
    orientation = _orientation(image)
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise UserError(
            f"{name} has {image.mode} pixels (32 bits), whose range is not known; store it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):  # 16 bits; Pillow opens such PGM files as 32-bit integers
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":  # Pillow warns about transparency on the direct way
        image = image.convert("RGBA")
    if image.mode != "RGB":
        image = image.convert("RGB")
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return np.asarray(image) if image.width * image.height <= _LARGE_PIXELS else _by_strips(image)


def _by_strips(image: Image.Image) -> Pixels:
    """The pixels without the second copy, in small pieces, that Pillow would make of the whole image."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = (0, top, image.width, min(top + rows, image.height))
        pixels[top : strip[3]] = np.asarray(image.crop(strip))
    return pixels


def _orientation(image: Image.Image) -> int | None:
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:
        return None
    return found if isinstance(found, int) else None


def _check_regular(file: Path, name: str) -> None:
    """Opening a pipe or a device would wait for ever."""
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read ({getattr(error, 'strerror', error)}); replace or remove it") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{name} is not a regular file; remove it")


def _reason(error: Exception, name: str) -> str:
    """Pillow repeats the name, or the address of an object, where it knows no format."""
    return "no known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error) or repr(error)
