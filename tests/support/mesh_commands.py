"""Checks of whole commands on eight simulated devices: `python -m tests.support.mesh_commands CHECK`."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS: dict[str, Any] = {
    "data": "digits", "max_train": 320, "max_test": 100, "batch_size": 64, "epochs": 2, "patch_size": 4,
    "embed_dim": 32, "depth": 1, "num_heads": 2, "prototypes": 64, "head_hidden_dim": 32, "bottleneck_dim": 16,
    "warmup_epochs": 1, "knn_every": 1, "log_every": 5, "checkpoint_minutes": 1e-6, "evaluate": False,
}  # fmt: skip


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The log of a run, without times."""
    from experiments.runs.log import read_log

    return [{name: value for name, value in record.items() if name != "seconds"} for record in read_log(folder)]


def check_pretraining(method: str) -> None:
    """A run on a mesh is that of one device, and so is one that moves to another mesh in the middle."""
    import numpy as np
    import pytest

    from dinojax import UserError
    from dinojax.pretraining import MultiCropConfig
    from experiments.pretraining.config import PretrainConfig
    from experiments.pretraining.loop import pretrain
    from experiments.runs.settings import create, replace

    crops = MultiCropConfig(global_size=12, local_size=8, local_crops=1)
    with tempfile.TemporaryDirectory() as place:
        config = create(PretrainConfig, crops=crops, method=method, cache_dir=Path(place) / "cache", **FLAGS)
        results = {}
        for text in ("data=1", "data=4,fsdp=2", None):
            out = Path(place) / str(text)
            results[text] = pretrain(replace(config, out=out, mesh=text))
        moved = replace(config, out=Path(place) / "moved", mesh="fsdp=8")
        assert pretrain(replace(moved, minutes=1e-9)).rank_me is None
        results["moved"] = pretrain(replace(moved, mesh="data=2"))
        expected = numbers(results["data=1"].folder)
        for text, result in results.items():
            found = numbers(result.folder)
            assert [record.keys() for record in found] == [record.keys() for record in expected]
            losses = [np.array([one["loss"] for one in log if "loss" in one]) for log in (found, expected)]
            print(f"{method} on {text}: loss {np.abs(losses[0] - losses[1]).max():.1e}")
            np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
            assert result.test_knn_accuracy["teacher"] == pytest.approx(
                results["data=1"].test_knn_accuracy["teacher"], abs=0.0201
            )
        with pytest.raises(UserError, match="takes 3 devices, which does not divide the 8"):
            pretrain(replace(config, out=Path(place) / "three", mesh="data=3"))
        with pytest.raises(UserError, match="a batch of 36 images is not divided by the 8 devices of mesh data=8"):
            pretrain(replace(config, out=Path(place) / "odd", batch_size=36))
        assert not (Path(place) / "odd").exists()


def check_features() -> None:
    """Features of a divided batch are those of one device, whatever the batch size."""
    import numpy as np

    from converters import load_pretrained
    from dinojax.parallel import make_mesh
    from experiments.data.load import load_dataset
    from experiments.features.extractor import FeatureExtractor

    model = load_pretrained("dinojax_vitt")
    dataset = load_dataset("digits", max_train=45, max_test=20)
    with tempfile.TemporaryDirectory() as place:
        found = []
        for text in ("data=1", "data=8"):
            extractor = FeatureExtractor(
                model,
                normalisation=((0.5,) * 3, (0.5,) * 3),
                image_size=32,
                cache_dir=Path(place) / text,  # features are cached under the same key on any mesh
                batch_size=12,
                mesh=make_mesh(text),
            )
            found.append(extractor.extract([dataset.train])[0].tokens)
            assert extractor.batch_size == {"data=1": 12, "data=8": 16}[text]
        np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


CHECKS: dict[str, Callable[[], None]] = {
    "dino": lambda: check_pretraining("dino"),
    "dinov2": lambda: check_pretraining("dinov2"),
    "features": check_features,
}

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
