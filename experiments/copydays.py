"""Copy detection on INRIA Copydays, as DINO evaluates it: mean average precision of each kind of copy.

    python -m experiments.copydays dino_vitb8 path/to/copydays --whitening path/to/photos
    python -m experiments.copydays dinov2_vits14 path/to/copydays --distractors path/to/others --image-size 322

FOLDER holds original/, and any of strong/, jpegqual/3 … 75 and crops/10 … 80, with .jpg files. Each copy searches the
originals, and the --distractors if there are any, for the photo that it was made of.

A photo is resized to a square. Its feature is the class token, followed by the patch tokens in a generalised mean (GeM,
p = 4). --whitening learns a PCA on other photos, as DINO does on 20,000 of them. Only the 20 most similar images count,
as upstream. The output folder gets result.json and config.json.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from experiments.features.backbones import load_backbone, short_name
from experiments.runs.command_line import command_line
from experiments.runs.settings import POSITIVE, Flags, RunSettings, check_bounds, flat

_RANKED = 20


@dataclasses.dataclass(frozen=True)
class Config:
    """Mean average precision on Copydays."""

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_WEIGHTS")]
    """A published checkpoint, a weight file, a folder written by `dinojax convert`, or the run folder of a training."""
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of Copydays."""
    distractors: Path | None = None
    """Folder of other photos that are searched too. DINO takes 10,000."""
    whitening: Path | None = None
    """Folder of other photos to learn the whitening on. None compares the features as they are."""
    image_size: Annotated[int, POSITIVE] = 320
    """Side in pixels of the squares that photos are resized to; rounded to whole patches."""
    network: Literal["teacher", "student"] = "teacher"
    """Network of a run folder to use."""
    run: Flags[RunSettings] = RunSettings()


def run(config: Config) -> dict[str, float]:
    """Evaluates; returns the mean average precision of each kind of copy as a fraction.

    Raises:
        UserError: weights or data that cannot be used.
    """
    check_bounds(config)
    from experiments.retrieval.copydays import read_copydays
    from experiments.retrieval.features import copy_detection_features
    from experiments.runs import records

    data = read_copydays(config.data.expanduser())
    if data.missing:
        print(f"note: {config.data} holds no {', '.join(data.missing)}: these copies are left out")
    others = {name: _photos(getattr(config, name)) for name in ("distractors", "whitening")}
    backbone = load_backbone(
        config.weights, seed=config.run.seed, cache_dir=config.run.cache_dir, network=config.network
    )
    patch = backbone.model.config.patch_size
    size = max(1, round(config.image_size / patch)) * patch
    if size != config.image_size:
        print(f"note: images have {size} px, which is whole patches of {patch} px, not {config.image_size}")

    def features(files: Sequence[Path], title: str) -> np.ndarray:
        return copy_detection_features(backbone.model, files, image_size=size, title=title)

    out = config.run.out or records.default_run_folder("copydays")
    with records.run_folder(out) as folder:
        bank = features([*data.originals, *others["distractors"]], "searched")
        queries = [features(block.files, block.name) for block in data.blocks]
        if others["whitening"]:
            bank, *queries = _whitened(features(others["whitening"], "whitening"), bank, *queries)
        result = {
            block.name: _mean_average_precision(bank, found, block.relevance)
            for block, found in zip(data.blocks, queries)
        }
        records.write_json(folder / records.CONFIG_FILE, flat(config))
        counts = {name: len(files) for name, files in others.items()} | {"originals": len(data.originals)}
        records.write_json(
            folder / records.RESULT_FILE, {"mean_average_precision": result, "images": counts, "image_size": size}
        )
    print(f"\n{short_name(backbone.weights)} on Copydays: {len(bank):,} images searched, {size} px")
    for block in data.blocks:
        print(f"{block.name:<12} {len(block.files):5d} copies   mAP {100 * result[block.name]:6.2f} %")
    print(f"  {out / records.RESULT_FILE}", flush=True)
    return result


def _photos(folder: Path | None) -> list[Path]:
    """The readable images of a folder."""
    from experiments.data.files import readable_images

    return [] if folder is None else list(readable_images([folder]))


def _whitened(learned_on: np.ndarray, *features: np.ndarray) -> list[np.ndarray]:
    from dinojax.retrieval import fit_whitening, whiten

    if len(learned_on) < 2:
        raise UserError("--whitening needs two photos or more, and a good one thousands")
    whitening = fit_whitening(learned_on, centred=False)
    return [whiten(some, whitening) for some in features]


def _mean_average_precision(bank: np.ndarray, queries: np.ndarray, relevance: Any) -> float:
    """Over the queries, with the first 20 of each ranking; distractors belong to none."""
    from dinojax.retrieval import average_precision, nearest

    _, ranking = nearest(bank, queries, k=min(_RANKED, len(bank)))
    of_all = np.zeros((len(queries), len(bank)), np.int8)
    of_all[:, : relevance.shape[1]] = relevance
    return float(average_precision(ranking, of_all).mean())


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(command_line(Config, "experiments.copydays", __doc__, args))


if __name__ == "__main__":
    main()
