"""Both sides of the benchmark of patches do the same work; scenes hold what their truth says."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import patch_scenes, patches
from benchmarks.work import patch_work
from tests.support.house import ROOT


@pytest.mark.parametrize("row", patches.ROWS)
def test_both_sides_do_the_same_work(row, monkeypatch):
    small = {"DIM": 24, "GRID": (7, 9), "SQUARE": (9, 9), "CONTEXT": 3, "RADIUS": 2, "BANK": 200, "CORESET": 40}
    for name, value in (small | {"QUERIES": 81, "EXPANSION": 20}).items():
        monkeypatch.setattr(patch_work, name, value)
    monkeypatch.setattr(patch_work, "warmed_up", lambda call: patch_work.Prepared(call, 0.0, 1.0))
    ours, theirs = (prepare(row).info["result"] for prepare in (patch_work.prepare_jax, patch_work.prepare_torch))
    if row in ("propagate", "distances"):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    else:
        assert ours == theirs
    assert np.size(ours) > 10


def test_a_pasted_shape_is_where_its_mask_says():
    rng = np.random.default_rng(0)
    shape = patch_scenes.blob(rng, 20)
    assert 0.3 < shape.mean() < 0.75 and not shape[0, 0]
    background, cut = np.zeros((60, 60, 3), np.uint8), np.full((20, 20, 3), 9, np.uint8)
    for row, column in ((30, 25), (5, 57)):  # the second one is partly outside
        photo, mask = patch_scenes.paste(background, cut, shape, row, column)
        np.testing.assert_array_equal(photo.any(axis=-1), mask)
        assert 0 < mask.sum() <= shape.sum()
    np.testing.assert_array_equal(patch_scenes.paste(background, cut, shape, 30, 25)[1][20:40, 15:35], shape)
    assert not background.any()


def test_the_object_of_a_video_moves_about_its_own_length():
    rng = np.random.default_rng(1)
    background, other = (np.full((128, 128, 3), value, np.uint8) for value in (0, 200))
    frames, masks = patch_scenes.video(background, other, rng)
    assert len(frames) == len(masks) == 12
    for frame, mask in zip(frames, masks):
        np.testing.assert_array_equal(frame.any(axis=-1), mask)
    centres = [np.argwhere(mask).mean(axis=0) for mask in (masks[0], masks[-1])]
    assert 25 < np.linalg.norm(centres[1] - centres[0]) < 55


@pytest.mark.slow  # runs the benchmark as a command
def test_the_command_ends_in_a_line_of_json(tmp_path):
    command = [sys.executable, "-m", "benchmarks.patch_scenes", "--quick", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert result["tracking"]["J"]["tracked"] > result["tracking"]["J"]["still"]
    assert result["anomalies"]["image_auroc"]["value"] > 0.5
