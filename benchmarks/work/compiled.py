"""What a compiled program makes the devices exchange."""

import collections
import math
import re
from collections.abc import Mapping

Collectives = dict[tuple[str, str, tuple[int, ...]], int]

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_BITS = re.compile(r"\d+")


def collectives(text: str) -> Collectives:
    """How often each kind of exchange is in a compiled program, by number type and shape of what a device gets.

    Args:
        text: of `jax.stages.Compiled.as_text`. What is in a loop counts once.
    """
    found: collections.Counter = collections.Counter()
    plain = re.sub(r"/\*.*?\*/", "", text)  # tuples number their parts in comments
    for shapes, kind in re.findall(rf"= ([^=]*?) ({_KINDS})(?:-start)?\(", plain):
        for dtype, lengths in re.findall(r"([a-z]+[0-9]+)\[([0-9,]*)\]", shapes):
            found[kind, dtype, tuple(int(length) for length in lengths.split(",") if length)] += 1
    return dict(found)


def exchanged_bytes(found: Mapping[tuple[str, str, tuple[int, ...]], int]) -> dict[str, int]:
    """Bytes that a device gets by each kind of exchange."""
    total: collections.Counter = collections.Counter()
    for (kind, dtype, shape), count in found.items():
        total[kind] += count * math.prod(shape) * int(_BITS.findall(dtype)[0]) // 8
    return dict(total)
