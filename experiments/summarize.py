"""One table of many runs: mean and deviation over seeds, beside the first DINO paper's numbers, as Markdown.

    python -m experiments.summarize runs/evaluate/*
    python -m experiments.summarize runs/evaluate runs/stl10_transfer runs/dino_cifar100 --out results.md
    python -m experiments.summarize runs/finetune_folder/*

Takes the output folders of `evaluate` and `stl10_transfer`, the run folders of trainings (their final k-NN) and of
`finetune_folder`, or folders that hold such folders. What differs in nothing but the seed is one line: the mean over
differently trained weights ± the standard deviation (n - 1 in the denominator) and their number; the same weights
evaluated twice count once. Where models trained on CIFAR-100 and on Tiny-ImageNet were transferred to STL-10, it is
tested which transfers better.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from experiments.runs.records import write_whole


@dataclasses.dataclass(frozen=True)
class Config:
    """A summary of runs; see the top of this file."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS…")]
    """Output folders of evaluations, run folders of trainings, or folders that hold them at any depth."""
    out: Path | None = None
    """A Markdown file to write the tables to as well."""


def run(config: Config) -> str:
    """The tables as Markdown.

    Raises:
        UserError: no runs, or a damaged one.
    """
    from experiments.summaries import evaluations as summary
    from experiments.summaries.finetunings import finetunings, read_tuned
    from experiments.summaries.results import read_runs

    tuned = {path.expanduser(): runs for path in config.runs if (runs := read_tuned(path))}
    groups = summary.group(read_runs(config.runs, others=tuned))
    parts = [summary.overview(groups), summary.all_numbers(groups), summary.transfer(groups)] if groups else []
    parts.append(finetunings(run for runs in tuned.values() for run in runs))
    text = "\n\n".join(part for part in parts if part)
    print(text)
    if config.out is not None:
        try:
            write_whole(config.out.expanduser(), f"{text}\n".encode())
        except OSError as error:
            raise UserError(f"--out {config.out} cannot be written ({error.strerror}); name another file") from error
    return text


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(tyro.cli(Config, args=args, description=__doc__))


if __name__ == "__main__":
    main()
