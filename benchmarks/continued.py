"""Continued pretraining of given weights, with the heads' warm-up and without it: k-NN before and after.

    python -m benchmarks.continued --data path/to/cotton --tiny-imagenet path/to/tiny-imagenet-200

Every training starts from `--weights` and takes the recipe `continued` of `experiments.pretrain_folder` with two crops
of 32 px and four of 16 px, for four epochs; with a warm-up, the heads learn alone in the first of them. This is done at
two rates: the recipe's own, and a high one with a quicker teacher. k-NN is DINO's, weighted, with 20 neighbours: all
training images vote, all test images are classified. The intervals are Wilson's, over the test images. Every tenth
class of Tiny-ImageNet is taken, with its first 134 training images and all of its validation images. An interrupted run
is resumed, and a finished one is read, by the same command.
"""

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.work.paired import finish
from experiments.pretraining.config import PretrainConfig

HEADS_WARMUP = {"with warm-up": 1, "without": 0}
RATES = {
    "gentle": {},  # the recipe's own: 2e-3 for a batch of 256, a tenth of it for the backbone, a slow teacher
    "high": {"backbone_rate": 1.0, "learning_rate": 8e-3, "teacher_momentum": 0.99},
}
NETWORKS = ("start", "teacher", "student")
_CLASS_STEP, _IMAGES = 10, 134  # of Tiny-ImageNet


@dataclasses.dataclass(frozen=True)
class Config:
    """Continued pretraining at two rates, with the heads' warm-up and without; ends in one line of JSON."""

    data: tuple[Path, ...] = ()
    """Folders with train/<class>/… and test/<class>/…."""
    tiny_imagenet: Path | None = None
    """Folder tiny-imagenet-200 in its official layout, of which a part is taken."""
    weights: str = "dinojax_vitt"
    """Weights that every training starts from."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings."""
    rates: tuple[str, ...] = tuple(RATES)
    """Rates of the trainings: gentle, high, or both."""
    epochs: int = 4
    """Epochs of each training."""
    runs: Path = Path("runs/continued")
    """Folder of the runs."""
    out: Path | None = None
    """File that the JSON is also written to."""


def main() -> None:
    """Parses the command line, runs what is missing, prints a table for each data set and a line of JSON."""
    import tyro

    from dinojax.commands import exit_on_user_error

    config = tyro.cli(Config, prog="python -m benchmarks.continued", description=__doc__)
    with exit_on_user_error():
        rows = {}
        for folder in _folders(config):
            rows[folder.name] = _measure(folder, config)
            print(table(folder.name, rows[folder.name]), flush=True)
    about = {"benchmark": "continued", "weights": config.weights, "epochs": config.epochs, "seeds": config.seeds}
    finish(about | {"rates": {name: RATES[name] for name in config.rates}, "rows": rows}, config.out)


def _folders(config: Config) -> list[Path]:
    folders = [folder.expanduser() for folder in config.data]
    if config.tiny_imagenet is not None:
        folders.append(tiny_part(config.tiny_imagenet.expanduser(), config.runs / "tiny-imagenet-part"))
    return folders


def tiny_part(source: Path, folder: Path) -> Path:
    """A part of Tiny-ImageNet as class folders, copied once."""
    import shutil

    from experiments.data.tiny_imagenet import read_layout

    if folder.is_dir():
        return folder
    layout, new = read_layout(source), folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    for wnid in sorted(layout.train)[::_CLASS_STEP]:
        train = sorted(layout.train[wnid], key=lambda name: int(name.rpartition("_")[2].partition(".")[0]))
        for split, names in (("train", train[:_IMAGES]), ("test", layout.validation[wnid])):
            (new / split / wnid).mkdir(parents=True)
            for name in names:
                shutil.copy(source / name, new / split / wnid)
    return new.rename(folder)


def _measure(folder: Path, config: Config) -> dict[str, Any]:
    """The runs of one data set, and their summary."""
    from experiments.pretraining.command import run
    from experiments.runs.records import read_json

    runs = []
    for rate in config.rates:
        for seed in config.seeds:
            for warmup in HEADS_WARMUP:
                out = config.runs / f"{folder.name}-{rate}-{warmup.replace(' ', '-')}-seed{seed}"
                print(f"{out}", file=sys.stderr, flush=True)
                run(_settings(folder, config, rate, warmup, seed, out))
                result, images = read_json(out / "result.json"), read_json(out / "data.json")["splits"]
                runs.append(
                    {"rate": rate, "heads": warmup, "seed": seed, "knn": result["test_knn_accuracy"],
                     "rank_me": result["rank_me"], "loss": result["loss"], "steps": result["steps"],
                     "train_seconds": result["train_seconds"]}
                )  # fmt: skip
    counts = {name: split["images"] for name, split in images.items()}
    return {"images": counts, "uniform_loss": result["uniform_loss"], "runs": runs} | summary(runs, counts["test"])


def _settings(folder: Path, config: Config, rate: str, warmup: str, seed: int, out: Path) -> PretrainConfig:
    from experiments.pretraining.recipes import CONTINUED, general_recipes
    from experiments.runs.settings import replace

    recipe = general_recipes("continued", str(folder))[CONTINUED]
    crops = dataclasses.replace(
        recipe.crops, global_size=32, local_size=16, local_crops=4, blur_probabilities=(0.0, 0.0, 0.0)
    )
    shape = {"prototypes": 1_024, "head_hidden_dim": 512, "epochs": config.epochs, "knn_every": config.epochs}
    return replace(
        recipe, init=config.weights, crops=crops, heads_warmup=HEADS_WARMUP[warmup], seed=seed, out=out,
        evaluate=False, keep=1, **shape, **RATES[rate],
    )  # fmt: skip


def summary(runs: Sequence[dict[str, Any]], images: int) -> dict[str, Any]:
    """Means and deviations over seeds, by rate, heads and network, and the differences between runs of one seed.

    Args:
        runs: with rate, heads, seed and knn (network → fraction).
        images: number of test images.
    """
    from scipy.stats import binomtest

    start = runs[0]["knn"]["start"]
    low, high = binomtest(round(start * images), images).proportion_ci(method="wilson")
    groups: dict[str, Any] = {}
    for rate in dict.fromkeys(run["rate"] for run in runs):
        of_rate = [run for run in runs if run["rate"] == rate]
        by_seed = {(run["heads"], run["seed"]): run["knn"] for run in of_rate}
        seeds = list(dict.fromkeys(run["seed"] for run in of_rate))
        with_warmup, without = HEADS_WARMUP
        groups[rate] = {}
        for network in NETWORKS[1:]:
            numbers = {heads: [by_seed[heads, seed][network] for seed in seeds] for heads in HEADS_WARMUP}
            gains = [by_seed[with_warmup, seed][network] - by_seed[without, seed][network] for seed in seeds]
            groups[rate][network] = {name: _spread(values) for name, values in (numbers | {"gain": gains}).items()}
    return {"start": {"knn": start, "interval": [round(low, 4), round(high, 4)]}, "groups": groups}


def _spread(values: Sequence[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), 4), "deviation": round(deviation, 4)}


def table(name: str, row: dict[str, Any]) -> str:
    """The summary of one data set as text, in per cent."""
    start, (low, high) = row["start"]["knn"], row["start"]["interval"]
    lines = [
        f"\n{name}: {row['images']['train']:,} training and {row['images']['test']:,} test images; k-NN of the start "
        f"{100 * start:.2f} % (95 % interval {100 * low:.1f} to {100 * high:.1f})",
        f"  {'rate':9}{'network':10}" + "".join(f"{heads:>18}" for heads in (*HEADS_WARMUP, "gain")),
    ]
    for rate, networks in row["groups"].items():
        for network, numbers in networks.items():
            cells = (f"{100 * one['mean']:.2f} ± {100 * one['deviation']:.2f}" for one in numbers.values())
            lines.append(f"  {rate:9}{network:10}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
