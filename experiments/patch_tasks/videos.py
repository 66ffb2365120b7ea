"""Videos as folders of frames: the layout of DAVIS, or one folder with a mask of its first frame."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dinojax.errors import UserError

Indices = UInt8[np.ndarray, "_height _width"]
MOST_LABELS = 64


@dataclasses.dataclass(frozen=True)
class Video:
    """A video.

    Attributes:
        name: of its folder.
        frames: files in order.
        first_mask: file of the mask of the first frame.
        truth: folder of masks with the stems of the frames, if they are known.
    """

    name: str
    frames: list[Path]
    first_mask: Path
    truth: Path | None


def find_videos(folder: Path, mask: Path | None, truth: Path | None, names: Sequence[str], subset: str) -> list[Video]:
    """The videos of a folder in DAVIS's layout, or the one that a folder of frames is.

    Args:
        folder: with ImageSets/2017, JPEGImages/480p and Annotations/480p, or of frames.
        mask: of the first frame; for a folder of frames.
        truth: folder of masks of all frames; for a folder of frames.
        names: of the videos to take; empty takes all.
        subset: of DAVIS, such as "val".

    Raises:
        UserError: a folder that holds no video, or a mask that is missing.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name a folder of frames, or that of DAVIS")
    if not (folder / "ImageSets").is_dir():
        if names:
            raise UserError(f"--videos {names[0]} chooses among the videos of DAVIS, and {folder} has no ImageSets")
        return [_video(folder, mask, truth)]
    if mask is not None or truth is not None:
        raise UserError(f"{folder} has the layout of DAVIS with masks of its own; leave out --mask and --truth")
    listed = _listed(folder / "ImageSets" / "2017" / f"{subset}.txt")
    unknown = [name for name in names if name not in listed]
    if unknown:
        raise UserError(
            f"--videos {unknown[0]} is not in ImageSets/2017/{subset}.txt, which lists {listed[0]} and others"
        )
    return [
        _video(folder / "JPEGImages" / "480p" / name, None, folder / "Annotations" / "480p" / name)
        for name in (names or listed)
    ]


def _listed(file: Path) -> list[str]:
    try:
        names = file.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({getattr(error, 'strerror', None) or error}); it lists the videos"
        ) from error
    if not names:
        raise UserError(f"{file} lists no videos")
    for name in names:
        if name != Path(name).name or name in ("..", "."):
            raise UserError(f"{file} lists {name!r}, which is not the name of a folder")
    return names


def _video(folder: Path, mask: Path | None, truth: Path | None) -> Video:
    from experiments.data.files import find_images, no_images

    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of frames")
    found = find_images(folder)
    frames = [file for file in found.files if file.parent == folder]
    if len(frames) < 2:
        raise UserError(f"{no_images(folder, found) if not frames else f'{folder} holds one frame'}; give two or more")
    first = mask.expanduser() if mask else truth.expanduser() / f"{frames[0].stem}.png" if truth else None
    if first is None:
        raise UserError(f"{folder} is a folder of frames: name the mask of {frames[0].name} with --mask")
    if not first.is_file():
        raise UserError(f"{first}: there is no such mask of the first frame, {frames[0].name}")
    stems = [frame.stem for frame in frames]
    if len(set(stems)) < len(stems):
        raise UserError(f"{folder} holds several frames called {max(stems, key=stems.count)}; remove all but one")
    return Video(folder.name, frames, first, truth.expanduser() if truth else None)


def read_indices(file: Path) -> Indices:
    """The objects' numbers of a mask: palette indices, or grey values; 0 is the background, 255 void.

    Raises:
        UserError: a file that is no such mask, or with more than 64 objects.
    """
    from dinojax.images.decode import decode_values

    found = decode_values(file, str(file))
    if found.dtype != np.uint8:
        raise UserError(f"{file} has 16-bit pixels, where the numbers of objects were expected; store it with 8 bits")
    values = np.unique(found)
    if values.tolist() in ([0, 255], [255]):  # a mask in black and white
        return (found == 255).astype(np.uint8)
    objects = values[values < 255]
    if objects.size and objects.max() >= MOST_LABELS:
        raise UserError(
            f"{file} has an object number {objects.max()}, and {MOST_LABELS - 1} is the largest that is tracked; store "
            "the objects' numbers (1, 2, …), not shades of grey"
        )
    return found


def read_first_mask(video: Video) -> Indices:
    """The mask of the first frame.

    Raises:
        UserError: a mask of another size than the frame, or without an object.
    """
    from dinojax.images.decode import image_size
    from dinojax.patches import VOID

    found = read_indices(video.first_mask)
    height, width = image_size(video.frames[0], str(video.frames[0]))
    if found.shape != (height, width):
        raise UserError(
            f"{video.first_mask} is {found.shape[1]}×{found.shape[0]} px, and {video.frames[0].name} {width}×{height}; "
            "give a mask of that size"
        )
    if not ((found > 0) & (found != VOID)).any():
        raise UserError(f"{video.first_mask} marks no object; give a mask in which a pixel is not 0")
    return found


def read_truth(video: Video) -> list[Indices] | None:
    """The masks of all frames, or None if they are not known."""
    if video.truth is None:
        return None
    files = [video.truth / f"{frame.stem}.png" for frame in video.frames]
    if not all(file.is_file() for file in files):
        return None
    return [read_indices(file) for file in files]


def palette() -> list[int]:
    """Red, green and blue of 256 objects, as in DAVIS and PASCAL VOC: a number's bits, spread over the channels."""
    numbers = np.arange(256)
    colours = np.zeros((256, 3), int)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel)) & 1) << (7 - bit)
    return colours.ravel().tolist()


def write_indices(path: Path, mask: Indices) -> None:
    """Writes a mask as a palette PNG, whole or not at all."""
    import io

    from PIL import Image

    from dinojax.documents import write_whole

    image, file = Image.fromarray(mask), io.BytesIO()
    image.putpalette(palette())
    image.save(file, "PNG")
    write_whole(path, file.getvalue())
