"""The classes of ImageNet-1k, as data."""

import functools
from pathlib import Path

_FILE = Path(__file__).parents[1] / "assets" / "imagenet1k" / "classes.tsv"


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1000 classes in the order of the logits of published classifiers, such as "tench, Tinca tinca".

    Source: the synsets of ILSVRC 2012 and their words in WordNet 3.0; see the README beside the file.
    """
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    return tuple(line.split("\t")[1] for line in lines)
