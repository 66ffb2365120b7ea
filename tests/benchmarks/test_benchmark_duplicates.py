"""The numbers of the duplicates benchmark against loops; its edits are what they are called."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import duplicates
from tests.support.house import ROOT


def unit(images, dim, seed):
    features = np.random.default_rng(seed).standard_normal((images, dim))
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def test_recall_and_false_matches_are_those_of_loops():
    originals = unit(40, 4, 0)
    near, far = originals + 0.2 * unit(40, 4, 1), originals + 0.8 * unit(40, 4, 2)
    copies = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in (("near", near), ("far", far))}
    row = duplicates.summary(originals, copies, (0.5, 0.8, 0.95))
    for label, numbers in row["thresholds"].items():
        threshold = float(label)
        false = sum(any(originals[i] @ originals[j] >= threshold for j in range(40) if j != i) for i in range(40))
        assert numbers["false_share"] == pytest.approx(false / 40, abs=1e-4)
        for name, features in copies.items():
            recall = sum(originals[i] @ features[i] >= threshold for i in range(40)) / 40
            assert numbers["recall"][name] == pytest.approx(recall, abs=1e-4)
    for name, features in copies.items():
        found = sum(max(range(40), key=lambda j: features[i] @ originals[j]) == i for i in range(40)) / 40
        assert row["found"][name] == pytest.approx(found, abs=1e-4)
    assert row["found"]["near"] > row["found"]["far"]
    for share, numbers in row["at_false_share"].items():
        assert numbers["false_share"] <= float(share)


def test_edits_change_what_they_say():
    pixels = np.random.default_rng(0).integers(60, 120, (40, 60, 3), dtype=np.uint8)
    edited = {name: edit(pixels, np.random.default_rng(1)) for name, edit in duplicates.EDITS.items()}
    assert edited["half the size"].shape == (20, 30, 3)
    assert edited["crop, 90 % of each side"].shape == (36, 54, 3)
    assert edited["crop, 75 % of each side"].shape == (30, 45, 3)
    np.testing.assert_array_equal(edited["mirrored"][:, ::-1], pixels)
    for name, factor in (("brightness × 1.25", 1.25), ("brightness × 0.75", 0.75)):
        np.testing.assert_allclose(edited[name], factor * pixels, atol=1)
    losses = [np.abs(edited[f"JPEG, quality {quality}"].astype(int) - pixels).mean() for quality in (75, 30)]
    assert 0 < losses[0] < losses[1]


@pytest.mark.slow  # runs the benchmark as a command
def test_the_command_ends_in_a_line_of_json(tmp_path):
    command = [sys.executable, "-m", "benchmarks.duplicates", "--quick", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    row = result["rows"]["tiles of two photos"]["plain"]
    assert row["images"] == 120 and row["found"]["JPEG, quality 75"] > 0.8
    assert {"processor", "versions", "command", "date"} <= result["machine"].keys()
