"""Retrieval of landmarks on revisited Oxford and Paris, as DINO evaluates it: mean average precision.

    python -m experiments.landmarks dino_vits16 path/to/revisited --dataset roxford5k
    python -m experiments.landmarks dinov2_vitb14 path/to/revisited --dataset rparis6k --image-size 448 --multiscale

FOLDER holds roxford5k/ or rparis6k/, each with its ground truth (gnd_roxford5k.pkl) and the photos in jpg/. The ground
truth is a pickle, which is parsed without running it.

The class tokens of whole photos are compared by their cosine. Junk images are taken out of each ranking. The longer
side of a photo is at most --image-size px, and sides are cut to whole patches. Queries are not cropped, as in DINO's
own evaluation. The output folder gets result.json, queries.csv with the average precision of each query, and
config.json.
"""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from dinojax.commands import exit_on_user_error
from experiments.features.backbones import load_backbone, short_name
from experiments.runs.command_line import command_line
from experiments.runs.settings import POSITIVE, Flags, RunSettings, check_bounds, flat

_KS = (1, 5, 10)
PROTOCOLS: tuple[Literal["easy", "medium", "hard"], ...] = ("easy", "medium", "hard")


@dataclasses.dataclass(frozen=True)
class Config:
    """Mean average precision on revisited Oxford or Paris."""

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_WEIGHTS")]
    """A published checkpoint, a weight file, a folder written by `dinojax convert`, or the run folder of a training."""
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder that holds roxford5k/ or rparis6k/, or one of these itself."""
    dataset: Literal["roxford5k", "rparis6k"] = "roxford5k"
    """Data set to evaluate on."""
    image_size: Annotated[int, POSITIVE] = 224
    """Largest side of a photo in pixels; larger photos are resized (Lanczos), their aspect is kept."""
    multiscale: bool = False
    """Whether to average the features of three sizes: the whole, 1/√2 and a half."""
    network: Literal["teacher", "student"] = "teacher"
    """Network of a run folder to use."""
    run: Flags[RunSettings] = RunSettings()


def run(config: Config) -> dict[str, Any]:
    """Evaluates; returns the scores of each protocol as fractions.

    Raises:
        UserError: weights or data that cannot be used.
    """
    check_bounds(config)
    from dinojax.retrieval import nearest, retrieval_scores, revisited_relevance
    from experiments.retrieval.features import landmark_features
    from experiments.retrieval.landmarks import read_landmarks
    from experiments.runs import records

    data = read_landmarks(config.data.expanduser(), config.dataset)
    backbone = load_backbone(
        config.weights, seed=config.run.seed, cache_dir=config.run.cache_dir, network=config.network
    )
    out = config.run.out or records.default_run_folder("landmarks")
    with records.run_folder(out) as folder:
        bank, queries = (
            landmark_features(
                backbone.model, files, image_size=config.image_size, multiscale=config.multiscale, title=title
            )
            for title, files in (("bank", data.images), ("queries", data.queries))
        )
        _, ranking = nearest(bank, queries, k=len(bank))
        scores = {}
        for protocol in PROTOCOLS:
            relevance = revisited_relevance(
                len(bank), easy=data.easy, hard=data.hard, junk=data.junk, protocol=protocol
            )
            scores[protocol] = retrieval_scores(ranking, relevance, _KS)
        names = [file.stem for file in data.queries]
        _write_queries(folder / "queries.csv", names, [score.average_precision for score in scores.values()])
        result = {
            protocol: {
                "mean_average_precision": score.mean_average_precision,
                "precision_at": dict(zip(map(str, _KS), map(float, score.mean_precision))),
                "queries": int(np.isfinite(score.average_precision).sum()),
            }
            for protocol, score in scores.items()
        }
        records.write_json(folder / records.CONFIG_FILE, flat(config))
        records.write_json(folder / records.RESULT_FILE, {"scores": result, "images": len(bank)})
    _print(config, backbone.weights, result, len(bank))
    print(f"  {out / records.RESULT_FILE}")
    return result


def _write_queries(path: Path, names: Sequence[str], areas: Sequence[np.ndarray]) -> None:
    """Writes the average precision of each query; empty where it has no positive image."""
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(("query", *PROTOCOLS))
        for name, *values in zip(names, *areas):
            writer.writerow((name, *("" if np.isnan(value) else f"{value:.6f}" for value in values)))


def _print(config: Config, weights: str, result: dict[str, Any], images: int) -> None:
    scale = ", three scales" if config.multiscale else ""
    print(f"\n{short_name(weights)} on {config.dataset}: {images:,} images of at most {config.image_size} px{scale}")
    print("          queries  mAP %" + "".join(f"  P@{k} %".rjust(9) for k in _KS))
    for protocol, found in result.items():
        precision = "".join(f"{100 * value:9.2f}" for value in found["precision_at"].values())
        print(f"{protocol:<8} {found['queries']:8d} {100 * found['mean_average_precision']:6.2f}{precision}")
    print(flush=True)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(command_line(Config, "experiments.landmarks", __doc__, args))


if __name__ == "__main__":
    main()
