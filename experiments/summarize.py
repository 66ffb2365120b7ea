"""Tables of many runs as Markdown: mean and deviation over seeds, next to the numbers of the first DINO paper.

    python -m experiments.summarize runs/evaluate/*
    python -m experiments.summarize runs/evaluate runs/stl10_transfer runs/dino_cifar100 --out results.md
    python -m experiments.summarize runs/finetune_folder/*

The runs are output folders of `evaluate`, `stl10_transfer`, `cifar10_probe` and `finetune_folder`, run folders of
trainings (their final k-NN), or folders that hold such folders. Runs that differ only in the seed are one line: the
mean over differently trained weights ± the standard deviation (n - 1 in the denominator) and their number; the same
weights evaluated twice count once. If models trained on CIFAR-100 and on Tiny-ImageNet were transferred to STL-10, the
difference between them is tested.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from dinojax.commands import exit_on_user_error
from dinojax.documents import write_whole
from dinojax.errors import UserError
from experiments.runs.command_line import command_line


@dataclasses.dataclass(frozen=True)
class Config:
    """A summary of runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS…", help_behavior_hint="")]
    """Folders of evaluations, trainings, fine-tunings or dense heads, or folders that hold them at any depth."""
    out: Path | None = None
    """Markdown file that the tables are also written to."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The tables as Markdown."""

    text: str


def run(config: Config) -> Result:
    """Prints the tables, and writes them to a file if one is given.

    Raises:
        UserError: no runs, or a damaged one.
    """
    from experiments.summaries import evaluations as summary
    from experiments.summaries.dense import dense_heads, read_dense
    from experiments.summaries.finetunings import finetunings, read_tuned
    from experiments.summaries.results import read_runs

    tuned = {path.expanduser(): runs for path in config.runs if (runs := read_tuned(path))}
    heads = {path.expanduser(): runs for path in config.runs if (runs := read_dense(path))}
    groups = summary.group(read_runs(config.runs, others=tuned.keys() | heads.keys()))
    parts = [summary.overview(groups), summary.all_numbers(groups), summary.transfer(groups)] if groups else []
    parts.append(finetunings(run for runs in tuned.values() for run in runs))
    parts.append(dense_heads(run for runs in heads.values() for run in runs))
    text = "\n\n".join(part for part in parts if part)
    print(text)
    if config.out is not None:
        try:
            write_whole(config.out.expanduser(), f"{text}\n".encode())
        except OSError as error:
            raise UserError(f"--out {config.out} cannot be written ({error.strerror}); name another file") from error
    return Result(text)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(command_line(Config, "experiments.summarize", __doc__, args))


if __name__ == "__main__":
    main()
