"""Blocks of images: all images once and in order, and a new image leaves most blocks as they are."""

import numpy as np
import pytest

from experiments.embedding.blocks import cut

NAMES = [f"photos/{i:05}.jpg" for i in range(5000)]


@pytest.mark.parametrize("target", [1, 2, 7, 64, 10_000])
def test_every_image_is_in_one_block_of_about_the_target(target):
    blocks = cut(NAMES, target)
    assert [i for rows in blocks for i in rows] == list(range(len(NAMES)))
    lengths = np.array([len(rows) for rows in blocks])
    assert lengths.max() <= 2 * target and (lengths[:-1] >= target // 2).all()
    if target in (7, 64):
        assert 0.7 * target < lengths.mean() < 1.3 * target
    assert cut([], target) == []


@pytest.mark.parametrize("place", [0, 1234, 4999])
def test_a_new_image_changes_few_blocks(place):
    more = [*NAMES[:place], f"photos/{place:05}b.jpg", *NAMES[place:]]
    before = {tuple(NAMES[i] for i in rows) for rows in cut(NAMES, 64)}
    after = {tuple(more[i] for i in rows) for rows in cut(more, 64)}
    assert len(before) > 60 and len(before - after) <= 4


def test_names_that_are_not_utf_8_are_cut_too():
    assert len(cut(["\udce9.jpg"] * 9, 2)) >= 3
