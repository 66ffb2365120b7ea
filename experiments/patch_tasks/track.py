"""Objects of a video, tracked from the mask of its first frame: label propagation as DINO evaluates on DAVIS.

    python -m experiments.patches track dino_vits16 path/to/frames --mask first.png
    python -m experiments.patches track dino_vits8 path/to/DAVIS --protocol dino
    python -m experiments.patches track dinov2_vits14 path/to/DAVIS --videos blackswan camel

The folder holds the frames of one video, or DAVIS 2017 (ImageSets/2017/val.txt, JPEGImages/480p, Annotations/480p). In
a mask, 0 is the background and each object has a number, as palette index or grey value; a mask of 0 and 255 alone has
one object. The labels of a patch are the mean of those of the most similar patches near it, in the first frame and in
the last ones, weighted by exp(cosine / temperature).

Frames are resized to 480 px by default. 480 is not divisible by 14: both sides are rounded to whole patches, which is
printed, and masks are resized back to the size of the frames. --protocol dino repeats the sizes of DINO's own script
(the longer side cut to a multiple of 64), its plain bilinear resizing and its deviation of 0.228 for red; it refuses
patches that do not divide these sizes.

The run folder gets masks/VIDEO/FRAME.png, palette images as the DAVIS evaluation reads them; VIDEO.png, some frames
with their masks; with true masks also scores.csv and result.json with J (region) and F (boundary). Videos that are
done are kept: the same command resumes an interrupted run.
"""

import csv
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from dinojax.errors import UserError
from experiments.patch_tasks.model import Kind, PatchBackbone, PatchModel, Photo
from experiments.patch_tasks.videos import (
    Indices,
    Video,
    find_videos,
    read_first_mask,
    read_indices,
    read_truth,
    write_indices,
)
from experiments.runs.settings import NOT_NEGATIVE, POSITIVE, Flags, RunSettings, check_bounds

# Source: facebookresearch/dino 7c446df `eval_video_segmentation.py`: `read_frame` and `color_normalize`.
_SIDE, _MULTIPLE, _STD = 480, 64, (0.228, 0.224, 0.225)
_DRAWN = 8  # frames of a video
_MASKS, _PARTIAL = "masks", ".partial"


@dataclasses.dataclass(frozen=True)
class TrackBackbone(PatchBackbone):
    """The model, and the size of the frames that it sees."""

    image_size: Annotated[int | None, POSITIVE] = _SIDE
    """Pixels that the shorter side of each frame is resized to; the aspect is kept, and both sides are rounded to the
    nearest whole patch. None takes 32 patches."""


@dataclasses.dataclass(frozen=True)
class TrackSettings:
    """The videos, and how labels are propagated."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FRAMES_OR_DAVIS")]
    """Folder of the frames of one video, or the folder of DAVIS 2017."""
    mask: Path | None = None
    """Mask of the first frame, for a folder of frames."""
    truth: Path | None = None
    """Folder of the true masks of all frames, with the frames' names, for a folder of frames."""
    videos: tuple[str, ...] = ()
    """Names of the videos of DAVIS to take. None takes all."""
    subset: str = "val"
    """List in ImageSets/2017 that names the videos."""
    protocol: Literal["nearest", "dino"] = "nearest"
    """How frames are resized: to the nearest whole patches, as all photos here, or as in DINO's own script."""
    features: Kind = "tokens"
    """Features of the patches: the tokens after the final norm, or the keys of the last attention."""
    last_frames: Annotated[int, NOT_NEGATIVE] = 7
    """Number of frames before each one whose labels count beside those of the first."""
    radius: Annotated[int, NOT_NEGATIVE] = 12
    """Largest distance in patches, along rows and columns, of patches that are compared. 0 compares all."""
    top_k: Annotated[int, POSITIVE] = 5
    """Number of most similar patches whose labels count."""
    temperature: Annotated[float, POSITIVE] = 0.1
    """Temperature of the weights."""


@dataclasses.dataclass(frozen=True)
class TrackConfig:
    """Objects tracked through videos."""

    model: Flags[TrackBackbone]
    track: Flags[TrackSettings]
    run: Flags[RunSettings] = RunSettings()


def run_track(config: TrackConfig) -> dict[str, Any]:
    """Tracks the objects of every video; returns what result.json holds.

    Raises:
        UserError: videos, weights or settings that cannot be used.
    """
    from experiments.data.files import split_of_paths
    from experiments.runs import records

    check_bounds(config)
    settings = config.track
    videos = find_videos(settings.folder, settings.mask, settings.truth, settings.videos, settings.subset)
    if settings.protocol == "dino" and config.model.image_size != _SIDE:
        raise UserError(f"--protocol dino sees frames at {_SIDE} px; leave out --image-size {config.model.image_size}")
    for video in videos:
        read_first_mask(video)
    model = PatchModel(config.model, seed=config.run.seed, cache_dir=config.run.cache_dir)
    out = config.run.out or records.default_run_folder("patches-track")
    splits = {
        video.name: split_of_paths(video.frames[0].parent, video.name, video.frames, np.zeros(len(video.frames), int))
        for video in videos
    }
    with records.open_run(out, config, records.data_record([video.name for video in videos], splits)):
        _note_size(model, videos[0], settings)
        for number, video in enumerate(videos, 1):
            if not (out / _MASKS / video.name).is_dir():
                _track(model, video, settings, out / _MASKS, f"{video.name} ({number} of {len(videos)})")
            if not (out / f"{video.name}.png").is_file():
                _draw(out / f"{video.name}.png", video, out / _MASKS / video.name, model.about)
        result = _score(videos, out)
        records.write_json(out / records.RESULT_FILE, result | {"environment": records.environment()})
    _print(result, videos, out)
    return result


def _frame(model: PatchModel, file: Path, settings: TrackSettings) -> Photo:
    if settings.protocol == "nearest":
        return model.photo(file)
    from dinojax.images.decode import decode_rgb

    pixels = decode_rgb(file, str(file))
    size = dino_size(*pixels.shape[:2])
    if not min(size) or any(side % model.patch_size for side in size):
        raise UserError(
            f"--protocol dino sees {file.name} at {size[1]}×{size[0]} px, which is not divisible by the patch of "
            f"{model.patch_size} px; leave it out, and both sides are rounded to whole patches"
        )
    return Photo(file, pixels.shape[:2], plain_bilinear(pixels, size))


def dino_size(height: int, width: int) -> tuple[int, int]:
    """The size of DINO's script: 480 px the shorter side, the longer one cut to a multiple of 64."""
    longer = int(_SIDE * max(height, width) / min(height, width)) // _MULTIPLE * _MULTIPLE
    return (longer, _SIDE) if height > width else (_SIDE, longer)


def plain_bilinear(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear without antialiasing, rounded to whole values, as OpenCV's resize does by default."""
    import jax

    large = jax.image.resize(pixels.astype(np.float32), (*size, 3), "linear", antialias=False)
    return np.rint(np.asarray(large)).astype(np.uint8)


def _note_size(model: PatchModel, video: Video, settings: TrackSettings) -> None:
    first = _frame(model, video.frames[0], settings)
    if settings.protocol == "nearest":
        model.note_size(first, f"{len(video.frames):,} frames")
    else:
        print(f"{model.about}: frames at {first.pixels.shape[1]}×{first.pixels.shape[0]} px, as in DINO's script")


def _track(model: PatchModel, video: Video, settings: TrackSettings, folder: Path, name: str) -> None:
    """Writes the masks of a video; the folder appears when all are there."""
    import shutil

    from tqdm import tqdm

    from dinojax import patches

    first_mask = read_first_mask(video)
    bar = tqdm(video.frames, desc=name, unit="frame", dynamic_ncols=True)
    seen: list[Photo] = []

    def features() -> Iterator[np.ndarray]:
        for file in bar:
            photo = _frame(model, file, settings)
            if seen and photo.pixels.shape != seen[-1].pixels.shape:
                raise UserError(f"{file} has another size than {video.frames[0].name}; give frames of one size")
            seen[:] = [photo]
            std = _STD if settings.protocol == "dino" else None
            yield model.features(photo, settings.features, std=std)

    partial = folder / f"{_PARTIAL}-{video.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    grid = [side // model.patch_size for side in _frame(model, video.frames[0], settings).pixels.shape[:2]]
    objects = np.where(first_mask == patches.VOID, 0, first_mask)
    labels = patches.propagate_video(
        features(),
        patches.one_hot_labels(objects, *grid),
        last_frames=settings.last_frames,
        radius=settings.radius,
        top_k=settings.top_k,
        temperature=settings.temperature,
    )
    write_indices(partial / f"{video.frames[0].stem}.png", first_mask)
    for file, found in zip(video.frames[1:], labels):
        mask = patches.index_map(found, *seen[-1].pixels.shape[:2])
        write_indices(partial / f"{file.stem}.png", _at_size(mask, seen[-1].size))
    partial.rename(folder / video.name)


def _at_size(mask: Indices, size: tuple[int, int]) -> Indices:
    from PIL import Image

    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def _draw(path: Path, video: Video, masks: Path, about: str) -> None:
    from dinojax.images.decode import decode_rgb
    from experiments.figures.patches import Panel, save_panels

    chosen = np.unique(np.linspace(0, len(video.frames) - 1, _DRAWN).round().astype(int))
    panels = []
    for index in chosen:
        frame = video.frames[index]
        indices = read_indices(masks / f"{frame.stem}.png")
        panels.append(Panel(decode_rgb(frame, str(frame)), f"frame {index + 1}", indices=indices))
    rows = [panels[: len(panels) // 2], panels[len(panels) // 2 :]] if len(panels) == _DRAWN else [panels]
    note = f"{about}; the mask of frame 1 was given"
    save_panels(path, rows, title=f"{video.name}: {len(video.frames):,} frames", note=note)


def _score(videos: Sequence[Video], out: Path) -> dict[str, Any]:
    """J and F of every object, and scores.csv, where the true masks are known."""
    from tqdm import tqdm

    from dinojax.patches import video_scores

    rows = []
    for video in tqdm(videos, desc="scores", unit="video", dynamic_ncols=True, delay=1, leave=False):
        truth = read_truth(video)
        if truth is None:
            continue
        masks = [read_indices(out / _MASKS / video.name / f"{frame.stem}.png") for frame in video.frames]
        for number, scores in video_scores(np.stack(masks), np.stack(truth)).items():
            j, f = scores["J"], scores["F"]
            rows.append(
                {"video": video.name, "object": number, "J": j.mean, "F": f.mean, "J_recall": j.recall,
                 "F_recall": f.recall, "J_decay": j.decay, "F_decay": f.decay}
            )  # fmt: skip
    if not rows:
        return {"videos": len(videos), "objects": []}
    with (out / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name not in ("video", "object")}
    return {"videos": len(videos), "J&F": (means["J"] + means["F"]) / 2, **means, "objects": rows}


def _print(result: dict[str, Any], videos: Sequence[Video], out: Path) -> None:
    if result["objects"]:
        print(f"\n{'object':30}{'J':>8}{'F':>8}")
        for row in result["objects"]:
            print(f"{row['video'] + ' ' + str(row['object']):30}{row['J']:8.3f}{row['F']:8.3f}")
        print(f"{'mean over objects':30}{result['J']:8.3f}{result['F']:8.3f}   J&F {result['J&F']:.3f}")
    print(f"\n  {out / _MASKS}/VIDEO/FRAME.png\n  {out}/VIDEO.png ({len(videos):,})")
    if result["objects"]:
        print(f"  {out / 'scores.csv'}")
