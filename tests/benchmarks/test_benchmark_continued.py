"""The summary of the continued trainings against plain numpy, and the part of Tiny-ImageNet that they take."""

import numpy as np
import pytest

from benchmarks import continued
from tests.support.tiny_imagenet_files import write_tiny_imagenet


def test_means_deviations_and_gains_are_those_of_numpy():
    rng, runs = np.random.default_rng(0), []
    for rate in ("gentle", "high"):
        for seed in (3, 5, 9):
            for heads in continued.HEADS_WARMUP:
                knn = {"start": 0.25, "teacher": rng.random(), "student": rng.random()}
                runs.append({"rate": rate, "heads": heads, "seed": seed, "knn": knn})
    found = continued.summary(runs[::-1], 400)
    z = 1.959964  # Wilson's interval in its own words
    middle, half = (0.25 + z**2 / 800) / (1 + z**2 / 400), z * np.sqrt(0.25 * 0.75 / 400 + z**2 / 640_000)
    assert found["start"]["knn"] == 0.25
    expected = np.array([middle - half / (1 + z**2 / 400), middle + half / (1 + z**2 / 400)])
    np.testing.assert_allclose(found["start"]["interval"], expected, atol=1e-4)
    for rate, networks in found["groups"].items():
        for network, numbers in networks.items():
            values = {
                heads: np.array([run["knn"][network] for run in runs if (run["rate"], run["heads"]) == (rate, heads)])
                for heads in continued.HEADS_WARMUP
            }
            values["gain"] = values["with warm-up"] - values["without"]
            assert numbers.keys() == values.keys()
            for name, one in values.items():
                assert numbers[name]["mean"] == pytest.approx(one.mean(), abs=1e-4)
                assert numbers[name]["deviation"] == pytest.approx(one.std(ddof=1), abs=1e-4)


def test_the_part_of_tiny_imagenet_holds_the_first_images_of_some_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(continued, "_CLASS_STEP", 2)
    monkeypatch.setattr(continued, "_IMAGES", 1)
    part = continued.tiny_part(write_tiny_imagenet(tmp_path / "whole"), tmp_path / "part")
    found = {path.relative_to(part).as_posix() for path in part.rglob("*.JPEG")}
    assert found == {
        "train/n1/n1_0.JPEG", "train/n3/n3_0.JPEG", "test/n1/val_1.JPEG", "test/n3/val_0.JPEG", "test/n3/val_2.JPEG"
    }  # fmt: skip
    assert continued.tiny_part(tmp_path / "gone", tmp_path / "part") == part  # made once
